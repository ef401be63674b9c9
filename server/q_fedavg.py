"""q-FedAvg: hospitals that the model serves worse count more.

Li, Sanjabi, Beirami, Smith, "Fair Resource Allocation in Federated Learning", ICLR 2020, algorithm
2. With F_k the loss of hospital k, p_k its weight, w the global B and w_k its update:

    w - sum_k p_k F_k^q L (w - w_k) / sum_k p_k (q F_k^(q-1) |L (w - w_k)|^2 + L F_k^q)

q = 0 is FedAvg. F_k is the mean loss of the hospital's training in the round.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord
from flwr.serverapp.strategy import FedAvg

from common.wire.contract import Tensors

LOSS = "train-loss"
_TINY = 1e-10
"""Added to a loss, as the authors do: F^(q-1) is infinite at 0."""


class QFedAvg(FedAvg):
    """Flower's FedAvg, with the mean of algorithm 2.

    Args:
        q: How much a larger loss counts.
        lipschitz: L; the paper takes one over the local learning rate.
        options: FedAvg's own.
    """

    def __init__(self, *, q: float, lipschitz: float, **options: Any) -> None:
        super().__init__(**options)
        self.q, self.lipschitz = q, lipschitz
        self.current_arrays: Tensors = {}

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the next global B from replies with a weight and a loss each."""
        before = self.current_arrays
        total = {key: np.zeros_like(value) for key, value in before.items()}
        divisor = 0.0
        for reply in replies:
            (arrays,), (metrics,) = (
                reply.content.array_records.values(),
                reply.content.metric_records.values(),
            )
            weight, loss = (float(metrics[key]) for key in (self.weighted_by_key, LOSS))
            scale = weight * (loss + _TINY) ** self.q
            change = {key: self.lipschitz * (before[key] - arrays[key].numpy()) for key in before}
            square = sum(float(np.square(value).sum()) for value in change.values())
            divisor += scale * (self.q * square / (loss + _TINY) + self.lipschitz)
            for key, value in change.items():
                total[key] += scale * value
        return (
            ArrayRecord({key: Array(before[key] - total[key] / divisor) for key in before}),
            None,
        )
