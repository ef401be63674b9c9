"""Skew: against scipy's Jensen-Shannon, and against chance."""

import itertools

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon

from common.data.samples import Admission
from common.data.skew import drug_skew, mean_divergence


def sample(patient, drugs):
    return Admission(patient=patient, admission=patient, sex="F", age=50, drugs=tuple(drugs))


def test_divergence_equals_scipy():
    draw = np.random.default_rng(0)
    counts = draw.integers(0, 5, size=(4, 30)).astype(float)
    expected = np.mean(
        [jensenshannon(a, b, base=2) ** 2 for a, b in itertools.combinations(counts, 2)]
    )
    assert mean_divergence(counts) == pytest.approx(expected, abs=1e-12)


def test_equal_and_disjoint_hospitals():
    same = [[sample(1, "ab")], [sample(2, "AB")]]
    assert drug_skew(same).observed == pytest.approx(0)
    apart = [[sample(n, "ab") for n in range(10)], [sample(n, "cd") for n in range(10, 20)]]
    found = drug_skew(apart)
    assert found.observed == pytest.approx(1)
    assert found.null < 0.3
    assert found.p_value < 0.05


def test_random_hospitals_are_not_called_skewed():
    draw = np.random.default_rng(1)
    rejected = 0
    for _ in range(40):
        hospitals = [
            [
                sample(100 * h + n, draw.choice(list("abcdefgh"), 3, replace=False))
                for n in range(20)
            ]
            for h in range(3)
        ]
        rejected += drug_skew(hospitals, permutations=39).p_value <= 0.05
    assert rejected <= 6


def test_patients_stay_whole_in_the_null():
    # Twenty samples of one patient each: dealing samples instead of patients would hide it.
    hospitals = [
        [sample(h, [f"drug-{h}"]) for _ in range(20)] + [sample(h + 10, ["common"])]
        for h in range(2)
    ]
    found = drug_skew(hospitals)
    assert found.p_value > 0.2


def test_one_hospital_has_no_skew():
    assert drug_skew([[sample(1, "ab")]]) == (0.0, 0.0, 1.0)
