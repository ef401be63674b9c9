"""What the findings of an audit are made of: complaints, verdicts, intervals."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

FALSE_ALARM = 1e-6
"""A correct mechanism fails one statistical test with at most this probability."""


def verdict_of(good: str, complaints: Sequence[str]) -> str:
    """Return a check's verdict: ``good``, or what is wrong."""
    return "wrong " + ", ".join(complaints) if complaints else good


def noise_complaints(noise_SP: np.ndarray[Any, Any]) -> list[str]:
    """Return what is wrong with noise that claims to be independent standard normal.

    Args:
        noise_SP: Releases of a zero sum over the claimed standard deviation, one row per step.
    """
    from scipy import stats

    complaints = []
    values = noise_SP.ravel()
    tails = (FALSE_ALARM / 2, 1 - FALSE_ALARM / 2)
    low, high = stats.chi2.ppf(tails, df=values.size)
    if not low <= np.sum(values**2) <= high:
        complaints.append("variance")
    if stats.kstest(values[:1_000_000], "norm").pvalue < FALSE_ALARM:
        complaints.append("shape")
    steps, width = noise_SP.shape
    lagged = [np.corrcoef(row[:-lag], row[lag:])[0, 1] for row in noise_SP for lag in (1, 2)]
    across = np.corrcoef(noise_SP)[np.triu_indices(steps, 1)]
    if np.abs([*lagged, *across]).max() > 6 / math.sqrt(width - 2):
        complaints.append("correlation")
    return complaints


def spread_interval(deviation: float, count: int) -> tuple[float, float]:
    """Return the 95% interval of a standard deviation that ``count`` normal values showed.

    >>> [round(end, 3) for end in spread_interval(1.0, 1000)]
    [0.958, 1.046]
    """
    from scipy.stats import chi2

    low, high = (deviation * math.sqrt(count / chi2.ppf(end, count)) for end in (0.975, 0.025))
    return float(low), float(high)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95% interval of a mean (Student's t).

    >>> [round(end, 2) for end in mean_interval([1.0, 2.0, 3.0])]
    [-0.48, 4.48]
    """
    from scipy.stats import t

    wide = float(t.ppf(0.975, len(values) - 1)) * float(np.std(values, ddof=1))
    middle = float(np.mean(values))
    return middle - wide / math.sqrt(len(values)), middle + wide / math.sqrt(len(values))
