"""What models of one, some and all hospitals are worth on the held-out patients of each.

Shapes: R models (rows), N units (an admission or a patient, in one order for all models).
"""

import math
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.evaluation.metrics import CONFIDENCE, interval_of_mean
from common.records import Record

TOGETHER = "all"
"""Row of the matrix: the model of all hospitals."""
Floats = NDArray[np.float64]


class Value(Record):
    """A mean over held-out patients and seeds."""

    value: float
    low: float | None
    high: float | None
    """By bootstrap over patients, each a mean over seeds; None with one patient."""
    over_seeds: float | None
    """Half width of the interval over seeds (Student's t); None with one seed."""


class AtHospital(Record):
    """What models are worth on one hospital's held-out patients; None where it has none."""

    hospital: str
    patients: int
    alone: Value | None
    """Of the model that it trained by itself."""
    together: Value | None
    """Of the model of all hospitals."""
    gain: Value | None
    """Together better than alone, paired by patient."""
    absent: Value | None
    """Of the model of all others, which never saw this hospital."""
    presence: Value | None
    """Together better than absent, paired by patient."""


class Worst(Record):
    """The hospital that a kind of model serves worst."""

    kind: str
    hospital: str
    value: Value


class OfSize(Record):
    """Models that so many hospitals trained."""

    hospitals: int
    models: int
    everybody: Value | None
    inside: Value | None
    """On patients of the hospitals that trained each."""
    outside: Value | None


class Measured(Record):
    """Everything by one metric."""

    matrix: dict[str, dict[str, Value | None]]
    """Trained by -> tested at."""
    hospitals: tuple[AtHospital, ...]
    worst: tuple[Worst, ...]
    curve: tuple[OfSize, ...]


@dataclass(frozen=True)
class Trained:
    """Who trained a model, and its seed."""

    hospitals: tuple[str, ...]
    seed: int


@dataclass(frozen=True, kw_only=True)
class Results:
    """All models by one metric."""

    models: Sequence[Trained]
    values_RN: Floats
    patients_N: Sequence[int]
    hospitals_N: Sequence[str]
    higher_is_better: bool
    resamples: int
    seed: int
    """Of the bootstrap."""

    def estimate(self, values_RN: Floats, seeds_R: Sequence[int]) -> Value | None:
        """Return the mean over units of the mean over rows; NaN is no part of it.

        None where nothing is left.
        """
        there = ~np.isnan(values_RN)
        seen_N = np.asarray(there.any(axis=0))
        if not seen_N.any():
            return None
        units = np.nanmean(values_RN[:, seen_N], axis=0)
        patients = [one for one, seen in zip(self.patients_N, seen_N, strict=True) if seen]
        mean = interval_of_mean(units.tolist(), patients, resamples=self.resamples, seed=self.seed)
        assert mean.value is not None
        rows = {seed: np.array(seeds_R) == seed for seed in sorted(set(seeds_R))}
        each = [float(np.nanmean(values_RN[row])) for row in rows.values() if np.any(there[row])]
        return Value(value=mean.value, low=mean.low, high=mean.high, over_seeds=half_width(each))

    def of(self, trained: Collection[str], tested: Collection[str]) -> Value | None:
        """Return what the model of some hospitals is worth on patients of some."""
        return self.estimate(*self._rows(trained, tested))

    def better(
        self, one: Collection[str], other: Collection[str], tested: Collection[str]
    ) -> Value | None:
        """Return by how much one model is better than another, paired by patient and seed."""
        (first, seeds), (second, _) = self._rows(one, tested), self._rows(other, tested)
        sign = 1 if self.higher_is_better else -1
        return self.estimate(sign * (first - second), seeds)

    def _rows(self, trained: Collection[str], tested: Collection[str]) -> tuple[Floats, list[int]]:
        places = [n for n, one in enumerate(self.models) if set(one.hospitals) == set(trained)]
        inside_N = np.isin(self.hospitals_N, list(tested))
        values_RN = np.where(inside_N, self.values_RN[places], np.nan)
        return values_RN, [self.models[place].seed for place in places]

    def of_size(self, size: int) -> OfSize:
        """Return the models that so many hospitals trained, together."""
        places = [n for n, one in enumerate(self.models) if len(one.hospitals) == size]
        models, values_RN = [self.models[n] for n in places], self.values_RN[places]
        inside_RN = np.array([np.isin(self.hospitals_N, one.hospitals) for one in models])
        seeds = [one.seed for one in models]
        return OfSize(
            hospitals=size,
            models=len(models),
            everybody=self.estimate(values_RN, seeds),
            inside=self.estimate(np.where(inside_RN, values_RN, np.nan), seeds),
            outside=self.estimate(np.where(inside_RN, np.nan, values_RN), seeds),
        )


def measured(results: Results, names: Sequence[str]) -> Measured:
    """Return the matrix, what each hospital gains, who is served worst, and the curve.

    Args:
        results: With a model of each hospital alone, of all, of all but one, for every seed.
        names: All hospitals.
    """
    rows = {name: (name,) for name in names} | {TOGETHER: tuple(names)}
    tested = set(zip(results.hospitals_N, results.patients_N, strict=True))
    hospitals = []
    for name in names:
        others = [other for other in names if other != name]
        hospitals.append(
            AtHospital(
                hospital=name,
                patients=sum(at == name for at, _ in tested),
                alone=results.of((name,), (name,)),
                together=results.of(names, (name,)),
                gain=results.better(names, (name,), (name,)),
                absent=results.of(others, (name,)),
                presence=results.better(names, others, (name,)),
            )
        )
    sign = 1 if results.higher_is_better else -1
    worst = []
    for kind in ("alone", "together", "absent"):
        each = [(value, one.hospital) for one in hospitals if (value := getattr(one, kind))]
        if each:
            value, name = min(each, key=lambda pair: (sign * pair[0].value, pair[1]))
            worst.append(Worst(kind=kind, hospital=name, value=value))
    return Measured(
        matrix={
            row: {name: results.of(trained, (name,)) for name in names}
            for row, trained in rows.items()
        },
        hospitals=tuple(hospitals),
        worst=tuple(worst),
        curve=tuple(
            results.of_size(size) for size in sorted({len(one.hospitals) for one in results.models})
        ),
    )


def half_width(values: Sequence[float]) -> float | None:
    """Return half the width of the interval of a mean over seeds (Student's t); None of one.

    >>> half_width([1.0]), round(half_width([0.2, 0.3, 0.7]), 4)
    (None, 0.6572)
    """
    if len(values) < 2:
        return None
    from scipy.stats import t as student

    quantile = float(student.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    return quantile * statistics.stdev(values) / math.sqrt(len(values))
