"""What the checks write: audits, and the plan of a run."""

from dataclasses import dataclass

from pydantic import ConfigDict

from common.choice import Choice
from common.records import PartialRecord, Record
from common.records.privacy import Forecast, Number


class Finding(Record):
    """What one attack or check found."""

    audit: str
    figure: Number
    meaning: str
    """What the figure is, with its unit."""
    limit: Number
    passed: bool
    verdict: str
    null: float | None = None
    """What the figure is expected to be if the claim is true; None where that is no one value."""
    interval: tuple[Number, Number] | None = None
    """95% interval of the figure; None where the figure is exact."""
    false_alarm: float = 0.0
    """Largest probability with which a correct mechanism fails; 0 where the check is exact."""
    has_power: bool = True
    """Whether an attack of this size could refute the claim at all."""


class AuditSummary(Record):
    """summary.json of an audit."""

    plan: dict[str, str | int | float | bool]
    findings: tuple[Finding, ...]
    passed: bool
    not_covered: str
    seconds: float


class MembershipRecord(Record):
    """membership.json: whether a run's patients can be told from others."""

    claim: str
    source: str
    references: int
    findings: tuple[Finding, ...]
    passed: bool
    seconds: float


class Parameters(Record):
    """Values of a backbone and of the two matrices."""

    backbone: int
    a: int
    b: int


class AdapterShape(Record):
    """What is to be trained."""

    mode: str
    rank: int
    targets: tuple[str, ...]


class Recomputation(Record):
    """What the backward pass computes again, and why."""

    value: str
    reason: str
    total_bytes: dict[str, int]
    """Of each choice."""


class MeasuredTime(Record):
    """What training takes on a card that was measured."""

    card: str
    seconds_per_step: float
    hours: float
    """Of all steps of all hospitals, one after the other."""
    source: str


@dataclass(frozen=True)
class Interval:
    """Mean of a figure over seeds, and half the width of its confidence interval, where known."""

    mean: float | None
    half_width: float | None


class ArmRow(Record):
    """One row of a sweep's table: the arm's figures beside its own keys."""

    model_config = ConfigDict(extra="allow")

    __pydantic_extra__: dict[str, Interval]
    arm: str
    runs: int

    @property
    def figures(self) -> dict[str, Interval]:
        """The figures, by the names that people read."""
        return self.__pydantic_extra__


class SweepRecord(Record):
    """sweep.json."""

    confidence: float
    rows: tuple[ArmRow, ...]


class PlanRecord(PartialRecord):
    """What a run will need."""

    backbone: str
    adapter: AdapterShape
    parameters: Parameters
    batch_tokens: int
    device: str
    dtype: Choice[str]
    recompute: Recomputation
    memory_bytes: dict[str, int]
    """By part with ``total``: the peak of a training step of one worker with the chosen
    recomputation."""
    generation_bytes: int
    card_bytes: int
    card: str
    workers: Choice[int]
    """More than one only on a CPU, where they share the memory."""
    fits: bool
    spare_bytes: int
    bytes_per_round: int
    """Of training: down and up again, all hospitals that are asked."""
    steps: int
    """Of one hospital, in all, those of a personal B included."""
    steps_reason: str
    measured: tuple[MeasuredTime, ...] = ()
    """For a GPU."""
    privacy: Forecast | None = None
