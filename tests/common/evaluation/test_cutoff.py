"""Threshold and recalibration against a plain search and a known source."""

import numpy as np
import pytest
from sklearn.metrics import f1_score

from common.errors import UserError
from common.evaluation.cutoff import Frequencies, fit_cutoff
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


def test_what_a_list_may_not_name_counts_for_nothing():
    scores, truth = drawn(30, 20, 1)
    allowed = np.ones_like(truth)
    allowed[:, :5] = False
    narrow = scores[:, 5:], truth[:, 5:]
    given = Frequencies(log_odds=tuple(np.linspace(-3, 1, 20)), length=4)
    fewer = Frequencies(log_odds=given.log_odds[5:], length=4)
    loud = np.where(allowed, scores, 0.9)
    for wide_f, narrow_f in ((None, None), (given, fewer)):
        wide = fit_cutoff(list(loud), (truth & allowed).tolist(), [0] * 30, wide_f, allowed)
        alone = fit_cutoff(list(narrow[0]), narrow[1].tolist(), [0] * 30, narrow_f)
        assert wide.threshold == alone.threshold
        assert (wide.f1, wide.slope) == pytest.approx((alone.f1, alone.slope))
        assert (wide.intercept, wide.weight) == pytest.approx((alone.intercept, alone.weight))


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


def test_frequencies_are_weighed_beside_the_score_and_give_the_length():
    random = np.random.default_rng(5)
    scores = random.dirichlet(np.full(40, 0.3), size=1500)
    common = random.normal(-1, 1.5, 40)
    odds = 3 + 1.2 * np.log(np.maximum(scores, 1e-30)) + 0.7 * common
    truth = random.random(scores.shape) < 1 / (1 + np.exp(-odds))
    told = Frequencies(log_odds=tuple(common), length=7)
    found = fit_cutoff(list(scores), truth.tolist(), [0] * 1500, told)
    assert (found.slope, found.weight, found.intercept) == pytest.approx((1.2, 0.7, 3), rel=0.1)
    assert found.threshold is None
    expected = 1 / (
        1 + np.exp(-(found.slope * np.log(scores[0]) + found.weight * common + found.intercept))
    )
    assert found.confidence(scores[0]) == pytest.approx(expected)
    assert found.chosen(scores[0]) == np.argsort(-expected, kind="stable")[:7].tolist()
    listed = np.array([np.isin(np.arange(40), found.chosen(row)) for row in scores])
    assert found.f1 == pytest.approx(f1_score(truth, listed, average="samples", zero_division=0))


def test_scores_and_frequencies_that_mislead_do_not_turn_a_ranking_round():
    scores, truth = drawn(200, 20, 6)
    common = np.log(truth.mean(axis=0) + 0.01)
    against = fit_cutoff(
        list(scores), truth.tolist(), [0] * 200, Frequencies(log_odds=tuple(-common), length=3)
    )
    alone = fit_cutoff(list(scores), truth.tolist(), [0] * 200)
    assert (against.weight, against.slope) == (0, alone.slope)
    turned = fit_cutoff(
        list(1 / (scores + 1e-3)),
        truth.tolist(),
        [0] * 200,
        Frequencies(log_odds=tuple(common), length=3),
    )
    assert turned.slope == 0
    assert turned.weight > 0


def test_without_validation_patients_there_is_no_threshold():
    with pytest.raises(UserError, match=r"raise data\.validation-fraction"):
        fit_cutoff([], [], [])
