"""Membership of canaries, guessed from what a run released.

Canary patients are in a hospital or out of it by a fair secret coin. The attacker is told all but
the coins: the canaries' records, every release, B before it, and the plan. What it wants to know of
a step is b, who was drawn; under the plan the release is y = G b + noise on the canaries' clipped
gradients, and the best linear estimate of b, as a likelihood ratio of in against out, is summed
over the steps.

Shapes: M canaries, P parameters, S steps of a round, K simulated runs.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.model.session import Session
from common.privacy.mechanism.clipping import clip_coefficients, unit_norms
from common.privacy.plan import PrivacyPlan
from common.text.batches import Encoded, pack
from common.training.gradients import add_unit_gradients

Floats = NDArray[np.float64]
Coins = NDArray[np.bool_]
_PACKED = 64
_BARE_SIGMA = 1e-3


@dataclass(frozen=True, kw_only=True)
class RoundSeen:
    """What a round's releases say about the canaries, in clip norms."""

    gram_MM: Floats
    """Inner products of the canaries' clipped gradients at the round's first B."""
    releases_SM: Floats
    """D times each release on each canary's gradient."""
    bare_SM: Floats
    """The same with the noise taken out: the control's."""


class Area(NamedTuple):
    """An area under a ROC curve, with its standard deviation."""

    value: float
    deviation: float


def clipped_rows(session: Session, canaries: list[Encoded], plan: PrivacyPlan) -> Tensor:
    """Return each canary's clipped gradient over C at the session's B, [M, P] fp32.

    Neighbours may share a pass here: these are the attacker's own sums.
    """
    rows_MP = torch.zeros(len(canaries), session.adapter.trainable_parameters)
    for start in range(0, len(canaries), _PACKED):
        samples = canaries[start : start + _PACKED]
        out_UP = torch.zeros(len(samples), rows_MP.shape[1], device=session.torch_device)
        add_unit_gradients(session, pack(samples), range(len(samples)), out_UP)
        coefficients_U = clip_coefficients(unit_norms(out_UP), plan.clip_norm)
        rows_MP[start : start + len(samples)] = (coefficients_U[:, None] * out_UP).cpu()
    return rows_MP.nan_to_num_(0.0, 0.0, 0.0) / plan.clip_norm


def likelihood_ratios(rounds: list[RoundSeen], plan: PrivacyPlan, *, bare: bool = False) -> Floats:
    """Return every canary's log-likelihood ratio of in against out, [M].

    With b ~ Bernoulli(q / 2) (the coin, and the draw), mean mu and variance v, the linear estimate
    of least variance is mu + v (v G + sigma^2 I)^-1 (y - G mu); its gain on canary i is
    a_i = [v (v G + sigma^2 I)^-1 G]_ii and its error has variance v a_i (1 - a_i).

    ``bare`` reads the releases without their noise.
    """
    total_M = np.zeros(len(rounds[0].gram_MM))
    sigma = _BARE_SIGMA if bare else plan.sigma
    for seen in rounds:
        total_M += _ratios(
            seen.gram_MM, (seen.bare_SM if bare else seen.releases_SM)[None], plan, sigma
        )[0]
    return total_M


def _ratios(gram_MM: Floats, seen_KSM: Floats, plan: PrivacyPlan, sigma: float) -> Floats:
    rate = plan.sampling_rate
    mean, variance = rate / 2, rate / 2 * (1 - rate / 2)
    inverse_MM = np.linalg.inv(variance * gram_MM + sigma**2 * np.eye(len(gram_MM)))
    gain_M = np.clip(variance * np.einsum("ij,ji->i", inverse_MM, gram_MM), 1e-9, 1 - 1e-9)
    shifted_KSM = variance * (seen_KSM - mean * gram_MM.sum(1)) @ inverse_MM
    spread_M = variance * gain_M * (1 - gain_M)
    # drawn against not drawn, then in (drawn with q) against out
    drawn_KSM = (gain_M / spread_M) * (shifted_KSM - gain_M * (0.5 - mean))
    with np.errstate(divide="ignore"):
        kept = np.log1p(-rate) if rate < 1 else -np.inf
    total: Floats = np.logaddexp(kept, math.log(rate) + drawn_KSM).sum(1)
    return total


def ideal_areas(
    rounds: list[RoundSeen], plan: PrivacyPlan, generator: np.random.Generator, *, runs: int
) -> Floats:
    """Return the ROC areas of the same attack on simulated runs of the claimed mechanism, [K].

    The simulation needs the canaries' inner products alone: Poisson draws of those who are in,
    exact Gaussian noise of the plan.
    """
    canaries = len(rounds[0].gram_MM)
    coins_KM = generator.random((runs, canaries)) < 0.5
    total_KM = np.zeros((runs, canaries))
    for seen in rounds:
        steps = len(seen.releases_SM)
        drawn_KSM = generator.random((runs, steps, canaries)) < plan.sampling_rate
        drawn_KSM &= coins_KM[:, None]
        values, vectors = np.linalg.eigh(seen.gram_MM)
        root_MM = vectors * np.sqrt(np.clip(values, 0, None))
        noise_KSM = generator.standard_normal(drawn_KSM.shape) @ root_MM.T
        seen_KSM = drawn_KSM @ seen.gram_MM + plan.sigma * noise_KSM
        total_KM += _ratios(seen.gram_MM, seen_KSM, plan, plan.sigma)
    return np.array(
        [
            area_with_deviation(ratio[coins], ratio[~coins]).value
            for ratio, coins in zip(total_KM, coins_KM, strict=True)
        ]
    )


def area_with_deviation(positives: Floats, negatives: Floats) -> Area:
    """Return the ROC area and its standard deviation (DeLong, DeLong, Clarke-Pearson 1988).

    It is the probability that a positive scores above a negative, ties counting half.

    >>> round(area_with_deviation(np.array([3.0, 2.0]), np.array([1.0, 2.0])).value, 3)
    0.875
    """
    from scipy.stats import rankdata

    n, m = len(positives), len(negatives)
    everyone = rankdata(np.concatenate([positives, negatives]))
    placed_n = (everyone[:n] - rankdata(positives)) / m
    placed_m = 1 - (everyone[n:] - rankdata(negatives)) / n
    variance = placed_n.var(ddof=1) / n + placed_m.var(ddof=1) / m if min(n, m) > 1 else math.inf
    return Area(float(placed_n.mean()), math.sqrt(variance))
