"""How far two ways of answering the same cases are apart."""

from collections.abc import Sequence

import numpy as np

from common.evaluation.metrics import Estimate
from common.seeds import stream


def paired_difference(
    first: Sequence[float],
    second: Sequence[float],
    clusters: Sequence[int],
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Return the mean of ``second - first`` with its percentile bootstrap interval over patients.

    What makes a case hard is hard for both, so the interval of the difference is narrower than
    the two intervals beside each other.

    Args:
        first: One value for each case.
        second: The other's, in the same order.
        clusters: Which cases share a patient; with one patient there is no interval.
        resamples: Bootstrap resamples of patients.
        confidence: Mass of the interval.
        seed: Of the bootstrap.

    >>> paired_difference([0.2, 0.4], [0.3, 0.5], [1, 2], resamples=50).value
    0.1

    Raises:
        ValueError: No cases, or unequally many.
    """
    difference_n = np.subtract(second, first)
    _, cluster_n = np.unique(clusters, return_inverse=True)
    if not len(difference_n) or len(cluster_n) != len(difference_n):
        raise ValueError("a difference needs the same cases on both sides, at least one")
    value = round(float(difference_n.mean()), 12)
    patients = int(cluster_n.max()) + 1
    if patients < 2 or not resamples:
        return Estimate(value, None, None)
    sums_k = np.bincount(cluster_n, weights=difference_n)
    counts_k = np.bincount(cluster_n)
    shares = np.full(patients, 1 / patients)
    drawn_rk = stream(seed, "bootstrap").multinomial(patients, shares, resamples)
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn_rk @ sums_k / (drawn_rk @ counts_k), [tail, 1 - tail]).tolist()
    return Estimate(value, low, high)
