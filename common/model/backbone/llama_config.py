"""A folder's configuration: read as a Llama's, and refused where it says more than one computes."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import UserError
from common.model.backbone.skeleton import shaped_like
from common.model.backbone.weights import quantised
from common.model.kernels import rope

if TYPE_CHECKING:
    from transformers import LlamaConfig

_QUANTISERS = ("quantize_config.json", "quant_config.json", "quantization_config.json")
_ABOUT_ATTENTION = re.compile(
    "attn|attention|rope|rotary|window|chunk|causal|bidirectional|softcap|layer_types|per_layer"
)
_LLAMA_ATTENTION = frozenset(
    {
        *("num_attention_heads", "attention_bias", "attention_dropout", "output_attentions"),
        *("rope_theta", "rope_scaling", "rope_parameters", "is_causal", "chunk_size_feed_forward"),
        *("_attn_implementation", "attn_implementation", "_attn_implementation_internal"),
        *("_attn_implementation_autoset", "_flash_attn_2_enabled", "max_window_layers"),
    }
)


def read_llama_config(folder: Path, name: str) -> "LlamaConfig":
    """Read a folder's configuration.

    Raises:
        UserError: If there is none, it is not a Llama's, its weights are quantised, or it has a
            rotary or attention setting under which we do not compute what it says.
    """
    from transformers import LlamaConfig

    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = content.get("model_type")
    except (OSError, ValueError, AttributeError, RecursionError):
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
    _refuse_quantised(folder, content, name)
    _refuse_attention_settings(content, name)
    try:
        config: LlamaConfig = LlamaConfig.from_pretrained(folder, trust_remote_code=False)
    # Whatever the class checks, it raises its own kinds of errors for.
    except Exception as error:
        raise _unusable(name, error) from None
    _refuse_rope(config.rope_parameters or {}, name)
    return config


def _refuse_quantised(folder: Path, content: dict[str, Any], name: str) -> None:
    how = content.get("quantization_config") or content.get("compression_config")
    beside = [file for file in _QUANTISERS if (folder / file).is_file()]
    if how or beside:
        method = how.get("quant_method", "") if isinstance(how, dict) else ""
        raise quantised(name, str(method or "".join(beside[:1])))
    if content.get("transformers_weights") or (folder / "adapter_config.json").is_file():
        raise UserError(
            f"model.backbone={name} is an adapter, or names other weights than its own",
            allowed="a folder with the whole model",
            fix="merge the adapter into its model and save that",
        )


def _refuse_attention_settings(content: dict[str, Any], name: str) -> None:
    """Refuse what a plain Llama does not have: such settings act on some paths and not on others.

    A sliding window, for one, shortens the cache of a generation and leaves training alone.
    """
    strange = [
        f"{key}={value!r}"
        for key, value in sorted(content.items())
        if _ABOUT_ATTENTION.search(key)
        and key not in _LLAMA_ATTENTION
        and (value is True or value not in (None, False, [], {}, "", 1.0))
    ]
    if content.get("is_causal") is False:
        strange.append("is_causal=False")
    if strange:
        raise UserError(
            f"model.backbone={name}: config.json sets {', '.join(strange)}, which a Llama has not",
            allowed="full causal attention in every layer",
            fix="use a model whose model_type says what it computes, or remove the setting",
        )


def _refuse_rope(parameters: dict[str, Any], name: str) -> None:
    kind = parameters.get("rope_type")
    partial = parameters.get("partial_rotary_factor", 1.0)
    if (
        kind not in (*rope.FIXED, *rope.BY_LENGTH)
        or partial != 1.0
        or "mrope_section" in parameters
    ):
        detail = f"partial_rotary_factor={partial}" if partial != 1.0 else f"rope_type={kind!r}"
        raise UserError(
            f"model.backbone={name}: rotary position embeddings with {detail}",
            allowed=f"rope_type {', '.join((*rope.FIXED, *rope.BY_LENGTH))}, of the whole head",
            fix="use another Llama",
        )


def tensors_of(config: "LlamaConfig", name: str) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Return the shapes of a Llama's tensors, and the names of those that may be absent.

    Raises:
        UserError: If no Llama can be built from the configuration.
    """
    try:
        model = shaped_like(config)
    except Exception as error:
        raise _unusable(name, error) from None
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    return shapes, {"lm_head.weight"} if config.tie_word_embeddings else set()


def _unusable(name: str, error: Exception) -> UserError:
    said = str(error).strip().split("\n")[-1].strip()
    return UserError(
        f"model.backbone={name}: config.json describes no Llama ({type(error).__name__}: {said})",
        fix="bring back the config.json that the weights came with",
    )
