"""What a run's privacy costs: forecast before it, and summed up after it."""

import math
from typing import Annotated

from pydantic import PlainSerializer

from common.records import OpenRecord, PartialRecord, Record

Number = Annotated[
    float,
    PlainSerializer(lambda value: value if math.isfinite(value) else "infinity", when_used="json"),
]
"""JSON has no infinity: there it is a word."""


class Spent(OpenRecord):
    """What one hospital has spent."""

    hospital: str
    steps: int = 0
    epsilon: Number


class Privacy(OpenRecord):
    """summary.json's ``privacy``: the guarantee of a run."""

    unit: str
    relation: str = ""
    epsilon: Number
    delta: float
    accountant: str = ""
    noise: str = ""
    noise_multiplier: float | None = None
    clip_norm: float | None = None
    sampling_rate: float | None = None
    expected_batch: float | None = None
    planned_steps: int = 0
    per_hospital: tuple[Spent, ...] = ()
    not_covered: str = ""
    warning: str = ""
    """Where hospitals are protected."""

    @property
    def guarantees(self) -> bool:
        """Whether it bounds anything: reproducible noise does not."""
        return math.isfinite(self.epsilon)


class Advice(Record):
    """One change of the plan at equal epsilon, and the noise over signal that it leads to."""

    what: str
    noise_multiplier: float
    noise_to_signal: float


class Forecast(PartialRecord):
    """What a plan will cost, and how much noise it brings."""

    relation: str
    epsilon: Number
    unit: str
    sampling_rate: float
    clip_norm: float
    delta: float
    noise_multiplier: float
    accountant: str
    steps: int
    expected_batch: float
    noise_to_signal: float
    verdict: str
    advice: tuple[Advice, ...]
    delta_note: str = ""
