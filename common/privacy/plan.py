"""The privacy plan: everything that must match between mechanism, accountant and receipt."""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from typing import Literal

from common.errors import UserError

Unit = Literal["patient", "admission", "hospital"]
UNITS = ("patient", "admission", "hospital")
RELATION: Literal["add-or-remove-one"] = "add-or-remove-one"


@dataclass(frozen=True, kw_only=True)
class PrivacyPlan:
    """Public constants of DP-SGD on B; none of them may depend on the data, nor on its size.

    Formal guarantee: ``steps`` releases of (sum_u c_u G_u + sigma C xi) / D over units drawn
    independently with probability q are (epsilon, delta)-differentially private for adding or
    removing one unit, with epsilon from ``common.privacy.accounting``, provided each unit's
    contribution c_u G_u has L2 norm at most C and depends on that unit alone.

    | case | what happens |
    |---|---|
    | empty Poisson draw | a noise-only release, charged like any other |
    | non-finite unit gradient | the unit contributes zero |
    | noise multiplier None (uncalibrated) | whatever needs it raises |
    | deterministic noise | epsilon is infinite, in every receipt |
    """

    unit: Unit = "patient"
    """What is added or removed: all of a patient's admissions, one admission, or one hospital."""
    relation: Literal["add-or-remove-one"] = RELATION
    """Neighbouring relation."""
    clip_norm: float
    """C: largest L2 norm of a unit's gradient over all modules together."""
    noise_multiplier: float | None
    """sigma: noise standard deviation over C; None until calibrated."""
    sampling_rate: float
    """q: probability with which each unit enters a step, independently."""
    steps: int
    """T: most steps that this plan pays for, over the whole run."""
    expected_batch: float
    """D: public divisor of the noised sum."""
    max_admissions_per_patient: int
    """A patient's gradient averages at most this many admissions; 0 takes all."""
    delta: float
    """Probability with which the epsilon bound may fail."""
    accountant: Literal["prv", "rdp"] = "prv"
    """Which of Opacus' accountants is compared with dp-accounting's PLD."""
    deterministic_noise: bool = False
    """Reproducible noise, for tests: no guarantee."""

    def __post_init__(self) -> None:
        problems = [
            (self.unit not in UNITS, "unit", ", ".join(UNITS)),
            (self.relation != RELATION, "relation", RELATION),
            (not _positive(self.clip_norm), "clip_norm", "above 0"),
            (
                self.noise_multiplier is not None and not _positive(self.noise_multiplier),
                "noise_multiplier",
                "above 0, or None",
            ),
            (not 0 < self.sampling_rate <= 1, "sampling_rate", "above 0, at most 1"),
            (self.steps < 1, "steps", "at least 1"),
            (not _positive(self.expected_batch), "expected_batch", "above 0"),
            (self.max_admissions_per_patient < 0, "max_admissions_per_patient", "at least 0"),
            (not 0 < self.delta < 1, "delta", "between 0 and 1"),
            (self.accountant not in ("prv", "rdp"), "accountant", "prv or rdp"),
        ]
        for broken, name, allowed in problems:
            if broken:
                raise UserError(
                    f"privacy plan: {name}={getattr(self, name)!r}",
                    allowed=allowed,
                    fix="mend the [privacy] section",
                )

    @property
    def sigma(self) -> float:
        """The calibrated noise multiplier.

        Raises:
            UserError: if the plan is not calibrated.
        """
        if self.noise_multiplier is None:
            raise UserError(
                "privacy plan: the noise multiplier is not calibrated",
                fix="set privacy.target-epsilon or privacy.noise-multiplier, and calibrate",
            )
        return self.noise_multiplier

    @property
    def noise_std(self) -> float:
        """Standard deviation sigma C / D of the noise on the released mean gradient."""
        return self.sigma * self.clip_norm / self.expected_batch

    def noise_to_signal(self, parameters: int) -> float:
        """Return |noise| / |largest possible mean gradient| = sigma sqrt(P) / D.

        >>> plan = PrivacyPlan(clip_norm=1.0, noise_multiplier=2.0, sampling_rate=0.1, steps=10,
        ...     expected_batch=100, max_admissions_per_patient=4, delta=1e-5)
        >>> plan.noise_to_signal(10_000)
        2.0
        """
        return self.sigma * math.sqrt(parameters) / self.expected_batch

    def with_noise(self, noise_multiplier: float) -> "PrivacyPlan":
        """Return the plan with another noise multiplier."""
        return dataclasses.replace(self, noise_multiplier=noise_multiplier)

    @property
    def fingerprint(self) -> str:
        """sha256 of the plan: ledgers and receipts name the plan that they belong to."""
        content = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


def _positive(value: float) -> bool:
    return math.isfinite(value) and value > 0
