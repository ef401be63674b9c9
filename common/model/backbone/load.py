"""The frozen backbone: what it is (`BackboneSpec`), and loading its weights.

``embedded`` is SmolLM2-135M-Instruct, fetched once into the user's cache; ``tiny`` is a random
Llama built in code; anything else is a folder or a hub id of a Llama.
"""

import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from common.errors import UserError
from common.files import write_text
from common.model.backbone import embedded, tiny
from common.user_cache import fedrx_cache

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

_loads = 0


@dataclass(frozen=True, kw_only=True)
class BackboneShape:
    """The sizes that memory and parameter counts follow from."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool

    @classmethod
    def of(cls, config: "LlamaConfig") -> "BackboneShape":
        """Read the shape from a transformers configuration."""
        heads = config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=heads,
            kv_heads=config.num_key_value_heads or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocabulary=config.vocab_size,
            tied=bool(config.tie_word_embeddings),
        )


@dataclass(frozen=True, kw_only=True)
class BackboneSpec:
    """Which backbone, and where its files are."""

    name: str
    """As the configuration names it."""
    folder: Path | None
    """Folder with config, weights and tokenizer; None for ``tiny``."""
    hub_id: str
    """Name on the Hugging Face hub, for model cards; empty when unknown."""
    fingerprint: str
    """sha256 of configuration and weights."""
    shape: BackboneShape

    def fingerprint_as(self, weights: str) -> str:
        """Return what hospitals must agree on: fp8 weights are another function.

        Args:
            weights: Format of the frozen weights, see ``common.model.kernels.frozen``.
        """
        if weights != "fp8":
            return self.fingerprint
        return hashlib.sha256(f"{self.fingerprint} {weights}".encode()).hexdigest()


def loads() -> int:
    """Return how many times weights were loaded in this process."""
    return _loads


def resolve_backbone(
    name: str,
    *,
    cache_dir: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> BackboneSpec:
    """Find, and where needed fetch, a backbone.

    Args:
        name: ``embedded``, ``tiny``, a folder, or a hub id.
        cache_dir: The user's cache when None.
        progress: Called with one line when something takes long.

    Raises:
        UserError: If it cannot be found or fetched, or is not a Llama.
    """
    cache_dir = cache_dir or fedrx_cache()
    if name == "tiny":
        model = tiny.tiny_model()
        digest = hashlib.sha256(_canonical(_essential(model.config.to_diff_dict())))
        for key, tensor in sorted(model.state_dict().items()):
            digest.update(key.encode())
            digest.update(tensor.numpy().tobytes())
        return BackboneSpec(
            name=name,
            folder=None,
            hub_id="",
            fingerprint=digest.hexdigest(),
            shape=BackboneShape.of(model.config),
        )
    if name == "embedded":
        folder, hub_id = embedded.ensure_embedded(cache_dir, progress), embedded.HUB_ID
    elif Path(name).expanduser().is_dir():
        folder, hub_id = Path(name).expanduser().resolve(), ""
    else:
        folder, hub_id = _hub_folder(name), name
    config = read_llama_config(folder, name)
    return BackboneSpec(
        name=name,
        folder=folder,
        hub_id=hub_id,
        fingerprint=_fingerprint(folder, cache_dir, progress),
        shape=BackboneShape.of(config),
    )


def load_model(
    spec: BackboneSpec, *, device: torch.device, dtype: torch.dtype
) -> "LlamaForCausalLM":
    """Load the weights (counted by ``loads``), frozen and in evaluation mode."""
    global _loads
    _loads += 1
    if spec.folder is None:
        return tiny.tiny_model().to(device=device, dtype=dtype).requires_grad_(False)
    from transformers import LlamaForCausalLM

    # With accelerate, weights go from the file to a GPU without a copy on the host.
    straight = device.type == "cuda" and importlib.util.find_spec("accelerate") is not None
    place: dict[str, Any] = {"device_map": {"": device}} if straight else {}
    with _without_progress_bars():
        model = LlamaForCausalLM.from_pretrained(
            spec.folder, dtype=dtype, local_files_only=True, **place
        )
    return model.to(device).eval().requires_grad_(False)


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Keep transformers' own bars out of our output, and leave its switch as it was."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_tokenizer(spec: BackboneSpec) -> "PreTrainedTokenizerBase":
    """Load the tokenizer.

    Raises:
        UserError: If it has no chat template or no end token.
    """
    if spec.folder is None:
        return tiny.tiny_tokenizer()
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase
    try:
        tokenizer = AutoTokenizer.from_pretrained(spec.folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"model.backbone={spec.name} has no readable tokenizer",
            fix="name a folder with tokenizer.json and tokenizer_config.json",
        ) from None
    if not tokenizer.chat_template or tokenizer.eos_token_id is None:
        raise UserError(
            f"model.backbone={spec.name}: the tokenizer has no chat template or no end token",
            fix="use an instruction-tuned Llama",
        )
    return tokenizer


def read_llama_config(folder: Path, name: str) -> "LlamaConfig":
    """Read a folder's configuration.

    Raises:
        UserError: If there is none, or it is not a Llama's.
    """
    from transformers import LlamaConfig

    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = content.get("model_type")
    except (OSError, ValueError, AttributeError):
        raise UserError(
            f"model.backbone={name}: no readable config.json there",
            allowed="`embedded`, `tiny`, a folder with a Llama, or a hub id",
            fix="set model.backbone",
        ) from None
    if kind != "llama":
        raise UserError(
            f"model.backbone={name} is a {kind!r}, not a Llama",
            allowed="models with model_type llama",
            fix="set model.backbone",
        )
    config: LlamaConfig = LlamaConfig.from_pretrained(folder)
    return config


def _hub_folder(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "tokenizer*", "*.jinja"]
    try:
        try:
            return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=True))
        except LocalEntryNotFoundError:
            return Path(snapshot_download(name, allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"model.backbone={name}: neither a folder nor a model that could be fetched "
            f"({type(error).__name__})",
            allowed="`embedded`, `tiny`, a folder with a Llama, or a hub id",
            fix="check the name, the network, and for gated models `hf auth login`",
        ) from None


def _fingerprint(folder: Path, cache_dir: Path, progress: Callable[[str], None] | None) -> str:
    """Hash configuration and weights; remembered by path, size and time of change."""
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise UserError(
            f"model.backbone={folder} has no *.safetensors",
            fix="name a folder that holds the weights in that format",
        )
    for file in weights:
        _require_whole(file)
    files = [folder / "config.json", *weights]
    stamp = _canonical([[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files])
    remembered = cache_dir / "fingerprints" / hashlib.sha256(stamp).hexdigest()
    if remembered.is_file():
        return remembered.read_text(encoding="ascii").strip()
    size = sum(file.stat().st_size for file in files)
    if progress and size > 2**31:
        progress(f"hashing the backbone's weights ({size / 2**30:.1f} GiB), once")
    fingerprint = _hash_files(files)
    write_text(remembered, fingerprint + "\n")
    return fingerprint


def _require_whole(file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError):
        raise UserError(
            f"model.backbone: {file} is damaged or incomplete", fix="fetch or copy it again"
        ) from None


def _hash_files(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    # Shards are hashed side by side: hashing lets go of the interpreter.
    with ThreadPoolExecutor(max_workers=len(files)) as pool:
        for path, part in zip(files, pool.map(_hash_file, files), strict=True):
            digest.update(path.name.encode())
            digest.update(part)
    return digest.hexdigest()


def _hash_file(path: Path) -> bytes:
    """Return what one file adds: a configuration's essential content, or a shard's sha256."""
    if path.name == "config.json":
        return _canonical(_essential(json.loads(path.read_text(encoding="utf-8"))))
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _essential(config: dict[str, Any]) -> dict[str, Any]:
    """Leave out what says where and with what a model was saved, not what it is."""
    incidental = {"transformers_version", "_name_or_path", "_model_name_or_path"}
    return {key: value for key, value in config.items() if key not in incidental}


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()
