"""Aggregation: Flower's own strategies, behind our checks.

Updates are checked (``common.wire.contract``), sorted by hospital and handed to Flower in fp64, so the
result depends neither on the order of arrival nor on the number of workers. FedAvg over B is exact
because A is shared: ``mean(B_k) A == mean(B_k A)``.
"""

import logging
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.exception import AppExitException
from flwr.serverapp.strategy import (
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    Krum,
    Strategy,
)

from common.config import FederationConfig
from common.errors import RunFailed
from common.wire.cohort import is_robust
from common.wire.contract import Tensors, Update

WEIGHT = "weight"
_log = logging.getLogger(__name__)
_ONE_IS_ENOUGH = {"min_train_nodes": 1, "min_evaluate_nodes": 1, "min_available_nodes": 1}


class Aggregator:
    """One of Flower's strategies, with the state that it carries over rounds.

    Args:
        config: Names the strategy and its settings.
    """

    def __init__(self, config: FederationConfig) -> None:
        self.config = config
        self.strategy = _STRATEGIES[config.strategy](config)

    def aggregate(self, b: Tensors, updates: Sequence[Update], *, server_round: int) -> Tensors:
        """Aggregate checked updates to the next global B (fp32).

        Args:
            b: The global B that the updates started from.
            updates: One per hospital, in any order.
            server_round: Round, from 1.

        Raises:
            RunFailed: if the strategy fails, returns nothing, or something that is not finite.
        """
        if not self.withstands(len(updates)):
            _log.warning(
                "round %d: %s withstands nothing with %d updates",
                server_round,
                self.config.strategy,
                len(updates),
            )
        uniform = self.config.weighting == "uniform"
        replies = [
            _as_reply(update, 1.0 if uniform else update.weight)
            for update in sorted(updates, key=lambda update: update.hospital)
        ]
        if isinstance(self.strategy, FedAdam):
            self.strategy.current_arrays = _fp64(b)
        if isinstance(self.strategy, FedAvgM):
            self.strategy.current_arrays = _record(b)
        try:
            arrays, _ = self.strategy.aggregate_train(server_round, replies)
        except AppExitException as error:
            raise RunFailed(f"round {server_round}: {self.config.strategy}: {error}") from None
        if arrays is None:
            raise RunFailed(f"round {server_round}: the strategy returned no aggregate")
        result = {key: arrays[key].numpy().astype(np.float32) for key in sorted(arrays)}
        if not all(np.isfinite(value).all() for value in result.values()):
            raise RunFailed(f"round {server_round}: the aggregate is not finite")
        return result

    def withstands(self, updates: int) -> bool:
        """Return whether the strategy is as robust with so many updates as its name says."""
        return bool(self.config.only) or is_robust(self.config, updates)

    def state(self) -> Tensors:
        """Return what the strategy carries over rounds, as named fp64 tensors."""
        strategy = self.strategy
        if isinstance(strategy, FedAdam):
            moments = {"m": strategy.m_t or {}, "v": strategy.v_t or {}}
            return {
                f"{name}.{key}": v for name, group in moments.items() for key, v in group.items()
            }
        if isinstance(strategy, FedAvgM) and strategy.momentum_vector is not None:
            return {f"momentum.{i:05d}": v for i, v in enumerate(strategy.momentum_vector)}
        return {}

    def restore(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Set what ``state`` returned."""

        def group(name: str) -> Tensors:
            prefix = f"{name}."
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        strategy = self.strategy
        if isinstance(strategy, FedAdam):
            strategy.m_t, strategy.v_t = group("m") or None, group("v") or None
        if isinstance(strategy, FedAvgM):
            momentum = group("momentum")
            strategy.momentum_vector = [momentum[key] for key in sorted(momentum)] or None


_STRATEGIES: dict[str, Callable[[FederationConfig], Strategy]] = {
    "fedavg": lambda c: FedAvg(weighted_by_key=WEIGHT, **_ONE_IS_ENOUGH),
    "fedprox": lambda c: FedProx(
        weighted_by_key=WEIGHT, proximal_mu=c.proximal_mu, **_ONE_IS_ENOUGH
    ),
    "fedavgm": lambda c: FedAvgM(
        weighted_by_key=WEIGHT,
        server_learning_rate=c.server_learning_rate or 1.0,
        server_momentum=c.server_momentum,
        **_ONE_IS_ENOUGH,
    ),
    "fedadam": lambda c: FedAdam(
        weighted_by_key=WEIGHT, eta=c.server_learning_rate or 0.01, **_ONE_IS_ENOUGH
    ),
    "fedmedian": lambda c: FedMedian(weighted_by_key=WEIGHT, **_ONE_IS_ENOUGH),
    "trimmed-mean": lambda c: FedTrimmedAvg(weighted_by_key=WEIGHT, beta=c.trim, **_ONE_IS_ENOUGH),
    "krum": lambda c: Krum(
        weighted_by_key=WEIGHT, num_malicious_nodes=c.malicious, **_ONE_IS_ENOUGH
    ),
}


def _fp64(b: Tensors) -> Tensors:
    return {key: value.astype(np.float64) for key, value in sorted(b.items())}


def _record(b: Tensors) -> ArrayRecord:
    return ArrayRecord({key: Array(value) for key, value in _fp64(b).items()})


def _as_reply(update: Update, weight: float) -> Message:
    content = RecordDict(
        {"arrays": _record(update.b), "metrics": MetricRecord({WEIGHT: float(weight)})}
    )
    return Message(content=content, dst_node_id=0, message_type="train")
