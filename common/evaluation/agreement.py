"""Krippendorff's alpha: agreement of any number of raters, some of whom may leave units out.

Exact: everything is counted in fractions, so a value does not depend on the order of the units.

Source: K. Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), sections A to E.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from itertools import permutations
from typing import Any

Difference = Callable[[Any, Any, Mapping[Any, Fraction]], Fraction]


def _nominal(a: Any, b: Any, totals: Mapping[Any, Fraction]) -> Fraction:
    return Fraction(a != b)


def _interval(a: Any, b: Any, totals: Mapping[Any, Fraction]) -> Fraction:
    return Fraction(a - b) ** 2


def _ordinal(a: Any, b: Any, totals: Mapping[Any, Fraction]) -> Fraction:
    low, high = min(a, b), max(a, b)
    between = sum(count for value, count in totals.items() if low <= value <= high)
    return (between - (totals[low] + totals[high]) / 2) ** 2


_DIFFERENCES: Mapping[str, Difference] = {
    "nominal": _nominal,
    "ordinal": _ordinal,
    "interval": _interval,
}


def krippendorff_alpha(units: Sequence[Sequence[Any]], metric: str = "nominal") -> float | None:
    """Return alpha = 1 - observed / expected disagreement.

    Args:
        units: For each rated thing the values that raters gave it, in any order, missing ones left
            out. Things with fewer than two values say nothing about agreement, and are left out.
        metric: ``nominal`` (equal or not), ``ordinal`` (ranks) or ``interval`` (distances);
            the last two need numbers.

    Returns:
        1 for perfect agreement, 0 for what chance gives, negative below chance; None where
        nothing is rated twice, or where all values are the same (no variation to agree on).

    >>> krippendorff_alpha([["yes", "yes"], ["no", "no"]])
    1.0
    >>> krippendorff_alpha([["yes", "yes"], ["yes"]]) is None
    True
    """
    weights: dict[tuple[Any, Any], Fraction] = {}
    for values in units:
        if len(values) < 2:
            continue
        pairs = Counter(permutations(values, 2))
        for pair, count in pairs.items():
            weights[pair] = weights.get(pair, Fraction(0)) + Fraction(count, len(values) - 1)
    totals: dict[Any, Fraction] = {}
    for (value, _), weight in weights.items():
        totals[value] = totals.get(value, Fraction(0)) + weight
    number = sum(totals.values(), Fraction(0))
    difference = _DIFFERENCES[metric]
    expected = sum(
        (
            totals[a] * totals[b] * difference(a, b, totals)
            for a in totals
            for b in totals
            if a != b
        ),
        Fraction(0),
    )
    if not expected:
        return None
    observed = sum(
        (weight * difference(a, b, totals) for (a, b), weight in weights.items()), Fraction(0)
    )
    return float(1 - (number - 1) * observed / expected)


def unanimous_share(units: Sequence[Sequence[Any]]) -> float | None:
    """Return the share of the things rated at least twice whose values are all equal.

    >>> unanimous_share([[1, 1], [1, 0], [1]])
    0.5
    """
    rated = [values for values in units if len(values) > 1]
    return sum(len(set(values)) == 1 for values in rated) / len(rated) if rated else None
