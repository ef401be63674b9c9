"""Automatic choices that say why."""

import itertools
import re
from dataclasses import dataclass
from functools import cache
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Choice(Generic[T]):
    """A value that the program chose, and the reason."""

    value: T
    reason: str


KERNEL_NAMES = ("cudnn", "flash-attn-3", "flash-attn", "torch-flash", "sdpa", "eager")
DTYPE_NAMES = ("fp32", "bf16")
ASKED, FASTEST = "asked for", "the fastest here"
GPU_HAS_BF16, GPU_LACKS_BF16 = "the GPU computes in bf16", "the GPU has no bf16 arithmetic"
AMX, AVX = "the processor has AMX", "the processor has AVX512-BF16"
NEITHER = "the processor has neither AMX nor AVX512-BF16"
DTYPE_REASONS = frozenset({ASKED, GPU_HAS_BF16, GPU_LACKS_BF16, AMX, AVX, NEITHER})
"""Every reason for a dtype: they travel, and no other text does."""
NO_FLASH_ATTN = "package flash-attn is not installed"
NO_FLASH_ATTN_3 = "FlashAttention-3 (module flash_attn_interface) is not installed"
NOT_CUDA = "needs a CUDA device, not cpu"
NOT_HALF = "needs bf16 or fp16, not float32"
CAPABILITY_8, CAPABILITY_9 = "needs compute capability 8.0", "needs compute capability 9.0"
HOPPER = "needs compute capability 9.x"
OTHER_GRADIENT = "tried, and the gradient of the keys has another shape"
NO_VARLEN = "this torch has no torch.nn.attention.varlen"


@cache
def attention_reasons() -> frozenset[str]:
    """Return the reasons for an attention kernel that travel; no other text does.

    >>> "asked for" in attention_reasons(), "because I say so" in attention_reasons()
    (True, False)
    """
    common = (NOT_CUDA, NOT_HALF, CAPABILITY_8)
    own = (
        (CAPABILITY_9, OTHER_GRADIENT),
        (HOPPER, NO_FLASH_ATTN_3, OTHER_GRADIENT),
        (NO_FLASH_ATTN, OTHER_GRADIENT),
        (NO_VARLEN,),
    )
    obstacles = [
        [f"{kernel}: {reason}" for reason in (*common, *reasons)]
        for kernel, reasons in zip(KERNEL_NAMES, own, strict=False)
    ]
    passed = [
        "; ".join(chain)
        for count in range(1, len(obstacles) + 1)
        for chain in itertools.product(*obstacles[:count])
    ]
    return frozenset({ASKED, FASTEST, *(f"{FASTEST} ({one})" for one in passed)})


def travelling_reason(reason: str) -> str:
    """Return a reason for a kernel as it may travel: what torch says of a refused one stays here.

    >>> travelling_reason("the fastest here (cudnn: tried, and refused (no engine))")
    'the fastest here'
    """
    return reason if reason in attention_reasons() else reason.partition(" (")[0]


def is_device(name: str) -> bool:
    """Tell whether a device can be chosen under this name.

    >>> is_device("cuda:1"), is_device("cpu:0"), is_device("cuda:1 and more")
    (True, False, False)
    """
    return re.fullmatch(r"cpu|cuda(:[0-9]{1,2})?", name, re.ASCII) is not None
