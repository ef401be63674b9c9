"""Aggregation: Flower's own strategies, behind our checks.

Updates are checked (``common.exchange``), sorted by hospital and handed to Flower in fp64, so the
result depends neither on the order of arrival nor on the number of workers. FedAvg over B is exact
because A is shared: ``mean(B_k) A == mean(B_k A)``.
"""

from collections.abc import Sequence

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, Strategy

from common.config import FederationConfig
from common.errors import RunFailed
from common.exchange import Tensors, Update

WEIGHT = "weight"


def build_strategy(config: FederationConfig) -> Strategy:
    """Return Flower's strategy of that name; one hospital must be enough for it to start."""
    strategies = {"fedavg": FedAvg}
    return strategies[config.strategy](
        min_train_nodes=1,
        min_evaluate_nodes=1,
        min_available_nodes=1,
        weighted_by_key=WEIGHT,
    )


def aggregate(
    strategy: Strategy, updates: Sequence[Update], *, server_round: int, weighting: str
) -> Tensors:
    """Aggregate checked updates to the next global B (fp32).

    Args:
        strategy: Flower's strategy.
        updates: One per hospital, in any order.
        server_round: Round, from 1.
        weighting: ``samples`` (a hospital's training samples) or ``uniform``.

    Raises:
        RunFailed: if the strategy returns nothing or something that is not finite.
    """
    replies = [
        _as_reply(update, update.weight if weighting == "samples" else 1.0)
        for update in sorted(updates, key=lambda update: update.hospital)
    ]
    arrays, _ = strategy.aggregate_train(server_round, replies)
    if arrays is None:
        raise RunFailed(f"round {server_round}: the strategy returned no aggregate")
    b = {key: arrays[key].numpy().astype(np.float32) for key in sorted(arrays)}
    if not all(np.isfinite(value).all() for value in b.values()):
        raise RunFailed(f"round {server_round}: the aggregate is not finite")
    return b


def _as_reply(update: Update, weight: float) -> Message:
    arrays = {key: Array(value.astype(np.float64)) for key, value in sorted(update.b.items())}
    content = RecordDict(
        {"arrays": ArrayRecord(arrays), "metrics": MetricRecord({WEIGHT: float(weight)})}
    )
    return Message(content=content, dst_node_id=0, message_type="train")
