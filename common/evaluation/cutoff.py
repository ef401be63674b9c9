"""Where a ranking of drugs is cut into a list, and what confidence a score stands for.

Both are fitted on a hospital's own validation split, never on held-out patients: the threshold with
the best mean F1, and a recalibration of two numbers (Platt, 1999, on the log of the score).

Shapes: N names of the formulary, A admissions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from common.errors import UserError

_GRID = 400
_SMALLEST_SCORE = 1e-30
_FLATTEST_SLOPE = 1e-6
"""A ranking that says nothing, or the contrary, keeps its order; its confidences are all alike."""


@dataclass(frozen=True, kw_only=True)
class Cutoff:
    """What one hospital's validation split says about one model's scores."""

    threshold: float
    """Scores from here on are in the list."""
    slope: float
    """Of the log odds over the log score."""
    intercept: float
    admissions: int
    """How many it was fitted on."""
    f1: float
    """Mean F1 at the threshold on those; it flatters, being chosen there."""

    def confidence(self, scores_N: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the probability that each drug is in the true list.

        >>> cut = Cutoff(threshold=0.1, slope=1.0, intercept=0.0, admissions=1, f1=1.0)
        >>> cut.confidence(np.array([1.0, 1/3])).round(3).tolist()
        [0.5, 0.25]
        """
        odds_N = self.slope * _log(scores_N) + self.intercept
        confidence_N: NDArray[np.float64] = np.exp(-np.logaddexp(0.0, -odds_N))
        return confidence_N

    def chosen(self, scores_N: NDArray[np.float64]) -> list[int]:
        """Return the places of the listed drugs, the likeliest first; never none.

        >>> cut = Cutoff(threshold=0.1, slope=1.0, intercept=0.0, admissions=1, f1=1.0)
        >>> cut.chosen(np.array([0.1, 0.7, 0.05])), cut.chosen(np.array([0.01, 0.02]))
        ([1, 0], [1])
        """
        order = ranked(scores_N)
        return order[: max(1, int((scores_N >= self.threshold).sum()))]


def ranked(scores_N: NDArray[np.float64]) -> list[int]:
    """Return places by falling score; ties in the order of the formulary."""
    order: list[int] = np.argsort(-scores_N, kind="stable").tolist()
    return order


def fit_cutoff(
    scores: Sequence[NDArray[np.float64]], truths: Sequence[Sequence[bool]], missing: Sequence[int]
) -> Cutoff:
    """Fit threshold and recalibration on a validation split.

    Args:
        scores: For each admission [N].
        truths: For each admission, which of the N drugs were ordered.
        missing: For each admission, how many ordered drugs are not in the formulary.

    Raises:
        UserError: If there is no admission.
    """
    require_validation(scores)
    scores_AN = np.array(scores)
    truth_AN = np.array(truths, dtype=bool)
    true_A = truth_AN.sum(axis=1) + np.array(missing)
    threshold, f1 = _best_threshold(scores_AN, truth_AN, true_A)
    slope, intercept = _platt(scores_AN.ravel(), truth_AN.ravel())
    return Cutoff(
        threshold=threshold, slope=slope, intercept=intercept, admissions=len(scores), f1=f1
    )


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
    scores_AN: NDArray[np.float64], truth_AN: NDArray[np.bool_], true_A: NDArray[np.intp]
) -> tuple[float, float]:
    """Return the threshold with the best mean F1, of an even grid over the log scores."""
    order_AN = np.argsort(-scores_AN, axis=1, kind="stable")
    hits_AN = np.take_along_axis(truth_AN, order_AN, axis=1).cumsum(axis=1)
    rising_AN = np.sort(scores_AN, axis=1)
    # A list is never empty, so nothing above an admission's highest score changes it.
    low, high = _log(scores_AN.min()), _log(rising_AN[:, -1].max())
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
    # Platt's targets: one more of each kind, so that few or equal outcomes give no certainty.
    positive, negative = int(truth.sum()), int((~truth).sum())
    weight = np.where(truth, (positive + 1) / (positive + 2), 1 / (negative + 2))
    logs = np.concatenate([_log(scores)] * 2)[:, None]
    kinds = np.repeat([1, 0], len(scores))
    fitted = LogisticRegression(C=np.inf, max_iter=1000).fit(
        logs, kinds, sample_weight=np.concatenate([weight, 1 - weight])
    )
    slope = float(fitted.coef_[0, 0])
    if slope < _FLATTEST_SLOPE:
        share = float(weight.mean())
        return _FLATTEST_SLOPE, float(np.log(share / (1 - share)))
    return slope, float(fitted.intercept_[0])


def _log(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    logs: NDArray[np.float64] = np.log(np.maximum(scores, _SMALLEST_SCORE))
    return logs
