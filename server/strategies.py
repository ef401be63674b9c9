"""Which aggregations there are: Flower's own strategies, each with what our server needs to know.

To add one, add its name to ``federation.strategy`` in ``common.config`` and its spec here.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import (
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    FedYogi,
    Krum,
    Strategy,
)

from common.config import FederationConfig
from common.errors import UserError
from common.tensor_files import under
from common.wire.cohort import asked, trained_by
from common.wire.contract import Tensors
from server.q_fedavg import LOSS, QFedAvg

WEIGHT = "weight"
_COMMON: dict[str, Any] = {
    "min_train_nodes": 1,
    "min_evaluate_nodes": 1,
    "min_available_nodes": 1,
    "weighted_by_key": WEIGHT,
}


class Fewest(NamedTuple):
    """The fewest updates with which a robust strategy withstands anything, and why."""

    updates: int
    problem: str
    """What is wrong with fewer; ``{asked}`` stands for how many are asked."""
    allowed: str
    fix: str


@dataclass(frozen=True, kw_only=True)
class StrategySpec:
    """One aggregation."""

    make: Callable[[FederationConfig], Strategy]
    begin: Callable[[Any, Tensors], None] = lambda strategy, b: None
    """Tell a strategy, before each round, the global B that the updates start from (fp64)."""
    reads: tuple[str, ...] = ()
    """Figures of a hospital's reply that it weighs by."""
    state: Callable[[Any], Tensors] = lambda strategy: {}
    """What the strategy carries over rounds, as named fp64 tensors."""
    restore: Callable[[Any, Tensors], None] = lambda strategy, tensors: None
    """Set what ``state`` returned."""
    fewest: Callable[[FederationConfig], Fewest | None] = lambda config: None
    """None where any number of updates will do."""


def to_record(b: Tensors) -> ArrayRecord:
    """Return B as Flower's strategies take it: fp64, keys sorted."""
    return ArrayRecord({key: Array(value.astype(np.float64)) for key, value in sorted(b.items())})


def _set_record(strategy: FedAvgM, b: Tensors) -> None:
    strategy.current_arrays = to_record(b)


def _set_arrays(strategy: FedAdam | FedYogi | QFedAvg, b: Tensors) -> None:
    strategy.current_arrays = {key: value.astype(np.float64) for key, value in sorted(b.items())}


def _moments(strategy: FedAdam | FedYogi) -> Tensors:
    groups = {"m": strategy.m_t or {}, "v": strategy.v_t or {}}
    return {f"{name}.{key}": v for name, group in groups.items() for key, v in group.items()}


def _set_moments(strategy: FedAdam | FedYogi, tensors: Tensors) -> None:
    strategy.m_t, strategy.v_t = under("m.", tensors) or None, under("v.", tensors) or None


def _momentum(strategy: FedAvgM) -> Tensors:
    return {f"momentum.{i:05d}": v for i, v in enumerate(strategy.momentum_vector or [])}


def _set_momentum(strategy: FedAvgM, tensors: Tensors) -> None:
    momentum = under("momentum.", tensors)
    strategy.momentum_vector = [momentum[key] for key in sorted(momentum)] or None


def _fewest_to_trim(config: FederationConfig) -> Fewest:
    """Flower's trimmed mean cuts ``int(trim * updates)`` at each end."""
    needed = math.ceil(1 / config.trim) if config.trim else sys.maxsize
    while config.trim and int(config.trim * needed) < 1:
        needed += 1
    return Fewest(
        needed,
        f"with federation.trim={config.trim:g} cuts nothing of {{asked}} hospitals a round",
        "federation.trim x hospitals a round of at least 1",
        "take more hospitals, a larger federation.fraction or a larger federation.trim",
    )


def _fewest_for_krum(config: FederationConfig) -> Fewest:
    """Krum withstands f malicious hospitals among 2 f + 3 (Blanchard et al. 2017)."""
    needed = 2 * config.malicious + 3
    return Fewest(
        needed,
        f"with federation.malicious={config.malicious} withstands nobody among {{asked}} "
        "hospitals a round",
        f"at least 2 x federation.malicious + 3 = {needed}",
        "take more hospitals or a larger federation.fraction",
    )


def _adaptive(kind: type[FedAdam] | type[FedYogi]) -> StrategySpec:
    return StrategySpec(
        make=lambda c: kind(eta=c.server_learning_rate or 0.01, **_COMMON),
        begin=_set_arrays,
        state=_moments,
        restore=_set_moments,
    )


STRATEGIES: dict[str, StrategySpec] = {
    "fedavg": StrategySpec(make=lambda c: FedAvg(**_COMMON)),
    "fedprox": StrategySpec(make=lambda c: FedProx(proximal_mu=c.proximal_mu, **_COMMON)),
    "fedavgm": StrategySpec(
        make=lambda c: FedAvgM(
            server_learning_rate=c.server_learning_rate or 1.0,
            server_momentum=c.server_momentum,
            **_COMMON,
        ),
        begin=_set_record,
        state=_momentum,
        restore=_set_momentum,
    ),
    "fedadam": _adaptive(FedAdam),
    "fedyogi": _adaptive(FedYogi),
    "fedmedian": StrategySpec(make=lambda c: FedMedian(**_COMMON)),
    "trimmed-mean": StrategySpec(
        make=lambda c: FedTrimmedAvg(beta=c.trim, **_COMMON), fewest=_fewest_to_trim
    ),
    "krum": StrategySpec(
        make=lambda c: Krum(num_malicious_nodes=c.malicious, **_COMMON), fewest=_fewest_for_krum
    ),
    "q-fedavg": StrategySpec(
        make=lambda c: QFedAvg(
            q=c.fairness, lipschitz=1 / (c.server_learning_rate or 1.0), **_COMMON
        ),
        begin=_set_arrays,
        reads=(LOSS,),
    ),
}


def withstands(config: FederationConfig, updates: int) -> bool:
    """Return whether a strategy is as robust with so many updates as its name says.

    One hospital alone (in ``federation.only``) is not aggregated, and passes.

    >>> trimmed = FederationConfig(strategy="trimmed-mean", trim=0.2)
    >>> [withstands(trimmed, n) for n in (4, 5)]
    [False, True]
    """
    fewest = STRATEGIES[config.strategy].fewest(config)
    alone = len(trained_by(config)) == 1
    return alone or fewest is None or updates >= fewest.updates


def check_strategy(config: FederationConfig) -> None:
    """Refuse a robust strategy that withstands nothing even if every asked hospital answers.

    Raises:
        UserError: for a trimmed mean that cuts nothing, and for krum with too few hospitals.
    """
    expected = asked(config)
    fewest = STRATEGIES[config.strategy].fewest(config)
    if fewest is None or withstands(config, expected):
        return
    raise UserError(
        f"federation.strategy={config.strategy} {fewest.problem.format(asked=expected)}",
        allowed=fewest.allowed,
        fix=fewest.fix,
    )
