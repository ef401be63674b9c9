"""How different the hospitals' drug distributions are, and how different chance makes them.

Few samples alone make distributions differ: four random shards of the 100-patient demo stand .171
apart. So the measure is always shown beside its permutation null. It is the Jensen-Shannon
divergence in bits (base 2: 0 equal, 1 disjoint), which is the square of the metric distance.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.data.names import normalise_string
from common.data.samples import Admission
from common.seeds import stream


class Skew(NamedTuple):
    """Mean pairwise Jensen-Shannon divergence in bits, observed and by chance."""

    observed: float
    null: float
    """Mean over permutations of the patients, hospital sizes (in patients) kept."""
    p_value: float
    """Share of permutations (the observed one counted) at least as far apart as observed."""


def drug_skew(
    hospitals: Sequence[Sequence[Admission]], *, seed: int = 0, permutations: int = 50
) -> Skew:
    """Measure how far the hospitals' drug distributions are apart, against a permutation null.

    A hospital's distribution is the share of each string-level drug name among its (admission,
    drug) pairs.

    Args:
        hospitals: Samples by hospital; patients disjoint.
        seed: Seed of the permutations.
        permutations: How often patients are dealt anew.

    Returns:
        Zeros, and p = 1, for fewer than two hospitals.
    """
    if len(hospitals) < 2:
        return Skew(0.0, 0.0, 1.0)
    names: dict[str, int] = {}
    folded: dict[str, int] = {}
    owners: list[int] = []
    patients: list[int] = []
    drugs: list[int] = []
    numbers: dict[int, int] = {}
    for place, admissions in enumerate(hospitals):
        for one in admissions:
            if one.patient not in numbers:
                numbers[one.patient] = len(owners)
                owners.append(place)
            for drug in one.drugs:
                if drug not in folded:
                    folded[drug] = names.setdefault(normalise_string(drug), len(names))
                patients.append(numbers[one.patient])
                drugs.append(folded[drug])
    owner_P = np.asarray(owners)
    patient_N, drug_N = np.asarray(patients, dtype=int), np.asarray(drugs, dtype=int)

    def apart(owner: NDArray[np.int_]) -> float:
        cells = owner[patient_N] * len(names) + drug_N
        counts = np.bincount(cells, minlength=len(hospitals) * len(names))
        return mean_divergence(counts.reshape(len(hospitals), len(names)).astype(float))

    observed = apart(owner_P)
    draw = stream(seed, "skew", "permutations")
    null = np.array([apart(draw.permutation(owner_P)) for _ in range(permutations)])
    reached = int((null >= observed - 1e-12).sum())
    return Skew(observed, float(null.mean()), (1 + reached) / (1 + permutations))


def mean_divergence(counts_KV: NDArray[np.float64]) -> float:
    """Return the mean pairwise Jensen-Shannon divergence (bits) of the rows' distributions.

    Args:
        counts_KV: Non-negative counts, one row for each of K hospitals over V names.

    >>> mean_divergence(np.array([[1.0, 0.0], [0.0, 2.0]]))
    1.0
    """
    totals = counts_KV.sum(axis=1, keepdims=True)
    shares = counts_KV / np.where(totals > 0, totals, 1)
    pairs = itertools.combinations(shares, 2)
    return float(np.mean([_divergence(left, right) for left, right in pairs]))


def _divergence(left: NDArray[np.float64], right: NDArray[np.float64]) -> float:
    middle = (left + right) / 2
    return sum(
        float((side[side > 0] * np.log2(side[side > 0] / middle[side > 0])).sum()) / 2
        for side in (left, right)
    )
