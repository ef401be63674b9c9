"""Paired differences against a bootstrap written as a loop, and against unpaired intervals."""

import numpy as np
import pytest

from common.evaluation.paired import paired_difference


@pytest.fixture
def cases():
    """Hard and easy cases, on which the second is a little better."""
    random = np.random.default_rng(3)
    first = random.uniform(0, 0.8, 60)
    second = first + 0.05 + random.normal(0, 0.05, 60)
    return first, second, np.repeat(np.arange(20), 3)


def test_the_interval_is_that_of_a_loop_over_resampled_patients(cases):
    first, second, clusters = cases
    found = paired_difference(first, second, clusters, resamples=4000)
    random = np.random.default_rng(11)
    means = []
    for _ in range(4000):
        drawn = random.integers(0, 20, 20)
        places = np.concatenate([np.flatnonzero(clusters == one) for one in drawn])
        means.append((second[places] - first[places]).mean())
    low, high = np.quantile(means, [0.025, 0.975])
    assert found.value == pytest.approx((second - first).mean())
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.002)
    assert found.low > 0


def test_a_patient_s_cases_are_drawn_together(cases):
    """Were cases drawn alone, equal cases of a patient would look like more evidence."""
    first, second, _ = cases
    pairs = [np.repeat(values[:20], 3) for values in (first, second)]
    grouped = paired_difference(*pairs, np.repeat(np.arange(20), 3))
    alone = paired_difference(first[:20], second[:20], np.arange(20))
    assert (grouped.low, grouped.high) == pytest.approx((alone.low, alone.high))


def test_one_patient_gives_no_interval():
    assert paired_difference([0.1], [0.4], [5])[1:] == (None, None)


@pytest.mark.parametrize("cases", [([], [], []), ([1.0, 2.0], [1.0, 2.0], [1])])
def test_without_equal_cases_there_is_no_difference(cases):
    with pytest.raises(ValueError, match="same cases"):
        paired_difference(*cases)
