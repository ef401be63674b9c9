"""The frozen backbone: what it is (`BackboneSpec`), and loading its weights.

``embedded`` is SmolLM2-135M-Instruct, fetched once into the user's cache; ``tiny`` is a random
Llama built in code; anything else is a folder or a hub id of a Llama.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from common.config import OWN_TEXT, TextConfig
from common.errors import UserError
from common.model.backbone import embedded, tiny
from common.model.backbone.llama_config import read_llama_config, tensors_of
from common.model.backbone.reading import Destination, Held, Reading
from common.model.backbone.tokenizer import read_tokenizer, tokenizer_facts
from common.model.backbone.weights import check_weights, weight_files
from common.model.kernels import rope
from common.model.kernels.frozen import FrozenWeight, Quantiser, quantise, replace_linear
from common.quick_imports import quick_imports
from common.user_cache import fedrx_cache

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase


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
    """sha256 of configuration, weights, tokenizer and chat template, as they are loaded."""
    shape: BackboneShape
    rope: str = "default"
    """Kind of its rotary position embedding, as transformers names it."""
    tokenizer: "PreTrainedTokenizerBase | None" = field(default=None, repr=False, compare=False)
    """As ``resolve_backbone`` read it: a large vocabulary takes a second."""
    held: Held | None = field(default=None, repr=False, compare=False)
    """Its weights, where ``resolve_backbone`` was told where they go; until a model has them."""

    def fingerprint_as(self, weights: str, text: TextConfig = OWN_TEXT) -> str:
        """Return what hospitals must agree on: quantised weights are another function.

        Args:
            weights: Format of the frozen weights, see ``common.model.kernels.frozen``.
            text: What the model is asked; other words are another function too.
        """
        others = [] if weights in ("bf16", "fp32") else [weights]
        if text != OWN_TEXT:
            others.append(json.dumps([text.system_prompt, text.template]))
        if not others:
            return self.fingerprint
        return hashlib.sha256(" ".join([self.fingerprint, *others]).encode()).hexdigest()


def resolve_backbone(
    name: str,
    *,
    cache_dir: Path | None = None,
    progress: Callable[[str], None] | None = None,
    destination: Destination | None = None,
) -> BackboneSpec:
    """Find, and where needed fetch, a backbone.

    With a destination its weights are read there meanwhile, and hashed from the same bytes.

    Args:
        name: ``embedded``, ``tiny``, a folder, or a hub id.
        cache_dir: The user's cache when None.
        progress: Called with one line when something takes long.
        destination: Where the weights will be wanted, for ``load_model``; None: nowhere yet.

    Raises:
        UserError: If it cannot be found or fetched, or is not a Llama.
    """
    cache_dir = cache_dir or fedrx_cache()
    if name == "tiny":
        return BackboneSpec(
            name=name,
            folder=None,
            hub_id="",
            fingerprint=_tiny_fingerprint(),
            shape=BackboneShape.of(tiny.CONFIG),
        )
    if name == "embedded":
        folder, hub_id = embedded.ensure_embedded(cache_dir, progress), embedded.HUB_ID
    elif Path(name).expanduser().is_dir():
        folder, hub_id = Path(name).expanduser().resolve(), ""
    else:
        folder, hub_id = _hub_folder(name), name
    options: dict[str, Any] = {"destination": destination, "progress": progress}
    with Reading(_files_at_hand(folder, name), cache_dir, **options) as reading:
        config = read_llama_config(folder, name)
        expected, optional = tensors_of(config, name)
        check_weights(folder, name, expected, optional=optional)
        tokenizer = read_tokenizer(folder, name, vocabulary=config.vocab_size)
        ends = _end_tokens(folder / "generation_config.json")
        if destination:
            _llama()  # what will hold the weights is imported while they come
        return BackboneSpec(
            name=name,
            folder=folder,
            hub_id=hub_id,
            fingerprint=_fingerprint(
                config=_read_json(folder / "config.json"),
                weights=reading.digest(),
                tokenizer=tokenizer_facts(tokenizer),
                ends=ends,
            ),
            shape=BackboneShape.of(config),
            rope=config.rope_parameters["rope_type"],
            tokenizer=tokenizer,
            held=reading.held(),
        )


def _files_at_hand(folder: Path, name: str) -> tuple[Path, ...]:
    """Return what can be read already; what is wrong with a folder is said in the checks' order."""
    try:
        return weight_files(folder, name)
    except UserError:
        return ()


def load_model(
    spec: BackboneSpec,
    *,
    device: torch.device,
    dtype: torch.dtype,
    quantiser: Quantiser | None = None,
) -> "LlamaForCausalLM":
    """Load the weights, frozen and in evaluation mode.

    Those that wait for their model are handed over. On a CPU the others are mapped, not read: its
    processes share them.

    Args:
        spec: From ``resolve_backbone``.
        device: Where they go.
        dtype: The backbone's arithmetic.
        quantiser: Of the layers' linear maps, where they are wanted in another format.
    """
    _llama()
    destination = Destination(device=device, dtype=dtype, quantiser=quantiser)
    tensors = spec.held.take(destination) if spec.held else {}
    if spec.folder and device.type != "cpu" and not tensors:
        files = weight_files(spec.folder, spec.name)
        with Reading(files, fedrx_cache(), destination=destination) as reading:
            held = reading.held()
        tensors = held.take(destination) if held else {}
    if spec.folder is None:
        model = tiny.tiny_model().to(device=device, dtype=dtype)
    elif tensors:
        model = _assembled(spec.folder, tensors, destination)
    else:
        with without_progress_bars():
            model = _llama().from_pretrained(
                spec.folder,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
            )
        _check_tied(model.config, model.lm_head.weight, model.model.embed_tokens.weight)
    rope.install(model)
    if quantiser:
        quantise(model, quantiser)  # what came unquantised
    return model.eval().requires_grad_(False)


def _assembled(
    folder: Path, tensors: dict[str, FrozenWeight], destination: Destination
) -> "LlamaForCausalLM":
    """Put tensors into the model of a folder's configuration; no other copy of them is made."""
    from transformers import GenerationConfig, LlamaConfig

    local: dict[str, Any] = {"local_files_only": True}
    config = LlamaConfig.from_pretrained(
        folder, dtype=destination.dtype, trust_remote_code=False, **local
    )
    _check_tied(config, tensors.get("lm_head.weight"), tensors["model.embed_tokens.weight"])
    with torch.device("meta"):
        model = _llama()(config)
    for name, weight in tensors.items():
        if not isinstance(weight, Tensor):
            replace_linear(model, name.removesuffix(".weight"), weight)
    # check_weights has held the names against the model's: what is missing is a tied head, and
    # what is left over are an old Llama's rotary frequencies, and the weights put in above.
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    # Buffers are not saved: they are built anew, on the CPU as everywhere.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(destination.device)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(
            folder, trust_remote_code=False, **local
        )
    return model


def _check_tied(config: "LlamaConfig", head: Any, embedding: Any) -> None:
    """Refuse a head of its own where the configuration says that it has none.

    transformers keeps such a head, and tying drops it: two functions under one fingerprint.
    """
    if config.tie_word_embeddings and head is not None and not torch.equal(head, embedding):
        raise UserError(
            "model.backbone: tie_word_embeddings is true in config.json, and the weights hold "
            "another lm_head.weight than the embedding",
            allowed="one of the two",
            fix="set tie_word_embeddings to false in config.json, or take lm_head.weight out",
        )


def _llama() -> "type[LlamaForCausalLM]":
    """Import the model's class: half of all that a process imports."""
    with quick_imports():
        from transformers import LlamaForCausalLM

    return LlamaForCausalLM


@contextmanager
def without_progress_bars() -> Iterator[None]:
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
    """Return the tokenizer, read at most once.

    Raises:
        UserError: If it is not what ``read_tokenizer`` asks for.
    """
    if spec.folder is None:
        return tiny.tiny_tokenizer()
    if spec.tokenizer is not None:
        return spec.tokenizer
    return read_tokenizer(spec.folder, spec.name, vocabulary=spec.shape.vocabulary)


def _hub_folder(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "tokenizer*", "*.jinja"]
    with fetching(name):
        try:
            return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=True))
        except LocalEntryNotFoundError:
            return Path(snapshot_download(name, allow_patterns=patterns))


@contextmanager
def fetching(name: str) -> Iterator[None]:
    """Turn what the hub raises for a name into one line."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    hub = (HfHubHTTPError, LocalEntryNotFoundError)
    try:
        yield
    except HFValidationError:
        raise UserError(
            f"model.backbone={name}: there is no such folder, and no hub id looks so",
            allowed="`embedded`, `tiny`, a folder with a Llama, or a hub id",
            fix="check the path",
        ) from None
    # ImportError: httpx cannot speak to a SOCKS proxy that the environment names.
    except (*hub, OSError, ImportError) as error:
        raise UserError(
            f"model.backbone={name}: neither a folder nor a model that could be fetched "
            f"({type(error).__name__})",
            allowed="`embedded`, `tiny`, a folder with a Llama, or a hub id",
            fix="check the name, the network and its proxy, and for gated models `hf auth login`",
        ) from None


def _fingerprint(*, config: dict[str, Any], **others: Any) -> str:
    """Hash everything that loading reads and that decides a result.

    What says where and with what a model was saved is left out.
    """
    incidental = {"transformers_version", "_name_or_path", "_model_name_or_path"}
    essential = {key: value for key, value in config.items() if key not in incidental}
    parts = {"config": essential, **others}
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


@functools.cache
def _tiny_fingerprint() -> str:
    return _fingerprint(**tiny.tiny_facts())


def _read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object; nothing where there is no file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise TypeError
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, RecursionError):
        raise UserError(f"model.backbone: {file} is not readable", fix="copy it again") from None
    return content


def _end_tokens(file: Path) -> Any:
    """Read what answers end at besides the tokenizer's end token: a number, several or none."""
    ends = _read_json(file).get("eos_token_id")
    listed = ends if isinstance(ends, list) else [ends]
    if ends is not None and any(type(end) is not int for end in listed):
        raise UserError(
            f"model.backbone: {file} has an eos_token_id that is no token",
            allowed="a whole number, or a list of them",
            fix="copy it again",
        )
    return ends
