"""Where a ranking of drugs is cut into a list, and what confidence a score stands for.

Both are fitted on a hospital's own validation split, never on held-out patients: the threshold with
the best mean F1, and a recalibration of two numbers (Platt, 1999, on the log of the score).

A handful of validation admissions chooses a threshold by accident. With ``Frequencies`` the
training split helps: how often it orders a drug enters the recalibration beside the score (a third
number), and lists are as long as its lists are on average.

Shapes: N names of the formulary, A admissions, K numbers that a confidence is made of.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError

_GRID = 400
_SMALLEST_SCORE = 1e-30
_FLATTEST_SLOPE = 1e-6
"""A ranking that says nothing, or the contrary, keeps its order; its confidences are all alike."""


@dataclass(frozen=True, kw_only=True)
class Frequencies:
    """What a hospital's training split says of every admission alike."""

    log_odds: tuple[float, ...]
    """Of each name of the formulary being in a list."""
    length: int
    """Mean number of drugs of a list, rounded."""


@dataclass(frozen=True, kw_only=True)
class Cutoff:
    """What one hospital's validation split says about one model's scores."""

    threshold: float | None
    """Scores from here on are in the list; None: lists are as long as ``frequencies`` says."""
    slope: float
    """Of the log odds over the log score."""
    intercept: float
    admissions: int
    """How many it was fitted on."""
    f1: float
    """Mean F1 on those; with a threshold it flatters, being chosen there."""
    weight: float = 0.0
    """Of the log odds over those of ``frequencies``."""
    frequencies: Frequencies | None = None

    def confidence(self, scores_N: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the probability that each drug is in the true list.

        >>> cut = Cutoff(threshold=0.1, slope=1.0, intercept=0.0, admissions=1, f1=1.0)
        >>> cut.confidence(np.array([1.0, 1/3])).round(3).tolist()
        [0.5, 0.25]
        """
        odds_N = self.slope * _log(scores_N) + self.intercept
        if self.frequencies is not None:
            odds_N = odds_N + self.weight * np.array(self.frequencies.log_odds)
        confidence_N: NDArray[np.float64] = np.exp(-np.logaddexp(0.0, -odds_N))
        return confidence_N

    def order(self, scores_N: NDArray[np.float64]) -> list[int]:
        """Return all places, the likeliest first; ties in the order of the formulary."""
        # Confidences may round to the same number where scores do not.
        likely_N = scores_N if self.frequencies is None else self.confidence(scores_N)
        order: list[int] = np.argsort(-likely_N, kind="stable").tolist()
        return order

    def chosen(self, scores_N: NDArray[np.float64]) -> list[int]:
        """Return the places of the listed drugs, the likeliest first; never none.

        >>> cut = Cutoff(threshold=0.1, slope=1.0, intercept=0.0, admissions=1, f1=1.0)
        >>> cut.chosen(np.array([0.1, 0.7, 0.05])), cut.chosen(np.array([0.01, 0.02]))
        ([1, 0], [1])
        """
        if self.threshold is not None:
            length = int((scores_N >= self.threshold).sum())
        else:
            assert self.frequencies is not None
            length = self.frequencies.length
        return self.order(scores_N)[: max(1, length)]


def fit_cutoff(
    scores: Sequence[NDArray[np.float64]],
    truths: Sequence[Sequence[bool]],
    missing: Sequence[int],
    frequencies: Frequencies | None = None,
    open_to: Sequence[Sequence[bool]] | None = None,
) -> Cutoff:
    """Fit threshold and recalibration on a validation split.

    Args:
        scores: For each admission [N].
        truths: For each admission, which of the N drugs were ordered.
        missing: For each admission, how many ordered drugs are not in the formulary.
        frequencies: Of the training split, where it is to help.
        open_to: For each admission, which of the N drugs a list may name; None: all.

    Raises:
        UserError: If there is no admission.
    """
    require_validation(scores)
    scores_AN = np.array(scores)
    truth_AN = np.array(truths, dtype=bool)
    true_A = truth_AN.sum(axis=1) + np.array(missing)
    open_AN = np.ones_like(truth_AN) if open_to is None else np.array(open_to, dtype=bool)
    if frequencies is None:
        threshold, f1 = _best_threshold(scores_AN, truth_AN, true_A, open_AN)
        slope, intercept = _platt(scores_AN[open_AN], truth_AN[open_AN])
        return Cutoff(
            threshold=threshold, slope=slope, intercept=intercept, admissions=len(scores), f1=f1
        )
    slope, weight, intercept = _weighed(scores_AN, frequencies, truth_AN, open_AN)
    unmeasured = Cutoff(
        threshold=None,
        slope=slope,
        weight=weight,
        intercept=intercept,
        admissions=len(scores),
        f1=0.0,
        frequencies=frequencies,
    )
    lists = [
        [place for place in unmeasured.order(scores_N) if open_N[place]][: frequencies.length]
        for scores_N, open_N in zip(scores_AN, open_AN, strict=True)
    ]
    f1s = [
        2 * truth_N[listed].sum() / (len(listed) + true)
        for truth_N, listed, true in zip(truth_AN, lists, true_A, strict=True)
    ]
    return replace(unmeasured, f1=float(np.mean(f1s)))


def require_validation(validation: Sequence[object], hospital: str = "a hospital") -> None:
    """Check that there is somebody to choose a threshold on.

    Raises:
        UserError: If there is not.
    """
    if not validation:
        raise UserError(
            f"evaluation.method=score: {hospital} has no validation patients to choose the "
            "threshold on",
            fix="raise data.validation-fraction, or set evaluation.method to generate",
        )


def _best_threshold(
    scores_AN: NDArray[np.float64],
    truth_AN: NDArray[np.bool_],
    true_A: NDArray[np.intp],
    open_AN: NDArray[np.bool_],
) -> tuple[float, float]:
    """Return the threshold with the best mean F1, of an even grid over the log scores."""
    least = scores_AN[open_AN].min(initial=1.0)
    scores_AN = np.where(open_AN, scores_AN, 0.0)
    order_AN = np.argsort(-scores_AN, axis=1, kind="stable")
    hits_AN = np.take_along_axis(truth_AN, order_AN, axis=1).cumsum(axis=1)
    rising_AN = np.sort(scores_AN, axis=1)
    # A list is never empty, so nothing above an admission's highest score changes it.
    low, high = _log(least), _log(rising_AN[:, -1].max())
    grid = np.exp(np.linspace(low, high, _GRID))
    mean_G = np.zeros(_GRID)
    for rising_N, hits_N, true in zip(rising_AN, hits_AN, true_A, strict=True):
        length_G = np.maximum(1, len(rising_N) - np.searchsorted(rising_N, grid, side="left"))
        mean_G += 2 * hits_N[length_G - 1] / (length_G + true)
    # Of a plateau its middle: either end is one admission's accident.
    best = np.flatnonzero(mean_G >= mean_G.max() - 1e-12)
    place = int(best[len(best) // 2])
    return float(grid[place]), float(mean_G[place] / len(scores_AN))


def _platt(scores: NDArray[np.float64], truth: NDArray[np.bool_]) -> tuple[float, float]:
    """Return slope and intercept of the log odds over the log score, by maximum likelihood."""
    (slope,), intercept = _logistic(_log(scores)[:, None], truth)
    if slope < _FLATTEST_SLOPE:
        share = float(_targets(truth).mean())
        return _FLATTEST_SLOPE, float(np.log(share / (1 - share)))
    return slope, intercept


def _weighed(
    scores_AN: NDArray[np.float64],
    frequencies: Frequencies,
    truth_AN: NDArray[np.bool_],
    open_AN: NDArray[np.bool_],
) -> tuple[float, float, float]:
    """Return slope, weight and intercept; of two that contradict each other the better stays."""
    truth, scores = truth_AN[open_AN], scores_AN[open_AN]
    common = np.tile(frequencies.log_odds, (len(scores_AN), 1))[open_AN]
    (slope, weight), intercept = _logistic(np.stack([_log(scores), common], 1), truth)
    if weight < 0:
        slope, intercept = _platt(scores, truth)
        return slope, 0.0, intercept
    if slope < 0:
        (weight,), intercept = _logistic(common[:, None], truth)
        return 0.0, max(weight, _FLATTEST_SLOPE), intercept
    return slope, weight, intercept


def _logistic(
    numbers_K: NDArray[np.float64], truth: NDArray[np.bool_]
) -> tuple[tuple[float, ...], float]:
    """Return the coefficients of [pairs, K] numbers and the intercept, by maximum likelihood."""
    from sklearn.linear_model import LogisticRegression

    weight = _targets(truth)
    fitted = LogisticRegression(C=np.inf, max_iter=1000).fit(
        np.concatenate([numbers_K] * 2),
        np.repeat([1, 0], len(truth)),
        sample_weight=np.concatenate([weight, 1 - weight]),
    )
    return tuple(map(float, fitted.coef_[0])), float(fitted.intercept_[0])


def _targets(truth: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return Platt's targets: one more of each kind, so that few outcomes give no certainty."""
    positive, negative = int(truth.sum()), int((~truth).sum())
    targets: NDArray[np.float64] = np.where(
        truth, (positive + 1) / (positive + 2), 1 / (negative + 2)
    )
    return targets


def _log(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    logs: NDArray[np.float64] = np.log(np.maximum(scores, _SMALLEST_SCORE))
    return logs
