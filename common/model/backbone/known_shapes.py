"""Shapes that plans need without a download, and finding any other shape without its weights."""

from pathlib import Path
from typing import Any

from common.model.backbone import embedded
from common.model.backbone.llama_config import read_llama_config
from common.model.backbone.load import BackboneShape, fetching
from common.model.backbone.tiny import CONFIG as TINY

_COLUMNS = "layers hidden intermediate heads kv_heads head_dim vocabulary tied"
_LLAMA_3_1_8B = (32, 4096, 14336, 32, 8, 128, 128256, False)
_SMOLLM2_135M = (30, 576, 1536, 9, 3, 64, 49152, True)
_ROWS: dict[str, tuple[Any, ...]] = {
    # config.json of the model, Meta 2024 (gated, so it cannot be fetched by everybody).
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA_3_1_8B,
    "meta-llama/Llama-3.1-8B": _LLAMA_3_1_8B,
    embedded.HUB_ID: _SMOLLM2_135M,
    "embedded": _SMOLLM2_135M,
}
KNOWN_SHAPES = {
    name: BackboneShape(**dict(zip(_COLUMNS.split(), row, strict=True)))
    for name, row in _ROWS.items()
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
        from huggingface_hub import hf_hub_download

        with fetching(name):
            folder = Path(hf_hub_download(name, "config.json")).parent
    return BackboneShape.of(read_llama_config(folder, name))
