"""Hospital-level differential privacy: whole updates are clipped and noised by the server.

The mechanism is the patients' own (``common.privacy.mechanism``): clip, sum, discrete Gaussian
noise from the operating system's key, one release a round that the ledger has paid for. The server
sees the bare updates, so it must be trusted.

Shapes: P values of B, keys sorted.
"""

from collections.abc import Sequence

import numpy as np
import torch

from common.config import FederationConfig
from common.errors import RunFailed
from common.privacy.budget.ledger import Ledger
from common.privacy.mechanism.clipping import clipped_sum
from common.privacy.mechanism.noise import NoiseSource
from common.privacy.mechanism.release import GaussianMechanism
from common.privacy.plan import PrivacyPlan
from common.wire.contract import Tensors, Update
from server.strategy import Aggregator, finite


class HospitalPrivacyAggregator(Aggregator):
    """The mean of clipped updates, all of the same weight, plus noise.

    Only ``fedavg`` keeps the sensitivity that the accounting assumes.
    """

    def __init__(self, config: FederationConfig, plan: PrivacyPlan, ledger: Ledger) -> None:
        if config.strategy != "fedavg":
            raise RunFailed(f"hospital-level privacy needs fedavg, not {config.strategy}")
        super().__init__(config)
        self.plan, self.ledger, self.noise = plan, ledger, NoiseSource()

    def aggregate(self, b: Tensors, updates: Sequence[Update], *, server_round: int) -> Tensors:
        """Clip, sum and noise a round's updates, and divide by the hospitals that were asked.

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
        self.ledger.record_release(server_round - 1, server_round - 1)
        self.ledger.charge(server_round, server_round - self.ledger.taken)
        before_P = _flat(b)
        total_P = np.zeros_like(before_P)
        for update in sorted(updates, key=lambda update: update.hospital):
            change_P = torch.from_numpy(_flat(update.b) - before_P)
            total_P += clipped_sum(change_P[None], self.plan.clip_norm).numpy()
        mechanism = GaussianMechanism(self.plan, total_P.size, self.noise)
        released_P = mechanism.release(torch.from_numpy(total_P)).double().numpy()
        return finite(_unflat(before_P + released_P, b), server_round)


def _flat(b: Tensors) -> np.ndarray:
    return np.concatenate([b[key].ravel() for key in sorted(b)]).astype(np.float64)


def _unflat(flat_P: np.ndarray, like: Tensors) -> Tensors:
    keys = sorted(like)
    parts = np.split(flat_P, np.cumsum([like[key].size for key in keys])[:-1])
    return {key: part.reshape(like[key].shape) for key, part in zip(keys, parts, strict=True)}
