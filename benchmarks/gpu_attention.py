"""Attention alone by the length of segments, on each kernel; for `gpu_paper_run.py`."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from gpu_measure import patched, samples, step_times

from common.model.kernels import attention
from common.model.session import DTYPES
from common.text.batches import pack

if TYPE_CHECKING:
    from gpu_paper_run import Run

PARTS = (16, 8, 4, 2, 1)


def by_length(run: "Run") -> dict[str, Any]:
    """Time attention, forward and backward, over as many tokens as a step has.

    Segments are about as long as each other, from a sixteenth of the longest sample on; neighbours
    differ by a token, for those of one length are one call. cuDNN goes segment by segment, however
    short they are; what the product does is decided by ``CUDNN_TOKENS``, which a card's row
    ``cudnn wins from`` is to be held against.
    """
    dtype = DTYPES[run.dtype]
    first, *others = available(run.device, dtype)
    rows = []
    for length in sorted({max(8, run.options.length // part) for part in PARTS}):
        segments = max(1, run.options.batch * run.options.length // length)
        row: dict[str, float] = {"length": length, "segments": segments}
        for kernel in (first, *others):
            lengths = [length - place % 2 for place in range(segments)]
            call = attention_call(run, kernel, lengths, dtype)
            with patched(attention, "CUDNN_TOKENS", 0):
                row[kernel] = step_times(call, run.options.steps, run.device)["seconds"]
        rows.append(row)
    return {
        "seconds": rows,
        f"{first} wins from": wins_from(
            (row["length"], row[first], min(row[kernel] for kernel in others)) for row in rows
        ),
        "CUDNN_TOKENS": attention.CUDNN_TOKENS,
    }


def available(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Return the kernels that run here, the product's first choice before the others.

    On a card without ``eager`` and ``sdpa``, which no card that has another chooses.
    """
    names = [one for one in attention.KERNELS if not attention.obstacle(one, device, dtype)]
    packed = [one for one in names if one not in ("sdpa", "eager")]
    return packed if len(packed) > 1 else names


def attention_call(
    run: "Run", kernel: str, lengths: list[int], dtype: torch.dtype
) -> Callable[[], None]:
    """Return a call that attends over random samples with the backbone's heads, and back."""
    shape = run.shape
    batch = pack(samples(lengths, shape.vocabulary))
    packing = attention.Packing.of(batch, kernel, run.device)
    generator = torch.Generator(run.device).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=run.device, dtype=dtype)
    q_THE, k_TGE, v_TGE = (
        draw(sum(lengths), heads, shape.head_dim).requires_grad_()
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    )
    back_THE = torch.ones_like(q_THE)

    def call() -> None:
        out_THE = attention.attend(q_THE, k_TGE, v_TGE, shape.head_dim**-0.5, packing)
        torch.autograd.grad(out_THE, (q_THE, k_TGE, v_TGE), back_THE)

    return call


def wins_from(rows: Iterable[tuple[float, float, float]]) -> float | None:
    """Return the length from which on the first of two contestants is always the faster.

    Args:
        rows: Length, the first's seconds and the second's, by rising length.
    """
    start = None
    for length, first, second in rows:
        if first >= second:
            start = None
        elif start is None:
            start = length
    return start
