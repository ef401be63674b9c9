"""Packed attention on a GPU: FlashAttention-2 over varying lengths, and cuDNN segment by segment.

Both take grouped-query heads as they are: keys and values are never repeated, neither in the
forward pass nor in what is kept for the backward pass.

Shapes: T packed tokens, H query heads, G key/value heads, E head width, N segments of one length.
"""

import functools
import importlib.util
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from common.choice import CAPABILITY_9, HOPPER, NO_FLASH_ATTN, NO_FLASH_ATTN_3, OTHER_GRADIENT
from common.undocumented.torch_names import cudnn_attention, flash_attention_cuda

_PROBE_TOKENS = 64
Ends = tuple[Tensor, Tensor, int, int]
"""The segments' offsets on the device and the longest segment, of queries and of keys."""


def equal_runs(bounds: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return (segments, tokens of each) of every run of neighbours of one length.

    >>> equal_runs((0, 4, 8, 10))
    [(2, 4), (1, 2)]
    """
    lengths = [stop - start for start, stop in itertools.pairwise(bounds)]
    return [(len(list(run)), length) for length, run in itertools.groupby(lengths)]


def by_segment(
    q_THE: Tensor,
    k_TGE: Tensor,
    v_TGE: Tensor,
    bounds: tuple[int, ...],
    dense: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """Attend causally, one call of a dense kernel for each run of segments of one length.

    Args:
        q_THE: Queries.
        k_TGE: Keys.
        v_TGE: Values.
        bounds: S + 1 token offsets of the segments.
        dense: Attends [N, heads, tokens, E] queries to keys and values.

    Returns:
        [T, H, E].
    """
    runs = equal_runs(bounds)
    sizes = [count * length for count, length in runs]
    outputs = []
    # One run is not split: the gradient of a split is a copy.
    split = [torch.split(t, sizes) if len(sizes) > 1 else (t,) for t in (q_THE, k_TGE, v_TGE)]
    for (count, length), *parts in zip(runs, *split, strict=True):
        q, k, v = (t.view(count, length, *t.shape[1:]).transpose(1, 2) for t in parts)
        outputs.append(dense(q, k, v).transpose(1, 2).reshape(parts[0].shape))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def sdpa(
    q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, scaling: float, bounds: tuple[int, ...]
) -> Tensor:
    """Attend with whatever torch's SDPA chooses; [T, H, E]."""

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )

    return by_segment(q_THE, k_TGE, v_TGE, bounds, dense)


def cudnn(
    q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, scaling: float, bounds: tuple[int, ...]
) -> Tensor:
    """Attend with cuDNN's fused kernel (Hopper and newer); [T, H, E].

    Asked for by its own name: SDPA's way of choosing it costs the host more than the call.
    """
    keeps = torch.is_grad_enabled()

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found: Any = cudnn_attention(q, k, v, None, keeps, 0.0, True, False, scale=scaling)
        out: Tensor = found[0]
        return out

    return by_segment(q_THE, k_TGE, v_TGE, bounds, dense)


def varlen(q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, scaling: float, ends: Ends) -> Tensor:
    """Attend with torch's own FlashAttention-2 over all segments in one call; [T, H, E]."""
    if q_THE.shape[1] != k_TGE.shape[1] and "enable_gqa" not in _varlen_arguments():
        if not _probe("flash", q_THE.device):
            return _grouped_flash(q_THE, k_TGE, v_TGE, scaling, ends)
        shared = q_THE.shape[1] // k_TGE.shape[1]
        k_TGE, v_TGE = (t.repeat_interleave(shared, 1) for t in (k_TGE, v_TGE))
    from torch.nn.attention.varlen import varlen_attn

    call: Any = varlen_attn
    out: Tensor = call(q_THE, k_TGE, v_TGE, *ends, scale=scaling, **_varlen_arguments())
    return out


def _grouped_flash(q: Tensor, k: Tensor, v: Tensor, scaling: float, ends: Ends) -> Tensor:
    # What varlen_attn calls; the kernel groups heads, its older signature only does not say so.
    found: Any = flash_attention_cuda(q, k, v, *ends, 0.0, True, False, scale=scaling)
    out: Tensor = found[0]
    return out


def flash_attn(
    module: str, q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, scaling: float, ends: Ends
) -> Tensor:
    """Attend with an installed FlashAttention over all segments in one call; [T, H, E].

    Args:
        module: ``flash_attn`` (2) or ``flash_attn_interface`` (3).
        q_THE: Queries.
        k_TGE: Keys.
        v_TGE: Values.
        scaling: Factor of the scores.
        ends: Of the segments.
    """
    if module == "flash_attn_interface":
        from flash_attn_interface import flash_attn_varlen_func
    else:
        from flash_attn import flash_attn_varlen_func
    found: Any = flash_attn_varlen_func(
        q_THE, k_TGE, v_TGE, *ends, softmax_scale=scaling, causal=True
    )
    # FlashAttention-3's first releases return the log-sum-exp beside the output.
    out: Tensor = found[0] if isinstance(found, tuple) else found
    return out


def cudnn_obstacle(device: torch.device) -> str:
    """Say why cuDNN's kernel cannot run here, or return nothing."""
    if torch.cuda.get_device_capability(device) < (9, 0):
        return CAPABILITY_9
    return _probe("cudnn", device)


def flash_attn_obstacle(module: str, device: torch.device) -> str:
    """Say why an installed FlashAttention cannot run here, or return nothing."""
    newer = module == "flash_attn_interface"
    if newer and torch.cuda.get_device_capability(device)[0] != 9:
        return HOPPER
    if importlib.util.find_spec(module) is None:
        return NO_FLASH_ATTN_3 if newer else NO_FLASH_ATTN
    return _probe(module, device)


@functools.cache
def _probe(kernel: str, device: torch.device) -> str:
    """Try a kernel on grouped heads, forward and backward: what is supported is not documented."""
    bounds = (0, _PROBE_TOKENS)
    offsets = torch.tensor(bounds, dtype=torch.int32, device=device)
    ends = (offsets, offsets, _PROBE_TOKENS, _PROBE_TOKENS)
    calls: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "cudnn": lambda q, k, v: cudnn(q, k, v, 0.1, bounds),
        "flash": lambda q, k, v: _grouped_flash(q, k, v, 0.1, ends),
    }
    call = calls.get(kernel) or functools.partial(flash_attn, kernel, scaling=0.1, ends=ends)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            q, k, v = (
                torch.ones(
                    *(_PROBE_TOKENS, heads, 64),
                    dtype=torch.bfloat16,
                    device=device,
                    requires_grad=True,
                )
                for heads in (4, 2, 2)
            )
            torch.autograd.backward(call(q, k, v).float().sum())
    except (RuntimeError, TypeError, AttributeError, ImportError) as error:
        return f"tried, and refused ({str(error).partition(chr(10))[0][:80]})"
    if k.grad is None or k.grad.shape != k.shape:
        return OTHER_GRADIENT
    return ""


@functools.cache
def _varlen_arguments() -> dict[str, Any]:
    """Return the causal and grouped-query arguments under this torch's names."""
    from torch.nn.attention.varlen import varlen_attn

    names = inspect.signature(varlen_attn).parameters
    causal = {"is_causal": True} if "is_causal" in names else {"window_size": (-1, 0)}
    return causal | ({"enable_gqa": True} if "enable_gqa" in names else {})
