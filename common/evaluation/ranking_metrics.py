"""Metrics of rankings and of confidences: average precision, precision at k, calibration.

A true drug that the ranking does not hold is never found: it counts as missed at every depth.

Shapes: N ranked drugs.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

BINS = 10


def average_precision(hits_N: Sequence[bool], true: int) -> float:
    """Return the area under one admission's precision-recall curve, as steps.

    The field's PRAUC is its mean over admissions.

    Args:
        hits_N: By falling probability, whether each drug was ordered.
        true: How many were ordered, those that are not ranked included.

    >>> round(average_precision([True, False, True], 2), 4)
    0.8333
    >>> average_precision([], 3)
    0.0
    """
    if not true:
        raise ValueError("average precision needs a true drug")
    hits = np.asarray(hits_N, dtype=bool)
    precision_N = hits.cumsum() / np.arange(1, len(hits) + 1)
    return float(precision_N[hits].sum() / true)


def at_k(hits_N: Sequence[bool], true: int, k: int) -> tuple[float, float]:
    """Return precision and recall of a ranking's first k drugs.

    Args:
        hits_N: By falling probability, whether each drug was ordered.
        true: How many were ordered, those that are not ranked included.
        k: Depth; a shorter ranking misses what it does not hold.

    >>> at_k([True, False, True, True], 4, 2)
    (0.5, 0.25)
    """
    found = sum(hits_N[:k])
    return found / k, found / true


class Bin(NamedTuple):
    """Confidences of one band."""

    pairs: int
    confidence: float
    """Their mean."""
    ordered: float
    """Share of them that were in the true list."""


class Calibration(NamedTuple):
    """How confidences agree with what was ordered."""

    brier: float
    """Mean squared difference (Brier, 1950)."""
    expected_error: float
    """Mean difference of a band, weighted by its pairs (Naeini et al., AAAI 2015)."""
    bins: tuple[Bin, ...]
    """The bands with something in them, of ten equal ones."""


def calibration(confidences: Sequence[float], ordered: Sequence[bool]) -> Calibration:
    """Compare confidences with outcomes.

    Args:
        confidences: One for each (admission, drug).
        ordered: Whether the drug was in that admission's list.

    >>> found = calibration([0.9, 0.8, 0.1, 0.3], [True, True, False, False])
    >>> round(found.brier, 4), round(found.expected_error, 4)
    (0.0375, 0.175)

    Raises:
        ValueError: If there is nothing to compare.
    """
    if not len(confidences):
        raise ValueError("no confidences to compare")
    confidence: NDArray[np.float64] = np.asarray(confidences, dtype=np.float64)
    true = np.asarray(ordered, dtype=np.float64)
    band = np.minimum((confidence * BINS).astype(int), BINS - 1)
    bins = [
        Bin(int(here.sum()), float(confidence[here].mean()), float(true[here].mean()))
        for number in range(BINS)
        if (here := band == number).any()
    ]
    gaps = sum(one.pairs * abs(one.confidence - one.ordered) for one in bins)
    return Calibration(
        brier=float(np.square(confidence - true).mean()),
        expected_error=gaps / len(confidence),
        bins=tuple(bins),
    )
