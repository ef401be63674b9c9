"""Triton kernels for the elementwise work of a step: each reads and writes its tensors once.

Arithmetic is fp32 throughout; results are rounded once, to the dtype of the input.

Shapes: T packed tokens, D hidden width, I MLP width, H heads, G key/value heads, E head width,
R rows, V vocabulary, N values of a flat tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from common.model.kernels.elementwise import FP8_LARGEST, FP8_SMALLEST_SCALE, Kernels

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for CPUs comes without it; `choose_kernels` never names it there
    triton = None
_jit: Any = triton.jit if triton else lambda kernel: kernel

_FLAT_BLOCK = 2048
_LOGITS_BLOCK = 8192
_TILE = 64


@_jit
def _norm_kernel(  # type: ignore[no-untyped-def]
    x, beside, weight, out, total, rstd, width, epsilon, added: tl.constexpr, block: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < width
    value = tl.load(x + row * width + columns, mask=inside, other=0.0)
    wide = value.to(tl.float32)
    if added:
        other = tl.load(beside + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        value = (wide + other).to(value.dtype)
        tl.store(total + row * width + columns, value, mask=inside)
        wide = value.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / width + epsilon)
    gain = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    # transformers rounds to the input's dtype before the weight; so do we.
    normed = (wide * scale).to(value.dtype).to(tl.float32)
    tl.store(out + row * width + columns, (normed * gain).to(value.dtype), mask=inside)
    tl.store(rstd + row, scale)


@_jit
def _norm_backward_kernel(  # type: ignore[no-untyped-def]
    d_out, d_residual, x, rstd, weight, total, width, block: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < width
    places = row * width + columns
    value = tl.load(x + places, mask=inside, other=0.0)
    scale = tl.load(rstd + row)
    normed = value.to(tl.float32) * scale
    gain = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    d_normed = tl.load(d_out + places, mask=inside, other=0.0).to(tl.float32) * gain
    inner = tl.sum(d_normed * normed, 0) / width
    beside = tl.load(d_residual + places, mask=inside, other=0.0).to(tl.float32)
    found = (d_normed - normed * inner) * scale + beside
    tl.store(total + places, found.to(value.dtype), mask=inside)


@_jit
def _swiglu_kernel(gate, up, out, size, block: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    places = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = places < size
    value = tl.load(gate + places, mask=inside, other=0.0)
    wide = value.to(tl.float32)
    share = 1.0 / (1.0 + tl.exp(-wide))
    other = tl.load(up + places, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + places, (wide * share * other).to(value.dtype), mask=inside)


@_jit
def _swiglu_backward_kernel(  # type: ignore[no-untyped-def]
    d_out, gate, up, d_gate, d_up, size, block: tl.constexpr
) -> None:
    places = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = places < size
    value = tl.load(gate + places, mask=inside, other=0.0)
    wide = value.to(tl.float32)
    share = 1.0 / (1.0 + tl.exp(-wide))
    other = tl.load(up + places, mask=inside, other=0.0).to(tl.float32)
    above = tl.load(d_out + places, mask=inside, other=0.0).to(tl.float32)
    slope = share * (1.0 + wide * (1.0 - share))
    tl.store(d_gate + places, (above * other * slope).to(value.dtype), mask=inside)
    tl.store(d_up + places, (above * wide * share).to(value.dtype), mask=inside)


@_jit
def _rotate_kernel(  # type: ignore[no-untyped-def]
    q, k, cos, sin, q_out, k_out, q_heads, k_heads, half, sign, block_heads: tl.constexpr,
    block_half: tl.constexpr,
) -> None:  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block_half)
    inside = columns < half
    cosine = tl.load(cos + token * 2 * half + columns, mask=inside, other=0.0).to(tl.float32)
    sine = tl.load(sin + token * 2 * half + columns, mask=inside, other=0.0).to(tl.float32) * sign
    heads = tl.arange(0, block_heads)
    offsets = heads[:, None] * 2 * half + columns[None, :]
    for part in tl.static_range(2):
        if part == 0:
            source, target, count = q, q_out, q_heads
        else:
            source, target, count = k, k_out, k_heads
        there = (heads[:, None] < count) & inside[None, :]
        start = token * count * 2 * half
        first = tl.load(source + start + offsets, mask=there, other=0.0)
        second = tl.load(source + start + offsets + half, mask=there, other=0.0)
        wide, other = first.to(tl.float32), second.to(tl.float32)
        turned = wide * cosine[None, :] - other * sine[None, :]
        turned_other = other * cosine[None, :] + wide * sine[None, :]
        tl.store(target + start + offsets, turned.to(first.dtype), mask=there)
        tl.store(target + start + offsets + half, turned_other.to(first.dtype), mask=there)


@_jit
def _losses_kernel(  # type: ignore[no-untyped-def]
    logits,
    labels,
    weights,
    losses,
    vocabulary: tl.constexpr,
    weighted: tl.constexpr,
    block: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * vocabulary
    label = tl.load(labels + row)
    peak = -float("inf")
    total = 0.0
    for first in range(0, vocabulary, block):
        columns = first + tl.arange(0, block)
        wide = tl.load(start + columns, mask=columns < vocabulary, other=-float("inf"))
        wide = wide.to(tl.float32)
        higher = tl.maximum(peak, tl.max(wide, 0))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(wide - higher), 0)
        peak = higher
    lse = peak + tl.log(total)
    tl.store(losses + row, lse - tl.load(start + label).to(tl.float32))
    if weighted:
        # Every thread has read the label's logit before any of them is overwritten.
        tl.debug_barrier()
        weight = tl.load(weights + row)
        for first in range(0, vocabulary, block):
            columns = first + tl.arange(0, block)
            value = tl.load(start + columns, mask=columns < vocabulary, other=-float("inf"))
            hit = tl.where(columns == label, 1.0, 0.0)
            found = (tl.exp(value.to(tl.float32) - lse) - hit) * weight
            tl.store(start + columns, found.to(value.dtype), mask=columns < vocabulary)


@_jit
def _quantise_kernel(  # type: ignore[no-untyped-def]
    x, factors, values, scales, width, largest, smallest, weighted: tl.constexpr,
    block: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < width
    wide = tl.load(x + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    if weighted:
        wide = wide * tl.load(factors + columns, mask=inside, other=0.0)
    scale = tl.maximum(tl.max(tl.abs(wide), 0) / largest, smallest)
    found = tl.minimum(tl.maximum(wide / scale, -largest), largest)
    tl.store(values + row * width + columns, found.to(values.dtype.element_ty), mask=inside)
    tl.store(scales + row, scale)


@_jit
def _transpose_kernel(source, target, rows, width, block: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    across = tl.cdiv(width, block)
    place = tl.program_id(0)
    down = (place // across) * block + tl.arange(0, block)
    along = (place % across) * block + tl.arange(0, block)
    inside = (down[:, None] < rows) & (along[None, :] < width)
    tile = tl.load(source + down[:, None].to(tl.int64) * width + along[None, :], mask=inside)
    there = target + along[:, None].to(tl.int64) * rows + down[None, :]
    tl.store(there, tl.trans(tile), mask=tl.trans(inside))


def _warps(block: int) -> int:
    return min(16, max(4, block // 512))


def _norm(
    x_TD: Tensor, beside_TD: Tensor | None, weight_D: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    x_TD = x_TD.contiguous()
    rows, width = x_TD.shape
    out_TD = torch.empty_like(x_TD)
    added = beside_TD is not None
    beside_TD = x_TD if beside_TD is None else beside_TD.contiguous()
    total_TD = torch.empty_like(x_TD) if added else x_TD
    rstd_T1 = torch.empty(rows, 1, dtype=torch.float32, device=x_TD.device)
    arguments = (x_TD, beside_TD, weight_D, out_TD, total_TD, rstd_T1, width, epsilon)
    _launch(_norm_kernel, rows, *arguments, added=added, block=triton.next_power_of_2(width))
    return out_TD, total_TD, rstd_T1


def _norm_backward(
    d_out_TD: Tensor, d_x_TD: Tensor, x_TD: Tensor, rstd_T1: Tensor, weight_D: Tensor
) -> Tensor:
    tensors = [t.contiguous() for t in (d_out_TD, d_x_TD, x_TD, rstd_T1, weight_D)]
    rows, width = x_TD.shape
    total_TD = torch.empty_like(tensors[2])
    block = triton.next_power_of_2(width)
    _launch(_norm_backward_kernel, rows, *tensors, total_TD, width, block=block)
    return total_TD


def _swiglu(gate_TI: Tensor, up_TI: Tensor) -> Tensor:
    gate_TI, up_TI = gate_TI.contiguous(), up_TI.contiguous()
    out_TI = torch.empty_like(gate_TI)
    size = gate_TI.numel()
    programs = triton.cdiv(size, _FLAT_BLOCK)
    _launch(_swiglu_kernel, programs, gate_TI, up_TI, out_TI, size, block=_FLAT_BLOCK)
    return out_TI


def _swiglu_backward(d_out_TI: Tensor, gate_TI: Tensor, up_TI: Tensor) -> tuple[Tensor, Tensor]:
    tensors = [t.contiguous() for t in (d_out_TI, gate_TI, up_TI)]
    d_gate_TI, d_up_TI = torch.empty_like(tensors[1]), torch.empty_like(tensors[2])
    size = gate_TI.numel()
    programs = triton.cdiv(size, _FLAT_BLOCK)
    arguments = (*tensors, d_gate_TI, d_up_TI, size)
    _launch(_swiglu_backward_kernel, programs, *arguments, block=_FLAT_BLOCK)
    return d_gate_TI, d_up_TI


def _rotate(
    q_THE: Tensor, k_TGE: Tensor, cos_TE: Tensor, sin_TE: Tensor, back: bool
) -> tuple[Tensor, Tensor]:
    q_THE, k_TGE, cos_TE, sin_TE = (t.contiguous() for t in (q_THE, k_TGE, cos_TE, sin_TE))
    q_out, k_out = torch.empty_like(q_THE), torch.empty_like(k_TGE)
    tokens, q_heads, width = q_THE.shape
    k_heads, half = k_TGE.shape[1], width // 2
    _launch(
        _rotate_kernel,
        tokens,
        *(q_THE, k_TGE, cos_TE, sin_TE, q_out, k_out),
        *(q_heads, k_heads, half, -1.0 if back else 1.0),
        block_heads=triton.next_power_of_2(max(q_heads, k_heads)),
        block_half=triton.next_power_of_2(half),
    )
    return q_out, k_out


def _losses(logits_RV: Tensor, labels_R1: Tensor, weights_R1: Tensor | None) -> Tensor:
    if not logits_RV.is_contiguous():
        raise ValueError("the logits are overwritten, and so must be contiguous")
    rows, vocabulary = logits_RV.shape
    losses_R = torch.empty(rows, dtype=torch.float32, device=logits_RV.device)
    weighted = weights_R1 is not None
    weights = weights_R1.contiguous() if weights_R1 is not None else losses_R
    block = min(_LOGITS_BLOCK, triton.next_power_of_2(vocabulary))
    arguments = (logits_RV, labels_R1.contiguous(), weights, losses_R)
    constants = {"vocabulary": vocabulary, "weighted": weighted, "block": block}
    _launch(_losses_kernel, rows, *arguments, **constants)
    return losses_R


def _quantise(x_TD: Tensor, factors_D: Tensor | None) -> tuple[Tensor, Tensor]:
    x_TD = x_TD.contiguous()
    rows, width = x_TD.shape
    values_TD = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=x_TD.device)
    scales_T1 = torch.empty(rows, 1, dtype=torch.float32, device=x_TD.device)
    factors = scales_T1 if factors_D is None else factors_D.contiguous()
    arguments = (x_TD, factors, values_TD, scales_T1, width, FP8_LARGEST, FP8_SMALLEST_SCALE)
    weighted, block = factors_D is not None, triton.next_power_of_2(width)
    _launch(_quantise_kernel, rows, *arguments, weighted=weighted, block=block)
    return values_TD, scales_T1


def _transpose(values_OD: Tensor) -> Tensor:
    rows, width = values_OD.shape
    turned_DO = torch.empty(width, rows, dtype=torch.uint8, device=values_OD.device)
    block = _TILE
    programs = triton.cdiv(rows, block) * triton.cdiv(width, block)
    source = values_OD.contiguous().view(torch.uint8)
    _launch(_transpose_kernel, programs, source, turned_DO, rows, width, block=block)
    return turned_DO.view(values_OD.dtype)


def _launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Run one program per row or block, on the device where the tensors are."""
    if not programs:
        return
    widest = max(value for name, value in constants.items() if name.startswith("block"))
    device = arguments[0].device
    if device.type != "cuda":  # Triton's interpreter
        kernel[(programs,)](*arguments, **constants)
    elif device.index == torch.cuda.current_device():
        kernel[(programs,)](*arguments, **constants, num_warps=_warps(widest))
    else:
        with torch.cuda.device(device):
            kernel[(programs,)](*arguments, **constants, num_warps=_warps(widest))


TRITON = Kernels(
    norm=_norm,
    norm_backward=_norm_backward,
    swiglu=_swiglu,
    swiglu_backward=_swiglu_backward,
    rotate=_rotate,
    losses=_losses,
    quantise=_quantise,
    transpose=_transpose,
    by_row=True,
)
"""For CUDA devices (and, under ``TRITON_INTERPRET=1``, for tests on a CPU)."""
