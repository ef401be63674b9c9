"""What a hospital can show: which mechanism ran, on what terms, and what it cost."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict

from common.privacy.accounting import Epsilon, epsilon
from common.privacy.budget.ledger import Ledger
from common.privacy.mechanism.noise import noise_name
from common.privacy.plan import PrivacyPlan, Unit
from common.records import Record
from common.records.privacy import Number, Privacy, Spent
from common.rundir import RunDirectory

if TYPE_CHECKING:
    from common.privacy.mechanism.release import GaussianMechanism

PRIVACY = "privacy.jsonl"
"""A run's public account: one line per hospital and round, see ``ledger_line``."""

NOT_COVERED = (
    "metrics of this summary are the simulation's own, on held-out patients, outside the "
    "guarantee; the baselines among them were fitted to the training patients without privacy"
)


class PrivacyLine(Record):
    """One line of privacy.jsonl: public constants, and what a hospital has spent so far."""

    absent_when_none = ("least_steps",)
    hospital: str
    round: int
    sampling_rate: float
    noise_multiplier: float
    clip_norm: float
    steps: int
    epsilon: Number
    delta: float
    unit: Unit
    accountant: str
    least_steps: int | None = None
    """In a line that no hospital told: ``steps`` is the worst case, this what is certain."""

    @property
    def certain(self) -> int:
        """Steps that the hospital's ledger shows at least."""
        return self.steps if self.least_steps is None else self.least_steps


class Terms(TypedDict):
    """The public constants that every account of a plan names."""

    unit: Unit
    sampling_rate: float
    clip_norm: float
    delta: float
    noise_multiplier: float
    accountant: str


def terms(plan: PrivacyPlan) -> Terms:
    """Return a plan's public constants."""
    return {
        "unit": plan.unit,
        "sampling_rate": plan.sampling_rate,
        "clip_norm": plan.clip_norm,
        "delta": plan.delta,
        "noise_multiplier": plan.sigma,
        # whose larger figure is reported
        "accountant": f"max(opacus {plan.accountant}, dp-accounting pld)",
    }


def ledger_line(plan: PrivacyPlan, hospital: str, round_number: int, steps: int) -> PrivacyLine:
    """Return what a hospital has spent after ``steps`` steps."""
    return PrivacyLine(
        hospital=hospital,
        round=round_number,
        steps=steps,
        epsilon=epsilon(plan, steps).value,
        **terms(plan),
    )


def privacy_lines(run: RunDirectory) -> list[PrivacyLine]:
    """Read a run's privacy.jsonl, in the order of writing."""
    return [PrivacyLine.read(line, what=PRIVACY) for line in run.lines(PRIVACY)]


class Receipt(Record):
    """What a hospital can show of its ledger: privacy-receipt.json."""

    hospital: str
    mechanism: str = "DP-SGD on B: Poisson sampling, per-unit clipping, discrete Gaussian noise"
    unit: Unit
    relation: str
    sampling_rate: float
    noise_multiplier: float
    clip_norm: float
    expected_batch: float
    max_admissions_per_patient: int
    steps: int
    released_steps: int
    planned_steps: int
    epsilon: Number
    delta: float
    accountant: str
    epsilon_accountant: Number
    epsilon_cross_check: Number
    noise: str
    noise_std: float
    grid_step: float
    noise_residue: float
    parameters: int
    plan_sha256: str
    source_digest: str
    private: bool


def receipt(
    hospital: str, ledger: Ledger, mechanism: "GaussianMechanism", source_digest: str
) -> Receipt:
    """Return a hospital's receipt for what its ledger holds.

    A ledger with a single entry of deterministic noise has epsilon = infinity, whatever the plan
    says.
    """
    plan, entries = ledger.plan, ledger.entries()
    steps = entries[-1].total_steps
    reproducible = any(entry.deterministic for entry in entries) or not mechanism.noise.secret
    cost = Epsilon(math.inf, math.inf, math.inf) if reproducible else epsilon(plan, steps)
    return Receipt(
        hospital=hospital,
        **terms(plan),
        relation=plan.relation,
        expected_batch=plan.expected_batch,
        max_admissions_per_patient=plan.max_admissions_per_patient,
        steps=steps,
        released_steps=entries[-1].released_steps,
        planned_steps=plan.steps,
        epsilon=cost.value,
        epsilon_accountant=cost.accountant,
        epsilon_cross_check=cost.cross_check,
        noise=mechanism.noise.name,
        noise_std=mechanism.grid.std,
        grid_step=mechanism.grid.step,
        noise_residue=mechanism.residue,
        parameters=mechanism.parameters,
        plan_sha256=plan.fingerprint,
        source_digest=source_digest,
        private=not reproducible,
    )


def privacy_summary(plan: PrivacyPlan, lines: Sequence[PrivacyLine]) -> Privacy:
    """Return summary.json's ``privacy``: what the run's privacy.jsonl adds up to.

    Patients are in one hospital only, so hospitals compose in parallel: epsilon is the largest.
    """
    last = {line.hospital: line for line in lines}
    largest = max((line.epsilon for line in last.values()), default=0.0)
    return Privacy(
        **terms(plan),
        relation=plan.relation,
        epsilon=largest,
        noise=noise_name(secret=not plan.deterministic_noise),
        expected_batch=plan.expected_batch,
        planned_steps=plan.steps,
        per_hospital=tuple(Spent.model_validate(last[name]) for name in sorted(last)),
        not_covered=NOT_COVERED,
    )
