"""Elementwise work of a step behind one seam: plain torch, compiled by it, or Triton kernels.

A ``Kernels`` holds the arithmetic and no autograd: what is saved for the backward pass is decided
once, by the functions that call it (`common.model.kernels.fused_layer`, `common.training.loss`), so
every candidate saves the same.

Shapes: T packed tokens, D hidden width, I MLP width, H heads, G key/value heads, E head width,
F = E / 2, R rows, V vocabulary.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from common.model.kernels.rows import Parts
from common.undocumented.torch_names import silu_backward

FP8_LARGEST = 448.0
"""Of e4m3, which has no infinity."""
FP8_SMALLEST_SCALE = 1e-30
"""So that a row of zeros stays one."""

# Rows that are worked on at a time on a CPU, so that fp32 intermediates stay in its cache.
_CPU_ROWS = 256
# Bytes of fp32 logits that a CPU works on at a time, for the same reason.
_CPU_ROWS_BYTES = 2**21


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """The elementwise functions of a training step, forward and backward."""

    norm: Callable[[Tensor, Tensor | None, Tensor, float], tuple[Tensor, Tensor, Tensor]]
    """(x_TD, beside_TD, weight_D, epsilon) -> RMS-normed sum of both [T, D], the sum itself (x
    where nothing is beside it), 1 / RMS [T, 1] in fp32."""
    norm_backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    """(d_out_TD, d_residual_TD, x_TD, rstd_T1, weight_D) -> gradient of x, both ways added."""
    swiglu: Callable[[Tensor, Tensor], Tensor]
    """(gate_TI, up_TI) -> silu(gate) * up."""
    swiglu_backward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    """(d_out_TI, gate_TI, up_TI) -> gradients of gate and up."""
    rotate: Callable[[Tensor, Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]
    """(q_THE, k_TGE, cos_TE, sin_TE, back) -> both rotated, by the opposite angle if ``back``."""
    losses: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    """(logits_RV, labels_R1, weights_R1) -> cross-entropies [R] in fp32; with weights, the
    weighted gradient takes the logits' place."""
    quantise: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]
    """(x_TD, factors_D) -> x (times the factors) as e4m3 [T, D] and its scales [T, 1] in fp32."""
    transpose: Callable[[Tensor], Tensor]
    """One-byte values [O, D] -> [D, O], contiguous."""
    by_row: bool = False
    """Whether each row has a program of its own: no other row decides how it is computed."""


_OF_A_LAYER = ("norm", "norm_backward", "swiglu", "swiglu_backward", "rotate")


def by_part(kernels: Kernels, parts: Parts) -> Kernels:
    """Return kernels that work on each part's rows by calls of their own: plain torch.

    A call on more rows is split among threads, and into vectors and their rest, at other places;
    which compiled code runs may depend on the calls before it.

    Args:
        kernels: Who does the work; with a program for each row they stay as they are.
        parts: See ``common.model.kernels.rows``.
    """
    if kernels.by_row or parts is None:
        return kernels
    if len(parts) == 2:
        return TORCH
    functions: dict[str, Any] = {
        name: partial(getattr(TORCH, name), parts=parts) for name in _OF_A_LAYER
    }
    return replace(TORCH, **functions)


def of_each_part(
    function: Callable[..., Any], parts: tuple[int, ...], rows: int, *arguments: Any
) -> Any:
    """Call a function for each part; returns its outputs, one part's rows after the other's.

    Args:
        function: Returns a tensor of rows, or a tuple of such.
        parts: Row offsets.
        rows: How many of the arguments hold rows.
        *arguments: Of the function.

    >>> of_each_part(lambda x, y: x + y, (0, 1, 3), 1, torch.arange(3), 5).tolist()
    [5, 6, 7]
    """
    found = [
        function(*(one[start:stop] for one in arguments[:rows]), *arguments[rows:])
        for start, stop in itertools.pairwise(parts)
    ]
    if isinstance(found[0], Tensor):
        return torch.cat(found)
    return tuple(torch.cat(outputs) for outputs in zip(*found, strict=True))


def _row_blocks(x: Tensor, parts: Parts) -> list[slice]:
    """Return the rows that are worked on at a time, never of two parts."""
    most = _CPU_ROWS if x.device.type == "cpu" else max(1, len(x))
    return [
        slice(start, min(start + most, stop))
        for begin, stop in itertools.pairwise(parts or (0, len(x)))
        for start in range(begin, stop, most)
    ]


def _norm(
    x_TD: Tensor, beside_TD: Tensor | None, weight_D: Tensor, epsilon: float, parts: Parts = None
) -> tuple[Tensor, Tensor, Tensor]:
    out_TD = torch.empty_like(x_TD)
    total_TD = x_TD if beside_TD is None else torch.empty_like(x_TD)
    rstd_T1 = torch.empty(len(x_TD), 1, dtype=torch.float32, device=x_TD.device)
    for rows in _row_blocks(x_TD, parts):
        if beside_TD is not None:
            torch.add(x_TD[rows], beside_TD[rows], out=total_TD[rows])
        wide = total_TD[rows].float()
        mean_square = wide.square().mean(1, keepdim=True)
        rstd_T1[rows] = mean_square.add_(epsilon).rsqrt_()
        # transformers rounds to the input's dtype before the weight; so do we.
        torch.mul((wide * rstd_T1[rows]).to(x_TD.dtype), weight_D, out=out_TD[rows])
    return out_TD, total_TD, rstd_T1


def _norm_backward(
    d_out_TD: Tensor,
    d_x_TD: Tensor,
    x_TD: Tensor,
    rstd_T1: Tensor,
    weight_D: Tensor,
    parts: Parts = None,
) -> Tensor:
    total_TD = torch.empty_like(x_TD)
    for rows in _row_blocks(x_TD, parts):
        normed = x_TD[rows] * rstd_T1[rows]
        d_normed = (d_out_TD[rows] * weight_D).float()
        inner = (d_normed * normed).mean(1, keepdim=True)
        d_normed.addcmul_(normed, inner, value=-1.0).mul_(rstd_T1[rows])
        torch.add(d_normed, d_x_TD[rows], out=d_normed)
        total_TD[rows] = d_normed
    return total_TD


def _swiglu(gate_TI: Tensor, up_TI: Tensor, parts: Parts = None) -> Tensor:
    out_TI = torch.empty_like(gate_TI)
    for rows in _row_blocks(gate_TI, parts):
        torch.mul(functional.silu(gate_TI[rows]), up_TI[rows], out=out_TI[rows])
    return out_TI


def _swiglu_backward(
    d_out_TI: Tensor, gate_TI: Tensor, up_TI: Tensor, parts: Parts = None
) -> tuple[Tensor, Tensor]:
    d_gate_TI, d_up_TI = torch.empty_like(gate_TI), torch.empty_like(up_TI)
    for rows in _row_blocks(gate_TI, parts):
        gate, d_out = gate_TI[rows], d_out_TI[rows]
        d_gate_TI[rows] = silu_backward(d_out * up_TI[rows], gate)
        torch.mul(functional.silu(gate), d_out, out=d_up_TI[rows])
    return d_gate_TI, d_up_TI


def _rotate(
    q_THE: Tensor, k_TGE: Tensor, cos_TE: Tensor, sin_TE: Tensor, back: bool, parts: Parts = None
) -> tuple[Tensor, Tensor]:
    # A rotation's transpose is the rotation by the opposite angle.
    sign = -1.0 if back else 1.0
    q_THE, k_TGE = (_rotated(x, cos_TE, sin_TE, sign, parts) for x in (q_THE, k_TGE))
    return q_THE, k_TGE


def _rotated(x_THE: Tensor, cos_TE: Tensor, sin_TE: Tensor, sign: float, parts: Parts) -> Tensor:
    half = x_THE.shape[-1] // 2
    out_THE = torch.empty_like(x_THE)
    for rows in _row_blocks(x_THE, parts):
        cos_T1F, sin_T1F = cos_TE[rows, None, :half], sin_TE[rows, None, :half]
        first, second = x_THE[rows, :, :half], x_THE[rows, :, half:]
        out = out_THE[rows]
        torch.mul(first, cos_T1F, out=out[..., :half]).addcmul_(second, sin_T1F, value=-sign)
        torch.mul(second, cos_T1F, out=out[..., half:]).addcmul_(first, sin_T1F, value=sign)
    return out_THE


def _losses(logits_CV: Tensor, labels_C1: Tensor, weights_C1: Tensor | None) -> Tensor:
    rows = len(logits_CV)
    if logits_CV.device.type == "cpu":
        rows = max(1, _CPU_ROWS_BYTES // (4 * logits_CV.shape[1]))
    losses_C = torch.empty(len(logits_CV), dtype=torch.float32, device=logits_CV.device)
    for start in range(0, len(logits_CV), max(1, rows)):
        some = slice(start, start + rows)
        losses_C[some] = _losses_of_rows(
            logits_CV[some], labels_C1[some], None if weights_C1 is None else weights_C1[some]
        )
    return losses_C


def _losses_of_rows(logits_RV: Tensor, labels_R1: Tensor, weights_R1: Tensor | None) -> Tensor:
    wide_RV = logits_RV.float()
    softmax_RV = wide_RV.softmax(1)
    # The log-sum-exp, read off where the softmax is largest and so cannot have underflown; to ask
    # where that is (`max`) would take as long as all the rest.
    lse_R1 = wide_RV.amax(1, keepdim=True) - softmax_RV.amax(1, keepdim=True).log()
    losses_R = (lse_R1 - wide_RV.gather(1, labels_R1)).squeeze(1)
    if weights_R1 is not None:
        softmax_RV.scatter_add_(1, labels_R1, -torch.ones_like(weights_R1))
        logits_RV.copy_(softmax_RV.mul_(weights_R1))
    return losses_R


def _quantise(x_TD: Tensor, factors_D: Tensor | None) -> tuple[Tensor, Tensor]:
    wide_TD = x_TD.float() if factors_D is None else x_TD.float() * factors_D
    scales_T1 = (wide_TD.abs().amax(1, keepdim=True) / FP8_LARGEST).clamp_min(FP8_SMALLEST_SCALE)
    values_TD = (wide_TD / scales_T1).clamp(-FP8_LARGEST, FP8_LARGEST).to(torch.float8_e4m3fn)
    return values_TD, scales_T1


def _transpose(values_OD: Tensor) -> Tensor:
    return values_OD.view(torch.uint8).T.contiguous().view(values_OD.dtype)


TORCH = Kernels(
    norm=_norm,
    norm_backward=_norm_backward,
    swiglu=_swiglu,
    swiglu_backward=_swiglu_backward,
    rotate=_rotate,
    losses=_losses,
    quantise=_quantise,
    transpose=_transpose,
)
"""Plain torch operations; on a CPU in blocks that stay in its cache."""
