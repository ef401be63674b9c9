"""Threshold and recalibration against a plain search and a known source."""

import numpy as np
import pytest
from sklearn.metrics import f1_score

from common.errors import UserError
from common.evaluation.cutoff import fit_cutoff
from common.evaluation.ranking_metrics import calibration


def drawn(admissions, names, seed):
    """Scores, and truths whose log odds are 4 + 1.5 log score."""
    random = np.random.default_rng(seed)
    scores = random.dirichlet(np.full(names, 0.3), size=admissions)
    odds = np.exp(4 + 1.5 * np.log(np.maximum(scores, 1e-30)))
    return scores, random.random(scores.shape) < odds / (1 + odds)


def test_the_threshold_is_the_best_of_all():
    scores, truth = drawn(30, 20, 0)
    truth[np.arange(30), scores.argmax(axis=1)] = True
    found = fit_cutoff(list(scores), truth.tolist(), [0] * 30)

    def mean_f1(threshold):
        listed = np.array([row >= min(threshold, row.max()) for row in scores])
        return f1_score(truth, listed, average="samples")

    best = max(map(mean_f1, np.unique(scores)))
    assert found.f1 == pytest.approx(mean_f1(found.threshold))
    # The grid is finer than the differences that thirty admissions can see.
    assert found.f1 == pytest.approx(best, abs=0.01)
    lists = [set(found.chosen(row)) for row in scores]
    assert lists == [set(np.flatnonzero(row >= min(found.threshold, row.max()))) for row in scores]


def test_drugs_outside_the_formulary_count_as_missed():
    scores, truth = [np.array([0.9, 0.1])], [[True, False]]
    assert fit_cutoff(scores, truth, [0]).f1 == 1
    assert fit_cutoff(scores, truth, [2]).f1 == pytest.approx(2 * 1 / (1 + 3))


def test_confidences_are_recalibrated_probabilities():
    scores, truth = drawn(400, 50, 1)
    found = fit_cutoff(list(scores), truth.tolist(), [0] * 400)
    assert found.slope == pytest.approx(1.5, rel=0.1)
    assert found.intercept == pytest.approx(4, rel=0.1)
    fresh, outcome = drawn(400, 50, 2)
    told = np.array([found.confidence(row) for row in fresh])
    assert calibration(told.ravel(), outcome.ravel()).expected_error < 0.02
    assert calibration(fresh.ravel(), outcome.ravel()).expected_error > 0.02


def test_a_ranking_that_says_the_contrary_keeps_its_order_and_the_base_rate():
    scores, truth = drawn(100, 20, 3)
    found = fit_cutoff(list(scores), (~truth).tolist(), [0] * 100)
    told = found.confidence(np.array([0.01, 0.5]))
    assert told[0] < told[1]
    assert told == pytest.approx((~truth).mean(), abs=0.05)


def test_one_sided_outcomes_give_no_certainty():
    found = fit_cutoff([np.array([0.6, 0.4])], [[True, True]], [0])
    assert np.all(found.confidence(np.array([0.6, 0.4])) < 1)


def test_without_validation_patients_there_is_no_threshold():
    with pytest.raises(UserError, match=r"raise data\.validation-fraction"):
        fit_cutoff([], [], [])
