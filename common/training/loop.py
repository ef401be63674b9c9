"""The one training loop: what a hospital runs in a round is what the single-node mode runs.

The order of data and the learning rate are pure functions of the global step, so a run cut into
rounds, or resumed, takes the same steps as an uninterrupted one.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.config import TrainConfig
from common.errors import RunFailed, UserError
from common.model.session import Session
from common.text.batches import Encoded, PackedBatch, pack
from common.training.gradients import BatchGradient, GradientSource, StepLoss
from common.training.loss import LossSum, weighted_cross_entropy
from common.training.optimiser import FlatOptimizer, TrainState
from common.training.schedule import learning_rate

_VALIDATION_TOKENS = 8192


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One finished optimizer step."""

    step: int
    """Number of steps done, this one included."""
    loss: float | None
    """Mean loss per label token before the update; None where it may not be told."""
    gradient_norm: float | None
    """L2 norm before clipping; None where it may not be told."""
    learning_rate: float
    tokens: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class TrainMetrics:
    """Totals of one call of ``train``."""

    steps: int
    loss: LossSum | None
    """Token losses before each update, over the call; None where it may not be told."""
    tokens: int
    """Packed tokens, labelled or not."""
    seconds: float


def train(
    session: Session,
    dataset: Sequence[Encoded],
    config: TrainConfig,
    state: TrainState,
    *,
    steps: int,
    schedule_steps: int,
    stream: str,
    on_step: Callable[[StepReport], None] | None = None,
    source: GradientSource | None = None,
) -> TrainMetrics:
    """Take ``steps`` optimizer steps from ``state.step`` on.

    Args:
        session: Backbone and adapter; ``session.adapter`` is trained in place.
        dataset: Encoded samples.
        config: Optimizer, schedule, batch.
        state: Read, and updated in place after every call (also when a step fails or is
            interrupted: it then describes the last finished step).
        steps: Steps of this call.
        schedule_steps: Steps of the whole run, which the schedule decays over.
        stream: Name of the data order (the hospital's name).
        on_step: Called after each step.
        source: Where gradients come from; the plain batch gradient when None.

    Returns:
        Totals of this call.

    Raises:
        UserError: If there are no samples.
        RunFailed: If a loss or gradient is not finite; the adapter is as before that step.
    """
    if source is None:
        if not dataset:
            raise UserError("no training samples", fix="check the data and its splits")
        source = BatchGradient(dataset, config, stream)
    adapter = session.adapter
    optimizer = FlatOptimizer(adapter, config, state)
    results: list[StepLoss] = []
    started = time.perf_counter()
    try:
        for step in range(state.step, state.step + steps):
            step_started = time.perf_counter()
            result = source(session, step)
            norm = float(torch.linalg.vector_norm(adapter.flat_grad))
            if not math.isfinite(norm) or not math.isfinite(result.loss_sum or 0.0):
                raise RunFailed(
                    f"step {step + 1}: the loss or its gradient is not finite; the adapter was not "
                    "updated (lower train.learning-rate, or set train.max-grad-norm)"
                )
            if 0 < config.max_grad_norm < norm:
                adapter.flat_grad.mul_(config.max_grad_norm / norm)
            rate = learning_rate(config, step, schedule_steps)
            optimizer.step(rate)
            state.step = step + 1
            results.append(result)
            if on_step is not None:
                on_step(
                    StepReport(
                        step=step + 1,
                        loss=None
                        if result.loss_sum is None
                        else result.loss_sum / max(1, result.label_tokens),
                        gradient_norm=None if result.loss_sum is None else norm,
                        learning_rate=rate,
                        tokens=result.packed_tokens,
                        seconds=time.perf_counter() - step_started,
                    )
                )
    finally:
        state.optimizer = optimizer.tensors()
    loss_sums = [(one.loss_sum, one.label_tokens) for one in results if one.loss_sum is not None]
    return TrainMetrics(
        steps=steps,
        loss=_total(loss_sums) if len(loss_sums) == len(results) else None,
        tokens=sum(one.packed_tokens for one in results),
        seconds=time.perf_counter() - started,
    )


def validation_loss(
    session: Session, dataset: Sequence[Encoded], *, pack_tokens: int = _VALIDATION_TOKENS
) -> LossSum:
    """Return the token losses over a data set, without touching gradients.

    Args:
        session: Backbone and adapter.
        dataset: Encoded samples; may be empty.
        pack_tokens: Longest packed batch (one longer sample goes alone).
    """
    each = (losses_N for _, losses_N in token_losses(session, dataset, pack_tokens))
    return _total([(float(one_N.sum(dtype=torch.float64)), one_N.numel()) for one_N in each])


def token_losses(
    session: Session, dataset: Sequence[Encoded], pack_tokens: int
) -> Iterator[tuple[PackedBatch, Tensor]]:
    """Yield a data set in packed batches, each with its token losses [N], without gradients."""
    for samples in _packs(dataset, pack_tokens):
        batch = pack(samples).to(session.torch_device)
        with torch.no_grad():
            _, losses_N = weighted_cross_entropy(
                session.label_states(batch),
                session.model.lm_head.weight,
                batch.labels_N,
                torch.ones_like(batch.labels_N, dtype=torch.float32),
                session.functions,
            )
        yield batch, losses_N


def _total(parts: Sequence[tuple[float, int]]) -> LossSum:
    return LossSum(math.fsum(loss for loss, _ in parts), sum(count for _, count in parts))


def _packs(dataset: Sequence[Encoded], limit: int) -> Iterator[list[Encoded]]:
    group: list[Encoded] = []
    size = 0
    for sample in dataset:
        if group and size + len(sample.input_ids) > limit:
            yield group
            group, size = [], 0
        group.append(sample)
        size += len(sample.input_ids)
    if group:
        yield group
