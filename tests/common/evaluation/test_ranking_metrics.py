"""Average precision and Brier against scikit-learn, the calibration error against a count."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, brier_score_loss

from common.evaluation.ranking_metrics import average_precision, calibration


@pytest.mark.parametrize("seed", range(5))
def test_average_precision_is_scikit_learns(seed):
    random = np.random.default_rng(seed)
    scores = random.random(40)
    truth = random.random(40) < 0.3
    order = np.argsort(-scores)
    found = average_precision(truth[order].tolist(), int(truth.sum()))
    assert found == pytest.approx(average_precision_score(truth, scores))


def test_a_true_drug_that_is_not_ranked_is_never_found():
    truth, scores = [1, 0, 1], [0.9, 0.8, 0.1]
    # scikit-learn knows ranked drugs alone: a missed one scales its recall.
    of_ranked = average_precision_score(truth, scores)
    assert average_precision([True, False, True], 3) == pytest.approx(of_ranked * 2 / 3)


def test_nothing_true_has_no_average_precision():
    with pytest.raises(ValueError, match="true drug"):
        average_precision([False], 0)


def test_calibration_is_counted_by_hand():
    random = np.random.default_rng(0)
    told = random.random(500)
    told[:2] = 0.0, 1.0
    true = random.random(500) < told**2
    found = calibration(told.tolist(), true.tolist())
    assert found.brier == pytest.approx(brier_score_loss(true, told))
    error = 0.0
    for low in np.arange(10) / 10:
        here = [
            (t, o)
            for t, o in zip(told, true, strict=True)
            if low <= t < low + 0.1 or (t == 1 and low == 0.9)
        ]
        error += abs(sum(t for t, _ in here) - sum(o for _, o in here)) / 500
    assert found.expected_error == pytest.approx(error)
    assert sum(one.pairs for one in found.bins) == 500


def test_empty_bands_are_left_out():
    assert [one.pairs for one in calibration([0.05, 0.95, 1.0], [False, True, True]).bins] == [1, 2]
