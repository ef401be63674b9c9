"""Bytes that training keeps for the backward pass, from shapes alone, and what follows from them.

The count is what the lean layer saves (`common.model.kernels.fused_layer`); a test compares it with
the tensors that autograd really saves.
"""

import torch

from common.choice import Choice
from common.errors import SettingError
from common.limits import available_memory_bytes
from common.model.adapter.falora import AdapterSpec
from common.model.adapter.scheme import A
from common.model.backbone.load import BackboneShape

RECOMPUTE = ("none", "mlp", "half", "all")
# Share of the free memory that activations may take: the rest is for gradients in flight, the
# loss's chunk of logits and, on the host, for other processes.
_USABLE_SHARE = {"cpu": 0.6, "cuda": 0.85}


def saved_bytes_per_token_layer(
    shape: BackboneShape, adapter: AdapterSpec, *, value_bytes: int, recompute: str
) -> float:
    """Return the mean bytes that one layer saves per token for the backward pass.

    Args:
        shape: The backbone's sizes.
        adapter: What is attached.
        value_bytes: 2 for bf16, 4 for fp32.
        recompute: ``none``, ``mlp``, ``half`` or ``all``.

    >>> llama_8b = BackboneShape(layers=32, hidden=4096, intermediate=14336, heads=32, kv_heads=8,
    ...                          head_dim=128, vocabulary=128256, tied=False)
    >>> saved_bytes_per_token_layer(llama_8b, AdapterSpec(), value_bytes=2, recompute="none")
    94408.0
    """
    hidden, heads = shape.hidden * value_bytes, shape.heads * shape.head_dim * value_bytes
    keys_values = 2 * shape.kv_heads * shape.head_dim * value_bytes
    groups = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "gate_proj": 2, "up_proj": 2}
    products = len(adapter.targets) * adapter.rank * value_bytes
    if A in adapter.scheme.held:
        # A's gradient needs the input of each group of projections.
        inputs = {groups.get(target, 3) for target in adapter.targets}
        width = {0: hidden, 1: heads, 2: hidden, 3: shape.intermediate * value_bytes}
        products += sum(width[group] for group in inputs)
    norm = hidden + 4
    attention = norm + 2 * heads + keys_values + 4 * shape.heads + products
    whole = float(attention + norm + 2 * shape.intermediate * value_bytes)
    return {
        "none": whole,
        "mlp": float(attention + hidden),
        "half": (whole + hidden) / 2,
        "all": float(hidden),
    }[recompute]


def choose_recompute(
    requested: str,
    *,
    shape: BackboneShape,
    adapter: AdapterSpec,
    value_bytes: int,
    batch_tokens: int,
    device: torch.device,
) -> Choice[str]:
    """Choose which activations the backward pass computes again: no more than memory needs.

    ``half`` is left to those who ask for it: ``mlp`` saves more at the same cost.

    Args:
        requested: ``auto`` or one of ``RECOMPUTE``.
        shape: The backbone's sizes.
        adapter: What is attached.
        value_bytes: 2 for bf16, 4 for fp32.
        batch_tokens: Longest packed batch; 0 when unknown.
        device: Where the model lies already, so that what is free is free.

    Raises:
        UserError: If the request is none of the names.
    """
    if requested in RECOMPUTE:
        return Choice(requested, "asked for")
    if requested != "auto":
        raise SettingError(
            f"train.recompute={requested!r}",
            allowed=", ".join(("auto", *RECOMPUTE)),
            fix="set train.recompute",
        )
    if not batch_tokens:
        return Choice("none", "the batch size is not known yet")
    free = _free_bytes(device)
    needs = {
        choice: batch_tokens
        * shape.layers
        * saved_bytes_per_token_layer(shape, adapter, value_bytes=value_bytes, recompute=choice)
        for choice in ("none", "mlp", "all")
    }
    usable = _USABLE_SHARE[device.type] * free
    chosen = next((c for c, need in needs.items() if need <= usable), "all")
    return Choice(
        chosen,
        f"{needs[chosen] / 2**30:.1f} GiB of activations for {batch_tokens} tokens, "
        f"{free / 2**30:.1f} GiB free",
    )


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return available_memory_bytes()
