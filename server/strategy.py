"""Aggregation: Flower's own strategies, behind our checks.

Updates are checked (``common.wire.contract``), sorted by hospital and handed to Flower in fp64, so
the result depends neither on the order of arrival nor on the number of workers. FedAvg over B is
exact because A is shared: ``mean(B_k) A == mean(B_k A)``.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
from flwr.app import Message, MetricRecord, RecordDict

from common.config import FederationConfig
from common.errors import RunFailed
from common.model.adapter.scheme import Scheme
from common.model.adapter.spec import SCHEMES
from common.privacy.plan import PrivacyPlan
from common.privacy.settings import HOSPITAL
from common.rundir import RunDirectory
from common.tensor_files import under
from common.wire.contract import Tensors, Update
from common.wire.undocumented_flower import AppExitException
from server.strategies import STRATEGIES, WEIGHT, to_record, withstands

_log = logging.getLogger(__name__)


class Aggregator:
    """One of Flower's strategies, with the state that it carries over rounds.

    Where rounds send different parts of the adapter (``scheme``), each has a state of its own.
    """

    def __init__(self, config: FederationConfig, scheme: Scheme = SCHEMES["fa-lora"]) -> None:
        self.config, self.scheme, self.spec = config, scheme, STRATEGIES[config.strategy]
        self.state: Tensors = {}
        """What the strategy carries over rounds, as named fp64 tensors."""

    def aggregate(self, b: Tensors, updates: Sequence[Update], *, server_round: int) -> Tensors:
        """Aggregate checked updates to the next global values (fp32) of what a round sends.

        Raises:
            RunFailed: if the strategy fails, returns nothing, or something that is not finite.
        """
        if not withstands(self.config, len(updates)):
            _log.warning(
                "round %d: %s withstands nothing with %d updates",
                server_round,
                self.config.strategy,
                len(updates),
            )
        uniform = self.config.weighting == "uniform"
        replies = [
            _as_reply(update, 1.0 if uniform else update.weight, self.spec.reads)
            for update in sorted(updates, key=lambda update: update.hospital)
        ]
        strategy, block = self.spec.make(self.config), self.scheme.block(server_round)
        self.spec.restore(strategy, under(block, self.state))
        self.spec.begin(strategy, b)
        try:
            arrays, _ = strategy.aggregate_train(server_round, replies)
        except AppExitException as error:
            raise RunFailed(f"round {server_round}: {self.config.strategy}: {error}") from None
        if arrays is None:
            raise RunFailed(f"round {server_round}: the strategy returned no aggregate")
        self.state |= {block + key: value for key, value in self.spec.state(strategy).items()}
        return finite({key: arrays[key].numpy() for key in sorted(arrays)}, server_round)


@contextmanager
def rounds_not_printed() -> Iterator[None]:
    """Have Flower log warnings alone: rounds are for a console, and its own handler prints."""
    log = logging.getLogger("flwr")
    before = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(before)


def finite(b: Tensors, server_round: int) -> Tensors:
    """Return an aggregate in fp32.

    Raises:
        RunFailed: if it is not finite.
    """
    result = {key: value.astype(np.float32) for key, value in b.items()}
    if not all(np.isfinite(value).all() for value in result.values()):
        raise RunFailed(f"round {server_round}: the aggregate is not finite")
    return result


def aggregator_for(
    config: FederationConfig, scheme: Scheme, plan: PrivacyPlan | None, run: RunDirectory
) -> Aggregator:
    """Return what aggregates a run's rounds; with privacy on all hospitals weigh the same."""
    if plan is None:
        return Aggregator(config, scheme)
    if plan.unit != HOSPITAL:
        return Aggregator(replace(config, weighting="uniform"), scheme)
    # Here alone the server needs torch.
    from common.privacy.budget.guard import LEDGER
    from common.privacy.budget.ledger import Ledger
    from server.central_dp import HospitalPrivacyAggregator

    return HospitalPrivacyAggregator(config, plan, Ledger(run.path / LEDGER, plan))


def _as_reply(update: Update, weight: float, reads: Sequence[str]) -> Message:
    figures = {name: update.metrics[name] for name in reads}
    metrics = MetricRecord({WEIGHT: float(weight), **figures})
    content = RecordDict({"arrays": to_record(update.b), "metrics": metrics})
    return Message(content=content, dst_node_id=0, message_type="train")
