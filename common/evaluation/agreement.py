"""Krippendorff's alpha: agreement of any number of raters, some of whom may leave units out.

Exact: everything is counted in fractions, so a value does not depend on the order of the units.

Source: K. Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), sections A to E.
"""

from collections import defaultdict
from collections.abc import Sequence
from fractions import Fraction
from itertools import permutations, product
from typing import Any


def krippendorff_alpha(units: Sequence[Sequence[Any]], metric: str = "nominal") -> float | None:
    """Return alpha = 1 - observed / expected disagreement.

    Args:
        units: For each rated thing the values that raters gave it, in any order. Things with fewer
            than two values say nothing about agreement.
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
    weights: defaultdict[tuple[Any, Any], Fraction] = defaultdict(Fraction)
    for values in units:
        for pair in permutations(values, 2):
            weights[pair] += Fraction(1, len(values) - 1)
    totals: defaultdict[Any, Fraction] = defaultdict(Fraction)
    for (value, _), weight in weights.items():
        totals[value] += weight

    def difference(a: Any, b: Any) -> Fraction:
        if metric == "nominal":
            return Fraction(a != b)
        if metric == "interval":
            return Fraction(a - b) ** 2
        between = sum(n for value, n in totals.items() if min(a, b) <= value <= max(a, b))
        return (between - (totals[a] + totals[b]) / 2) ** 2

    pairs = product(totals, repeat=2)
    expected = sum(totals[a] * totals[b] * difference(a, b) for a, b in pairs if a != b)
    if not expected:
        return None
    observed = sum(weight * difference(a, b) for (a, b), weight in weights.items())
    return float(1 - (sum(totals.values()) - 1) * observed / expected)


def unanimous_share(units: Sequence[Sequence[Any]]) -> float | None:
    """Return the share of the things rated at least twice whose values are all equal.

    >>> unanimous_share([[1, 1], [1, 0], [1]])
    0.5
    """
    rated = [values for values in units if len(values) > 1]
    return sum(len(set(values)) == 1 for values in rated) / len(rated) if rated else None
