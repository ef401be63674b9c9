"""Elementwise work of a step compiled by torch for a CPU: each function one loop over its tensors.

Plain torch reads and writes them once for every operation. torch keeps what it has compiled on disk
(``TORCHINDUCTOR_CACHE_DIR``): a machine's first step waits for the C++ compiler, a process's for
seconds.

Arithmetic is fp32 throughout; results are rounded once, to the dtype of the input.

Shapes: T packed tokens, D hidden width, I MLP width, H heads, G key/value heads, E head width.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from common.model.kernels.elementwise import TORCH, Kernels


def _norm(x_TD: Tensor, weight_D: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    wide = x_TD.float()
    rstd_T1 = (wide.square().mean(1, keepdim=True) + epsilon).rsqrt()
    return (wide * rstd_T1 * weight_D.float()).to(x_TD.dtype), rstd_T1


def _sum_norm(
    x_TD: Tensor, beside_TD: Tensor, weight_D: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    total_TD = x_TD + beside_TD
    out_TD, rstd_T1 = _norm(total_TD, weight_D, epsilon)
    return out_TD, total_TD, rstd_T1


def _norm_backward(
    d_out_TD: Tensor, d_x_TD: Tensor, x_TD: Tensor, rstd_T1: Tensor, weight_D: Tensor
) -> Tensor:
    normed = x_TD.float() * rstd_T1
    d_normed = d_out_TD.float() * weight_D.float()
    inner = (d_normed * normed).mean(1, keepdim=True)
    return ((d_normed - normed * inner) * rstd_T1 + d_x_TD.float()).to(x_TD.dtype)


def _swiglu(gate_TI: Tensor, up_TI: Tensor) -> Tensor:
    return (functional.silu(gate_TI.float()) * up_TI.float()).to(gate_TI.dtype)


def _swiglu_backward(d_out_TI: Tensor, gate_TI: Tensor, up_TI: Tensor) -> tuple[Tensor, Tensor]:
    gate, d_out = gate_TI.float(), d_out_TI.float()
    share = gate.sigmoid()
    slope = share * (1.0 + gate * (1.0 - share))
    dtype = gate_TI.dtype
    return (d_out * up_TI.float() * slope).to(dtype), (d_out * gate * share).to(dtype)


def _rotate(
    q_THE: Tensor, k_TGE: Tensor, cos_TE: Tensor, sin_TE: Tensor, back: bool
) -> tuple[Tensor, Tensor]:
    half, sign = cos_TE.shape[1] // 2, -1.0 if back else 1.0
    cos_T1F, sin_T1F = cos_TE[:, None, :half].float(), sin_TE[:, None, :half].float() * sign

    def turned(x_THE: Tensor) -> Tensor:
        first, second = x_THE[..., :half].float(), x_THE[..., half:].float()
        parts = (first * cos_T1F - second * sin_T1F, second * cos_T1F + first * sin_T1F)
        return torch.cat(parts, -1).to(x_THE.dtype)

    return turned(q_THE), turned(k_TGE)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    # Each layout of the arguments, and whether they want gradients, would be compiled by itself.
    return _compiled(function)(
        *(one.detach().contiguous() if isinstance(one, Tensor) else one for one in arguments)
    )


def _either_norm(
    x_TD: Tensor, beside_TD: Tensor | None, weight_D: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    if beside_TD is None:
        out_TD, rstd_T1 = _call(_norm, x_TD, weight_D, epsilon)
        return out_TD, x_TD, rstd_T1
    found: tuple[Tensor, Tensor, Tensor] = _call(_sum_norm, x_TD, beside_TD, weight_D, epsilon)
    return found


COMPILED: Kernels = replace(
    TORCH,
    norm=_either_norm,
    norm_backward=partial(_call, _norm_backward),
    swiglu=partial(_call, _swiglu),
    swiglu_backward=partial(_call, _swiglu_backward),
    rotate=partial(_call, _rotate),
)
"""For CPUs."""
