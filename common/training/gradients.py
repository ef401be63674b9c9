"""Where a step's gradient comes from: the one seam that privacy replaces.

The training loop asks a ``GradientSource`` to fill the adapter's flat gradient for a global step;
which samples, which loss and which noise is the source's business. ``BatchGradient`` is the plain
one. ``add_unit_gradients`` is what a private source builds on.
"""

import contextlib
import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from common.config import TrainConfig
from common.model.session import Session
from common.text.batches import Encoded, PackedBatch, pack
from common.training.loss import weighted_cross_entropy
from common.training.schedule import batch_order


class StepLoss(NamedTuple):
    """What one gradient tells the loop."""

    loss_sum: float | None
    """Sum of token losses; None where it may not be told (privacy)."""
    label_tokens: int
    packed_tokens: int


class GradientSource(Protocol):
    """Fills ``session.adapter.flat_grad`` for one global step."""

    def __call__(self, session: Session, step: int) -> StepLoss:
        """Overwrite the flat gradient and report the loss."""
        ...


_StepBatches = tuple[list[PackedBatch], int]


class BatchGradient:
    """The gradient of the mean loss per label token over a step's batch.

    A step has ``accumulation`` micro-batches of ``batch_size`` samples; all its label tokens
    weigh the same, however they are divided.
    """

    def __init__(self, dataset: Sequence[Encoded], config: TrainConfig, stream: str) -> None:
        self._dataset, self._config, self._stream = dataset, config, stream
        self._ahead: dict[int, _StepBatches] = {}

    def __call__(self, session: Session, step: int) -> StepLoss:
        """Compute the gradient of global step ``step``."""
        ready = self._ahead.pop(step, None)
        batches, label_tokens = self._packed(step) if ready is None else ready
        session.adapter.flat_grad.zero_()
        loss_sums, packed_tokens = [], 0
        for batch in batches:
            moved = batch.to(session.torch_device)
            weights_N = torch.full_like(moved.labels_N, 1.0 / label_tokens, dtype=torch.float32)
            losses_N = _backward(session, moved, weights_N)
            loss_sums.append(losses_N.sum(dtype=torch.float64))
            packed_tokens += batch.tokens
        # A GPU is still computing: the time until the sums are known is the host's to use.
        with contextlib.suppress(Exception):  # raised again where that step is asked for
            self._ahead = {step + 1: self._packed(step + 1)}
        return StepLoss(math.fsum(map(float, loss_sums)), label_tokens, packed_tokens)

    def _packed(self, step: int) -> _StepBatches:
        """Return a step's micro-batches on the host, and how many labels they have together."""
        config = self._config
        count = config.batch_size * config.accumulation
        first, size = step * count, len(self._dataset)
        places = batch_order(config.seed, self._stream, size, first, count)
        samples = [
            self._dataset[place].in_epoch(turn // size)
            for turn, place in enumerate(places, start=first)
        ]
        batches = [
            pack(samples[start : start + config.batch_size])
            for start in range(0, count, config.batch_size)
        ]
        return batches, sum(sample.label_tokens for sample in samples)


def add_unit_gradients(
    session: Session,
    batch: PackedBatch,
    rows: Sequence[int],
    out_UP: Tensor,
    *,
    apart: bool = False,
) -> Tensor:
    """Add the gradient of every segment's own mean loss to its unit's row, in one backward pass.

    The loss of a segment is its token mean, so it does not depend on its neighbours.

    Args:
        session: The open session; ``flat_grad`` is left alone.
        batch: A packed batch, on any device.
        rows: Row of each segment in ``out_UP``; segments of one patient share a row.
        out_UP: [U, P] fp32 on the session's device, in the order of ``adapter.flat``.
        apart: Compute each segment by the same calls as if it were alone, so that its gradient
            has the same bits whatever is beside it.

    Returns:
        [S] fp32 token-mean loss of each segment. A private run must not release it.
    """
    # Counted where the batch lies: on a GPU, counting waits for everything before it.
    counts_S = torch.bincount(batch.label_segments_N, minlength=batch.segments)
    tokens_S = counts_S.float().to(session.torch_device)
    batch = batch.to(session.torch_device)
    weights_N = (1.0 / tokens_S)[batch.label_segments_N]
    places = session.adapter.unit_gradients(
        batch.cu_seqlens, rows, out_UP, state_bounds=batch.state_bounds
    )
    with places:
        losses_N = _backward(session, batch, weights_N, apart=apart)
    return torch.zeros_like(tokens_S).index_add_(0, batch.label_segments_N, losses_N * weights_N)


def _backward(
    session: Session, batch: PackedBatch, weights_N: Tensor, *, apart: bool = False
) -> Tensor:
    """Run one forward and backward pass; returns the token losses [N]."""
    total, losses_N = weighted_cross_entropy(
        session.label_states(batch, apart=apart),
        session.model.lm_head.weight,
        batch.labels_N,
        weights_N,
        session.functions,
        batch.label_bounds if apart else None,
    )
    torch.autograd.backward(total)
    return losses_N
