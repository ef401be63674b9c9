"""Shapes that plans need without a download, and finding any other shape without its weights."""

from pathlib import Path

from common.errors import UserError
from common.model.backbone import embedded
from common.model.backbone.llama_config import read_llama_config
from common.model.backbone.load import BackboneShape
from common.model.backbone.tiny import CONFIG as TINY

_LLAMA_3_1_8B = BackboneShape(
    layers=32,
    hidden=4096,
    intermediate=14336,
    heads=32,
    kv_heads=8,
    head_dim=128,
    vocabulary=128256,
    tied=False,
)
_SMOLLM2_135M = BackboneShape(
    layers=30,
    hidden=576,
    intermediate=1536,
    heads=9,
    kv_heads=3,
    head_dim=64,
    vocabulary=49152,
    tied=True,
)
KNOWN_SHAPES = {
    # config.json of the model, Meta 2024 (gated, so it cannot be fetched by everybody).
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA_3_1_8B,
    "meta-llama/Llama-3.1-8B": _LLAMA_3_1_8B,
    embedded.HUB_ID: _SMOLLM2_135M,
    "embedded": _SMOLLM2_135M,
}


def shape_of(name: str) -> BackboneShape:
    """Return a backbone's shape without its weights.

    Args:
        name: ``embedded``, ``tiny``, a folder, or a hub id; of an unknown hub id only
            config.json is fetched.

    Raises:
        UserError: If it cannot be found, or is not a Llama.
    """
    if name in KNOWN_SHAPES:
        return KNOWN_SHAPES[name]
    if name == "tiny":
        return BackboneShape.of(TINY)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        folder = _fetched_config(name).parent
    return BackboneShape.of(read_llama_config(folder, name))


def _fetched_config(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, "config.json"))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"model.backbone={name}: neither a folder nor a model whose config.json could be "
            f"fetched ({type(error).__name__})",
            allowed="`embedded`, `tiny`, a folder with a Llama, or a hub id",
            fix="check the name and the network",
        ) from None
