"""What a set of predicted drug lists is worth: set metrics per admission, intervals by patient.

Conventions, pinned down:

- Lists are compared as *sets* at a named normalisation level, the same normaliser on both sides,
  so order, duplicates and (at the string level) case and blanks never count.
- Precision, recall, Jaccard and F1 are computed per admission and averaged (macro). F1 is the mean
  of the admissions' F1, not the F1 of the means.
- An answer that is not in the format counts 0 in all four; ``parsed_only`` leaves it out instead.
- An empty list that was predicted has precision 0, and an empty truth has recall 0, but empty
  against empty is right: 1 in all four.
- The paper's accuracy, "the share of drugs that match", is ambiguous; both readings are given: over
  the predicted drugs (it equals precision) and over the true drugs (it equals recall).
- ``length_ratio`` is all predicted drugs over all true drugs; ``oov_rate`` is the share of all
  predicted drugs that are not in the training vocabulary. Unparseable answers predict nothing.
  Where the denominator is zero the value is None, never a made-up number.
- Intervals: percentile bootstrap over *patients*, because a patient's admissions are alike. With
  one patient there is no interval (None).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from common.config import DataConfig
from common.data.names import ATC_CHARACTERS, normalise, read_drug_map
from common.seeds import stream

METRICS = (
    "output_rate",
    "precision",
    "recall",
    "jaccard",
    "f1",
    "accuracy_over_predicted",
    "accuracy_over_true",
    "length_ratio",
    "oov_rate",
)
"""Names of the metrics, in the order of reports."""

CONFIDENCE = 0.95
"""Mass of the intervals."""
_RESAMPLES_AT_ONCE = 64
_SOURCES = {"accuracy_over_predicted": "precision", "accuracy_over_true": "recall"}
_COLUMNS = ("one", "parsed", "precision", "recall", "jaccard", "f1", "predicted", "true", "oov")
_RATIOS = {
    "output_rate": ("parsed", "one"),
    "precision": ("precision", "one"),
    "recall": ("recall", "one"),
    "jaccard": ("jaccard", "one"),
    "f1": ("f1", "one"),
    "length_ratio": ("predicted", "true"),
    "oov_rate": ("oov", "predicted"),
}


class Answered(Protocol):
    """One admission's true and predicted drugs."""

    @property
    def cluster(self) -> int:
        """Which admissions share a patient; only equality counts."""

    @property
    def truth(self) -> Collection[str]:
        """What was ordered."""

    @property
    def answer(self) -> Collection[str] | None:
        """None: the answer was not in the format."""


class Estimate(NamedTuple):
    """A value and its interval; None where it does not exist."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """The metrics of one set of predictions."""

    level: str
    samples: int
    patients: int
    parsed: int
    resamples: int
    estimates: Mapping[str, Estimate]
    """By name, over all samples."""
    parsed_only: Mapping[str, Estimate]
    """By name, over the samples with an answer in the format."""

    def value(self, name: str) -> float | None:
        """Return one metric over all samples."""
        return self.estimates[name].value

    def to_dict(self) -> dict[str, JsonValue]:
        """Return plain JSON: metrics by name, ``intervals`` and ``parsed_only`` beside."""
        return {
            "level": self.level,
            "samples": self.samples,
            "patients": self.patients,
            "parsed": self.parsed,
            **_values(self.estimates),
            "parsed_only": _values(self.parsed_only),
            "confidence": CONFIDENCE,
            "resamples": self.resamples,
            "intervals": {name: [e.low, e.high] for name, e in self.estimates.items()},
        }


def score(
    predictions: Sequence[Answered],
    *,
    level: str,
    vocabulary: Collection[str],
    drug_map: Mapping[str, tuple[str, ...]] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Metrics:
    """Score predictions under the conventions at the top of this module.

    Args:
        predictions: One for each admission.
        level: ``string``, ``ingredient`` or ``map`` (see ``common.data.names``).
        vocabulary: Drug names of the training split; normalised here.
        drug_map: For level ``map``.
        resamples: Bootstrap resamples; 0 for no intervals.
        seed: Of the bootstrap.

    Raises:
        ValueError: No predictions.
    """
    if not predictions:
        raise ValueError("no predictions to score")
    known = normalised_set(vocabulary, level=level, drug_map=drug_map)
    table = np.array([_measure(one, level, drug_map, known) for one in predictions])
    parsed = table[:, _COLUMNS.index("parsed")] == 1
    # Both sets of metrics see the same resamples.
    sums_km, drawn_rm = _resampled_sums(
        np.hstack([table, table * parsed[:, None]]),
        [one.cluster for one in predictions],
        resamples,
        stream(seed, "bootstrap"),
    )
    overall, among_parsed = (
        _estimates(sums_km[:, half], None if drawn_rm is None else drawn_rm[:, half])
        for half in (slice(len(_COLUMNS)), slice(len(_COLUMNS), None))
    )
    return Metrics(
        level=level,
        samples=len(predictions),
        patients=len(sums_km),
        parsed=int(parsed.sum()),
        resamples=resamples,
        estimates=overall,
        parsed_only=among_parsed,
    )


def f1_by_admission(
    predictions: Sequence[Answered],
    *,
    level: str,
    drug_map: Mapping[str, tuple[str, ...]] | None = None,
) -> list[float]:
    """Return the F1 of every admission; an answer that is not in the format has 0."""
    place = _COLUMNS.index("f1")
    return [_measure(one, level, drug_map, frozenset())[place] for one in predictions]


def interval_of_mean(
    values: Sequence[float],
    clusters: Sequence[int],
    *,
    resamples: int,
    seed: int,
    name: str = "bootstrap",
) -> Estimate:
    """Return a mean and its interval by percentile bootstrap over patients.

    Args:
        values: One for each admission; of a paired comparison, the difference.
        clusters: Which admissions share a patient.
        resamples: 0 for no interval.
        seed: Of the bootstrap; equal seeds and patients see equal resamples.
        name: Of the seed's stream.

    >>> interval_of_mean([1.0, 1.0, 0.0], [1, 1, 2], resamples=200, seed=0)
    Estimate(value=0.6666666666666666, low=0.0, high=1.0)

    Raises:
        ValueError: No values.
    """
    if not len(values):
        raise ValueError("no values to average")
    table_nm = np.column_stack([values, np.ones(len(values))])
    _, drawn_rm = _resampled_sums(table_nm, clusters, resamples, stream(seed, name))
    value = float(table_nm[:, 0].mean())
    if drawn_rm is None:
        return Estimate(value, None, None)
    return Estimate(value, *_interval(drawn_rm[:, 0] / drawn_rm[:, 1]))


def drug_map_of(data: DataConfig) -> dict[str, tuple[str, ...]] | None:
    """Return the map that level ``map`` and the ATC levels need; None at other levels.

    Raises:
        UserError: See ``read_drug_map``.
    """
    if data.normalisation not in ("map", *ATC_CHARACTERS):
        return None
    return read_drug_map(Path(data.drug_map), data.normalisation)


def normalised_set(
    names: Collection[str], *, level: str, drug_map: Mapping[str, tuple[str, ...]] | None = None
) -> frozenset[str]:
    """Return the distinct items that ``names`` count as; a combination may be several.

    >>> sorted(normalised_set(["Insulin", " INSULIN ", "Aspirin"], level="string"))
    ['aspirin', 'insulin']
    """
    return frozenset(item for name in names for item in normalise(name, level, drug_map))


def _values(estimates: Mapping[str, Estimate]) -> dict[str, JsonValue]:
    return {name: estimate.value for name, estimate in estimates.items()}


def _measure(
    one: Answered,
    level: str,
    drug_map: Mapping[str, tuple[str, ...]] | None,
    known: frozenset[str],
) -> tuple[float, ...]:
    """Return one admission's row in the order of ``_COLUMNS``."""
    truth = normalised_set(one.truth, level=level, drug_map=drug_map)
    if one.answer is None:
        return (1, 0, 0, 0, 0, 0, 0, len(truth), 0)
    answer = normalised_set(one.answer, level=level, drug_map=drug_map)
    shared, union = len(truth & answer), len(truth | answer)
    if union == 0:
        return (1, 1, 1, 1, 1, 1, 0, 0, 0)
    return (
        *(1, 1),
        shared / len(answer) if answer else 0,
        shared / len(truth) if truth else 0,
        shared / union,
        2 * shared / (len(truth) + len(answer)),
        *(len(answer), len(truth), len(answer - known)),
    )


def _resampled_sums(
    table_nm: NDArray[np.float64],
    patients: Sequence[int],
    resamples: int,
    random: np.random.Generator,
) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    """Return the column sums of each patient, and those of every resample of patients.

    The second is (resamples, M), and None without resamples or with one patient alone.
    """
    names, place_n = np.unique(patients, return_inverse=True)
    sums_km = np.zeros((len(names), table_nm.shape[1]))
    np.add.at(sums_km, place_n, table_nm)
    if not resamples or len(names) < 2:
        return sums_km, None
    shares = np.full(len(names), 1 / len(names))
    sizes = [
        min(_RESAMPLES_AT_ONCE, resamples - s) for s in range(0, resamples, _RESAMPLES_AT_ONCE)
    ]
    return sums_km, np.concatenate(
        [random.multinomial(len(names), shares, size) @ sums_km for size in sizes]
    )


def _interval(values_r: NDArray[np.float64]) -> list[float]:
    """Return the percentiles between which ``CONFIDENCE`` of the resamples lies."""
    tail = (1 - CONFIDENCE) / 2
    bounds: list[float] = np.quantile(values_r, [tail, 1 - tail]).tolist()
    return bounds


def _estimates(
    sums_km: NDArray[np.float64], drawn_rm: NDArray[np.float64] | None
) -> dict[str, Estimate]:
    point_m = sums_km.sum(axis=0)
    found: dict[str, Estimate] = {}
    for name in METRICS:
        above, below = (_COLUMNS.index(column) for column in _RATIOS[_SOURCES.get(name, name)])
        if point_m[below] == 0:
            found[name] = Estimate(None, None, None)
            continue
        value = float(point_m[above] / point_m[below])
        low = high = None
        if drawn_rm is not None:
            # A resample without any denominator has no value of its own.
            usable_rm = drawn_rm[drawn_rm[:, below] > 0]
            if len(usable_rm):
                low, high = _interval(usable_rm[:, above] / usable_rm[:, below])
        found[name] = Estimate(value, low, high)
    return found
