"""Hospital-level differential privacy: whole updates are clipped and noised by the server.

Flower's fixed-clipping wrapper clips, checks weights and counts releases; the noise is ours, from
the operating system's key, because the wrapper's comes from numpy's global generator. The server
sees the bare updates, so it must be trusted. Flower's adaptive clipping is never used: its clip
norm drifts the wrong way.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg
from flwr.supercore.privacy_accounting import NeighboringRelation, PrivacyConfig, SamplingMethod
from flwr.supercore.privacy_accounting.rdp_accountant import RdpAccountant

from common.config import FederationConfig
from common.errors import RunFailed
from common.privacy.budget.ledger import Ledger
from common.privacy.mechanism.noise import NoiseSource
from common.privacy.mechanism.release import GaussianMechanism
from common.privacy.plan import PrivacyPlan
from common.wire.contract import Tensors, Update
from server.strategy import Aggregator

_TINY = 1e-12


class SecretNoise(DifferentialPrivacyServerSideFixedClipping):
    """Flower's wrapper with discrete Gaussian noise from a secret source."""

    def __init__(self, strategy: FedAvg, plan: PrivacyPlan, accountant: RdpAccountant) -> None:
        super().__init__(
            strategy,
            plan.sigma,
            plan.clip_norm,
            int(plan.expected_batch),
            accountant=accountant,
        )
        self.plan, self.noise = plan, NoiseSource()

    def begin(self, b: Tensors, server_round: int) -> None:
        """Set what the updates started from, and enter the round's release into the accountant."""
        self.current_arrays = _record(b)
        self._prepare_accounting(server_round, [None] * self.num_sampled_clients)

    def _add_noise_to_aggregated_arrays(self, aggregated_arrays: ArrayRecord) -> ArrayRecord:
        before = self.current_arrays.to_numpy_ndarrays()
        after = aggregated_arrays.to_numpy_ndarrays()
        changes = [new - old for new, old in zip(after, before, strict=True)]
        total_P = np.concatenate([change.ravel() for change in changes]) * self.plan.expected_batch
        mechanism = GaussianMechanism(self.plan, total_P.size, self.noise)
        released_P = mechanism.release(torch.from_numpy(total_P.astype(np.float32))).numpy()
        parts = np.split(released_P, np.cumsum([change.size for change in changes])[:-1])
        return ArrayRecord(
            {
                key: Array(old + part.reshape(old.shape).astype(np.float64))
                for key, old, part in zip(aggregated_arrays, before, parts, strict=True)
            }
        )


class HospitalPrivacyAggregator(Aggregator):
    """FedAvg of clipped updates, all of the same weight, plus noise.

    Args:
        config: Only ``fedavg`` keeps the sensitivity that the accounting assumes.
        plan: Of unit ``hospital``: one step a round, D hospitals a round.
        ledger: The server's, charged before a round is aggregated.
    """

    def __init__(self, config: FederationConfig, plan: PrivacyPlan, ledger: Ledger) -> None:
        super().__init__(replace(config, weighting="uniform"))
        if config.strategy != "fedavg" or not isinstance(self.strategy, FedAvg):
            raise RunFailed(f"hospital-level privacy needs fedavg, not {config.strategy}")
        accountant = RdpAccountant(
            PrivacyConfig(
                target_delta=plan.delta,
                population_size=config.hospitals,
                neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
                sampling_method=SamplingMethod.NO_AMPLIFICATION,
            )
        )
        self.wrapper = SecretNoise(self.strategy, plan, accountant)
        self.strategy = self.wrapper
        self.plan, self.ledger = plan, ledger

    def aggregate(self, b: Tensors, updates: Sequence[Update], *, server_round: int) -> Tensors:
        """Clip, average and noise a round's updates.

        Raises:
            BudgetExhausted: if the plan pays for no further round.
            RunFailed: if not every hospital that was asked has answered: a smaller mean would
                need more noise than the plan's.
        """
        asked = int(self.plan.expected_batch)
        if len(updates) != asked:
            raise RunFailed(
                f"round {server_round}: {len(updates)} of {asked} hospitals answered; "
                "hospital-level privacy needs all of them"
            )
        # the round before is in its checkpoint; what was charged for this one and never
        # checkpointed pays for this attempt
        self.ledger.settle(server_round - 1, server_round - 1)
        self.ledger.charge(server_round, server_round - self.ledger.taken)
        self.wrapper.begin(b, server_round)
        moved = [_never_still(b, update) for update in updates]
        return super().aggregate(b, moved, server_round=server_round)


def _never_still(b: Tensors, update: Update) -> Update:
    """Nudge an update that equals the global B: Flower's clipping divides by its norm."""
    if any(not np.array_equal(update.b[key], b[key]) for key in b):
        return update
    key = min(b)
    nudged = b[key].astype(np.float64)
    nudged.flat[0] += _TINY * max(1.0, abs(float(nudged.flat[0])))
    return Update(
        hospital=update.hospital, b={**b, key: nudged}, weight=update.weight, metrics=update.metrics
    )


def _record(b: Tensors) -> ArrayRecord:
    return ArrayRecord({key: Array(value.astype(np.float64)) for key, value in sorted(b.items())})
