"""Weights in nf4 by bitsandbytes (Dettmers et al., 2023, arXiv 2305.14314).

Shapes: D input width, O output width.
"""

import functools
import importlib.util
import logging
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

NF4_BLOCK, NF4_SCALES = 64, 256
"""Weights that share a scale; scales (of a byte) that share one of theirs (in fp32)."""


@dataclass(frozen=True, kw_only=True)
class Nf4Weight:
    """A quantised weight [O, D] in bitsandbytes' blocks, with its state.

    Blocks run over rows. It is handed over a block a row: for other widths than multiples of a
    block, bitsandbytes on a CPU (0.50.2) dequantises with the scales of other blocks.
    """

    blocks: Tensor
    state: Any
    shape: torch.Size

    @classmethod
    def of(cls, weight_OD: Tensor) -> "Nf4Weight":
        """Quantise a weight; the scales of its blocks are quantised too."""
        flat = weight_OD.detach().flatten()
        if rest := -len(flat) % NF4_BLOCK:
            flat = functional.pad(flat, (0, rest))
        blocks, state = blockwise().quantize_4bit(
            flat.view(-1, NF4_BLOCK),
            blocksize=NF4_BLOCK,
            compress_statistics=True,
            quant_type="nf4",
        )
        return cls(blocks=blocks, state=state, shape=weight_OD.shape)

    def dense(self) -> Tensor:
        """Return it in the dtype that it had, as it is used."""
        padded: Tensor = blockwise().dequantize_4bit(self.blocks, self.state)
        return padded.flatten()[: self.shape.numel()].view(self.shape)

    def float(self) -> Tensor:
        """Return it in fp32, as it is used."""
        return self.dense().float()


@functools.cache
def blockwise() -> Any:
    """Return ``bitsandbytes.functional``, imported without what its CPU backend does besides.

    On a processor with AVX-512 it asks a package ``kernels``, where there is one, to fetch compiled
    code from the Hugging Face hub, and logs that there is none (0.50.2).

    Raises:
        ImportError: If bitsandbytes is not installed.
    """
    noisy, modules = logging.getLogger("bitsandbytes.backends.cpu.ops"), vars(sys)["modules"]
    level, there = noisy.level, "kernels" in modules
    noisy.setLevel(logging.CRITICAL)
    try:
        modules.setdefault("kernels", None)  # which makes its import fail
        from bitsandbytes import functional
    finally:
        noisy.setLevel(level)
        if not there:
            del modules["kernels"]
    return functional


def nf4_obstacle() -> str:
    """Say why weights cannot be in nf4 here, or return nothing."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return "package bitsandbytes is not installed"
    return ""
