"""Attention over packed samples: no token sees another sample, on any kernel.

One name, ``fedrx``, is registered with transformers. A call that carries ``packing`` is a packed
training batch and runs on the chosen kernel; any other call is generation with a key/value cache
and runs on transformers' own SDPA with its masks, or by ``token_attention`` on some CPUs.

Shapes: H query heads, G key/value heads, E head width, T packed tokens, S segments.
"""

import importlib.util
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from common.choice import (
    ASKED,
    CAPABILITY_8,
    FASTEST,
    KERNEL_NAMES,
    NO_FLASH_ATTN,
    NO_VARLEN,
    NOT_CUDA,
    NOT_HALF,
    Choice,
)
from common.errors import SettingError
from common.model.kernels import attention_cuda
from common.model.kernels.attention_cpu import (
    attends_by_products,
    packed_attention,
    token_attention,
)
from common.model.kernels.rows import Parts
from common.provenance import pip_install

if TYPE_CHECKING:
    from common.text.batches import PackedBatch

KERNELS = KERNEL_NAMES
_REGISTERED = "fedrx"
_PACKAGES = {"flash-attn-3": "flash_attn_interface", "flash-attn": "flash_attn"}
"""Kernel -> the module of its package."""
# Mean segment length from which on cuDNN, segment by segment, beats one call over all of them.
CUDNN_TOKENS = 1024


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Where the segments of a packed batch are, and which kernel runs on them."""

    bounds: tuple[int, ...]
    """S + 1 token offsets on the host."""
    bounds_device: Tensor
    """The same as int32 on the device."""
    longest: int
    kernel: str
    segments: tuple["Packing", ...] = ()
    """Each segment as a batch of its own, where a segment's bits must not depend on others."""
    rows: Parts = None
    """Then also the rows that have products of their own (`common.model.kernels.rows`)."""
    rows_at: Parts = None
    """The same of the tokens before labels, once each."""

    @property
    def ends(self) -> attention_cuda.Ends:
        """The segments as kernels over varying lengths take them."""
        return self.bounds_device, self.bounds_device, self.longest, self.longest

    @classmethod
    def of(
        cls, batch: "PackedBatch", kernel: str, device: torch.device, *, apart: bool = False
    ) -> "Packing":
        """Describe one batch; the offsets are moved to the device once.

        Args:
            batch: The batch.
            kernel: One of ``KERNELS``.
            device: Where the backbone is.
            apart: Compute each segment by the same calls as if it were alone.
        """
        bounds = batch.cu_seqlens
        lengths = [stop - start for start, stop in itertools.pairwise(bounds)]

        def packing(bounds: tuple[int, ...], longest: int) -> Packing:
            offsets = torch.tensor(bounds, dtype=torch.int32).to(device)
            return cls(bounds=bounds, bounds_device=offsets, longest=longest, kernel=kernel)

        whole = packing(bounds, max(lengths))
        if not apart:
            return whole
        segments = tuple(packing((0, length), length) for length in lengths)
        return replace(whole, segments=segments, rows=bounds, rows_at=batch.state_bounds)


def choose_attention(requested: str, device: torch.device, dtype: torch.dtype) -> Choice[str]:
    """Choose the kernel for packed batches.

    Order: cuDNN (for batches of long segments; shorter ones go to the next kernel that runs
    here), FlashAttention-3, flash-attn, torch's own FlashAttention-2 (varlen), SDPA segment by
    segment, eager.

    Args:
        requested: ``auto`` or one of ``KERNELS``.
        device: Where the backbone is.
        dtype: Its arithmetic.

    Raises:
        UserError: If the requested kernel cannot run here.
    """
    if requested == "auto":
        passed = []
        for kernel in KERNELS:
            reason = obstacle(kernel, device, dtype)
            if not reason:
                break
            passed.append(f"{kernel}: {reason}")
        return Choice(kernel, FASTEST + (f" ({'; '.join(passed)})" if passed else ""))
    if requested not in KERNELS:
        raise SettingError(f"model.attention={requested!r}", allowed=", ".join(("auto", *KERNELS)))
    if reason := obstacle(requested, device, dtype):
        raise SettingError(
            f"model.attention={requested} cannot run here: {reason}",
            fix="set model.attention to auto"
            + (f", or {pip_install('flash-attn')}" if reason == NO_FLASH_ATTN else ""),
        )
    return Choice(requested, ASKED)


def register() -> str:
    """Make packed attention known to transformers; returns the name to set on the model."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_REGISTERED, _attention_forward)
    AttentionMaskInterface.register(_REGISTERED, AttentionMaskInterface()["sdpa"])
    return _REGISTERED


def obstacle(kernel: str, device: torch.device, dtype: torch.dtype) -> str:
    """Say why a kernel cannot run here, or return nothing."""
    if kernel in ("sdpa", "eager"):
        return ""
    if device.type != "cuda":
        return NOT_CUDA
    if dtype not in (torch.bfloat16, torch.float16):
        return NOT_HALF
    if torch.cuda.get_device_capability(device) < (8, 0):
        return CAPABILITY_8
    if kernel == "cudnn":
        return attention_cuda.cudnn_obstacle(device)
    if kernel in _PACKAGES:
        return attention_cuda.flash_attn_obstacle(_PACKAGES[kernel], device)
    if kernel == "torch-flash" and importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return NO_VARLEN
    return ""


def attend(q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, scaling: float, packing: Packing) -> Tensor:
    """Attend causally within each segment, on the chosen kernel; returns [T, H, E]."""
    call = _KERNEL_FUNCTIONS[packing.kernel]
    if len(packing.segments) < 2:
        return call(q_THE, k_TGE, v_TGE, scaling, packing)
    sizes = [one.longest for one in packing.segments]
    parts = (torch.split(t, sizes) for t in (q_THE, k_TGE, v_TGE))
    each = zip(*parts, packing.segments, strict=True)
    return torch.cat([call(q, k, v, scaling, one) for q, k, v, one in each])


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    packing: Packing | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers asks: [1, H, T, E] in, [1, T, H, E] out."""
    if packing is None:
        plain = attention_mask is None or attention_mask.dtype == torch.bool
        if plain and query.shape[2] == 1 and attends_by_products(query):
            return token_attention(query, key, value, scaling, attention_mask), None
        from transformers import AttentionInterface

        own = AttentionInterface()["sdpa"]
        return own(module, query, key, value, attention_mask, scaling=scaling, **rest)
    q_THE, k_TGE, v_TGE = (t[0].transpose(0, 1).contiguous() for t in (query, key, value))
    return attend(q_THE, k_TGE, v_TGE, scaling, packing)[None], None


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scaling: float, packing: Packing) -> Tensor:
    if q.device.type == "cpu":
        return packed_attention(q, k, v, scaling, packing.bounds)
    return attention_cuda.sdpa(q, k, v, scaling, packing.bounds)


def _eager(q: Tensor, k: Tensor, v: Tensor, scaling: float, packing: Packing) -> Tensor:
    # Segment by segment: in one product, a neighbour's weight of 0 times its NaN would be NaN.
    shared = q.shape[1] // k.shape[1]
    outputs = []
    for start, stop in itertools.pairwise(packing.bounds):
        q_part, k_part, v_part = (t[start:stop] for t in (q, k, v))
        k_part, v_part = (t.repeat_interleave(shared, 1) for t in (k_part, v_part))
        scores_HTT = q_part.transpose(0, 1) @ k_part.permute(1, 2, 0) * scaling
        future_TT = torch.ones(scores_HTT.shape[1:], dtype=torch.bool, device=q.device).triu(1)
        weights_HTT = scores_HTT.masked_fill(future_TT, -torch.inf).softmax(-1, torch.float32)
        out_HTE = weights_HTT.to(q.dtype) @ v_part.transpose(0, 1)
        outputs.append(out_HTE.transpose(0, 1))
    return torch.cat(outputs)


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, scaling: float, packing: Packing) -> Tensor:
    return attention_cuda.flash_attn(_PACKAGES[packing.kernel], q, k, v, scaling, packing.ends)


def _torch_flash(q: Tensor, k: Tensor, v: Tensor, scaling: float, packing: Packing) -> Tensor:
    return attention_cuda.varlen(q, k, v, scaling, packing.ends)


def _cudnn(q: Tensor, k: Tensor, v: Tensor, scaling: float, packing: Packing) -> Tensor:
    segments = len(packing.bounds) - 1
    if packing.bounds[-1] >= CUDNN_TOKENS * segments:
        return attention_cuda.cudnn(q, k, v, scaling, packing.bounds)
    kernel = _kernel_of_short_segments(q.device, q.dtype)
    return _KERNEL_FUNCTIONS[kernel](q, k, v, scaling, replace(packing, kernel=kernel))


@cache
def _kernel_of_short_segments(device: torch.device, dtype: torch.dtype) -> str:
    following = KERNELS[KERNELS.index("cudnn") + 1 :]
    return next(kernel for kernel in following if not obstacle(kernel, device, dtype))


_KERNEL_FUNCTIONS: dict[str, Callable[[Tensor, Tensor, Tensor, float, Packing], Tensor]] = {
    "cudnn": _cudnn,
    "flash-attn-3": _flash_attn,
    "flash-attn": _flash_attn,
    "torch-flash": _torch_flash,
    "sdpa": _sdpa,
    "eager": _eager,
}
