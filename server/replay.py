"""What a run's rounds would have made of some of its hospitals, from the updates that were kept.

With w_k the weight and B_k the update of hospital k in a round that began at the run's B:

    B'  <-  B' + sum_{k in S} w_k (B_k - B) / sum_{k in S} w_k

Because A is shared, the mean of the B_k is the mean of what they do, so B' is a real model, and
that of all hospitals is the run's own, to the last bit. What the hospitals would have sent had they
begun at B' is not known without training; ``fedrx forget`` measures the difference.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np

from common.config import FederationConfig
from common.errors import UserError
from common.model.adapter.scheme import Scheme
from common.model.adapter.spec import SCHEMES
from common.provenance import tensors_sha256
from common.rundir import RunDirectory
from common.tensor_files import Altered
from common.wire.contract import Tensors, Update
from common.wire.undocumented_flower import task_identity
from server import kept_updates
from server.strategy import Aggregator, rounds_not_printed

MEANS = ("fedavg", "fedprox")
"""Strategies whose aggregate is a mean of the updates, and nothing that is carried on."""


@dataclass(frozen=True)
class Replay:
    """The rounds of a finished run that kept its updates."""

    federation: FederationConfig
    scheme: Scheme
    rounds: Sequence[tuple[Tensors, Sequence[Update]]]
    """The global B that each round began at, and what came back."""

    @classmethod
    def open(cls, run: RunDirectory) -> "Replay":
        """Read a run's rounds, and see that they make its B.

        Raises:
            UserError: see ``read``.
            Altered: see ``require_b_of``.
        """
        found = cls.read(run)
        found.require_b_of(run)
        return found

    @classmethod
    def read(cls, run: RunDirectory) -> "Replay":
        """Read a run's rounds, before any is replayed.

        Raises:
            UserError: if the run has no updates, its aggregation is no mean, or a round is missing.
        """
        config = run.config()
        federation = config.federation
        if not federation.keep_updates:
            raise UserError(
                f"{run.path} has not kept what its hospitals sent",
                allowed="a run with federation.keep-updates = true",
                fix="train one with --set federation.keep-updates=true",
            )
        if federation.strategy not in MEANS:
            raise UserError(
                f"{run.path} was aggregated by {federation.strategy}: no hospital's part can be "
                "taken out of it",
                allowed=f"federation.strategy = {' or '.join(MEANS)}",
                fix="train another run",
            )
        rounds = []
        for number in range(1, federation.rounds + 1):
            updates = kept_updates.read(run, number)
            if not updates:
                raise UserError(
                    f"{run.path} has no updates of round {number} of {federation.rounds}",
                    allowed="a run that is trained to its end",
                    fix="`fedrx resume` it, or bring the file back",
                )
            rounds.append((run.load_checkpoint(f"round-{number - 1:05d}").b, updates))
        return cls(federation, SCHEMES[config.adapter.mode], rounds)

    def require_b_of(self, run: RunDirectory) -> None:
        """Replay all hospitals.

        Raises:
            Altered: if the updates are not what the run's B was made of.
        """
        if tensors_sha256(self.of(self.hospitals)) != run.summary().b_sha256:
            raise Altered(
                "the kept updates do not make the run's B",
                allowed="those of a run that is finished, as they were written",
                fix="bring updates and checkpoints back from a copy, or `fedrx resume` the run",
            )

    @property
    def hospitals(self) -> list[str]:
        """Names of all that took part in a round."""
        return sorted({one.hospital for _, updates in self.rounds for one in updates})

    def of(self, hospitals: Collection[str]) -> Tensors:
        """Return the B (fp32) that the rounds make of these hospitals; of none, that of before."""
        b = dict(self.rounds[0][0])
        aggregator = Aggregator(self.federation, self.scheme)
        for number, (begun, updates) in enumerate(self.rounds, 1):
            shift = {key: value.astype(np.float64) - begun[key] for key, value in b.items()}
            moved = [
                replace(one, b={key: value + shift[key] for key, value in one.b.items()})
                for one in updates
                if one.hospital in hospitals
            ]
            if moved:
                base = self.scheme.shapes(number, b)
                with task_identity(), rounds_not_printed():
                    b |= aggregator.aggregate(base, moved, server_round=number)
        return b
