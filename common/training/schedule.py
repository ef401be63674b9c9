"""Learning rate and data order as pure functions of the global step."""

import math
from collections.abc import Sequence

from common.config import TrainConfig
from common.seeds import stream


def learning_rate(config: TrainConfig, step: int, schedule_steps: int) -> float:
    """Return the learning rate of global step ``step`` (from 0).

    Linear warm-up over ``warmup_steps``, then constant, or down to 0 at ``schedule_steps`` along
    a line or a half cosine.

    >>> config = TrainConfig(learning_rate=1.0, schedule="linear", warmup_steps=2)
    >>> [learning_rate(config, step, 6) for step in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    warmup = config.warmup_steps
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.schedule == "constant":
        return config.learning_rate
    progress = min(1.0, (step - warmup) / max(1, schedule_steps - warmup))
    if config.schedule == "linear":
        return config.learning_rate * (1.0 - progress)
    return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))


def batch_order(seed: int, stream_name: str, samples: int, start: int, count: int) -> list[int]:
    """Return the sample indices at places ``start .. start + count`` of the endless order.

    The order is one permutation after another, each drawn from its own stream, so any place can
    be computed without the places before it.

    >>> order = batch_order(0, "hospital-1", 5, 0, 10)
    >>> sorted(order[:5]), sorted(order[5:])
    ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4])
    >>> batch_order(0, "hospital-1", 5, 3, 4) == order[3:7]
    True
    """
    indices: list[int] = []
    for epoch in range(start // samples, -(-(start + count) // samples)):
        permutation: Sequence[int] = (
            stream(seed, "data-order", stream_name, epoch).permutation(samples).tolist()
        )
        first = max(0, start - epoch * samples)
        indices.extend(permutation[first : start + count - epoch * samples])
    return indices
