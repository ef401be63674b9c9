"""Audits of a plan by what its code really releases: no proof, but a way to be caught.

Each audit gives a figure and a verdict. The one-run audit bounds epsilon from below (Steinke, Nasr,
Jagielski, "Privacy auditing with one (1) training run", NeurIPS 2023), the noise test compares the
released noise with its claim, and the inversion test tries to read a patient's tokens off a
released gradient.

Shapes: M canaries, P coordinates, V vocabulary, R rank.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.model.session import Session
from common.privacy.accounting import epsilon
from common.privacy.canaries import area_with_deviation
from common.privacy.findings import (
    FALSE_ALARM,
    mean_interval,
    noise_complaints,
    spread_interval,
    verdict_of,
)
from common.privacy.mechanism.clipping import clipped_sum
from common.privacy.mechanism.gradients import PrivateGradient
from common.privacy.mechanism.noise import NoiseSource
from common.privacy.mechanism.release import GaussianMechanism, grid_for
from common.privacy.plan import PrivacyPlan
from common.records.checks import Finding
from common.text.batches import Encoded

CONFIDENCE = 0.954
"""Of each of three runs: all of them exceed a true claim with probability 0.046^3 < 1e-4."""
DISCLOSED = 0.95
"""An attack that works reaches this ROC area."""
_CHUNK_UNITS = 256
_EACH = 1 - (1 - CONFIDENCE) / 3

Clip = Callable[[Tensor, float], Tensor]
Release = Callable[[Tensor], Tensor]


class Guesses(NamedTuple):
    """How well membership was guessed."""

    canaries: int
    guessed: int
    correct: int


def p_value(guesses: Guesses, claim: float, delta: float) -> float:
    """Return how likely so many correct guesses are if ``claim`` is true.

    Steinke et al. 2023, theorem 5.2 and appendix D: under (claim, delta)-DP the number of correct
    guesses is dominated by a binomial with success probability e^claim / (1 + e^claim), up to a
    term in delta.

    >>> 0.1 < p_value(Guesses(100, 100, 55), 0.0, 0.0) < 0.2
    True
    >>> p_value(Guesses(100, 100, 100), 1.0, 0.0) < 1e-8
    True
    """
    from scipy.stats import binom

    success = 1 / (1 + math.exp(-claim))
    tail = float(binom.sf(guesses.correct - 1, guesses.guessed, success))
    if delta == 0:
        return tail
    places = np.arange(1, guesses.correct + 1)
    sums = np.cumsum(binom.pmf(guesses.correct - places, guesses.guessed, success))
    alpha = float((sums / places).max(initial=0.0))
    return min(1.0, tail + 2 * guesses.canaries * delta * alpha)


def lower_bound(guesses: Guesses, delta: float, *, confidence: float = CONFIDENCE) -> float:
    """Return the largest epsilon (to 1e-3) that the guesses refute at this confidence.

    >>> lower_bound(Guesses(1000, 1000, 500), 1e-5)
    0.0
    >>> 4.5 < lower_bound(Guesses(1000, 1000, 1000), 1e-5) < 6.0
    True
    """
    if p_value(guesses, 0.0, delta) > 1 - confidence:
        return 0.0
    low, high = 0.0, 30.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        refuted = p_value(guesses, middle, delta) <= 1 - confidence
        low, high = (middle, high) if refuted else (low, middle)
    return low


def single_release(plan: PrivacyPlan) -> PrivacyPlan:
    """Return the plan of one release to which everyone contributes: the auditor's best case."""
    return replace(plan, sampling_rate=1.0, steps=1)


def one_run_audit(
    plan: PrivacyPlan,
    *,
    canaries: int = 5000,
    clip: Clip = clipped_sum,
    release: Release | None = None,
    amplitude: float = 10.0,
    repeats: int = 3,
) -> Finding:
    """Bound epsilon of one release from below, with the plan's clip norm and noise multiplier.

    Every canary is a unit whose gradient is ``amplitude`` clip norms long and lies on a coordinate
    of its own; a fair secret coin decides whether it takes part. It goes straight into the clipped
    sum: how the model's own unit gradients are computed is not audited. The figure is the least
    bound of ``repeats`` independent runs, each at ``CONFIDENCE``: delta allows a single run no
    higher one, but all of them exceed a true claim with probability at most 0.046^repeats.

    ``clip`` and ``release`` are under audit, by default the plan's own.
    """
    audited = single_release(plan)
    source = NoiseSource()
    released = release or GaussianMechanism(audited, canaries, source).release
    bounds = []
    for _ in range(repeats):
        taking_part = source.bernoulli(canaries, 0.5)
        total_P = torch.zeros(canaries)
        for rows_UP in _canary_rows(taking_part, amplitude * plan.clip_norm):
            total_P += clip(rows_UP, plan.clip_norm)
        scores_M = released(total_P).double().numpy()
        # the score's distance from half a canary's clipped mean
        ratios_M = scores_M - plan.clip_norm / (2 * plan.expected_batch)
        bounds.append(bound_of(ratios_M, taking_part, plan.delta))
    bound = min(bounds)
    claim = epsilon(audited).value
    ceiling = lower_bound(Guesses(canaries, canaries, canaries), plan.delta, confidence=_EACH)
    passed, has_power = bound <= claim, claim <= ceiling
    verdict = "consistent with the claim" if passed else "the claim is refuted"
    if passed and not has_power:
        verdict = f"no power: {canaries} canaries cannot refute a claim above {ceiling:.2f}"
    return Finding(
        audit="one-run audit",
        figure=bound,
        meaning=f"lower bound on epsilon of one release at q = 1, {canaries} canaries, "
        f"{CONFIDENCE:.1%}" + (f", the least of {repeats} runs" if repeats > 1 else ""),
        null=0.0,
        interval=(bound, math.inf),
        limit=claim,
        false_alarm=(1 - CONFIDENCE) ** repeats,
        has_power=has_power,
        passed=passed,
        verdict=verdict,
    )


def bound_of(
    ratios: np.ndarray[Any, Any], taking_part: np.ndarray[Any, Any], delta: float
) -> float:
    """Return the lower bound from guesses by the sign of the claimed log-likelihood ratio.

    The surest guesses come first. The number of guesses is fixed beforehand at three values, each
    held to a third of the error probability.

    ``ratios`` may be anything that grows with the likelihood ratio of in against out.
    """
    right = ((ratios > 0) == taking_part)[np.argsort(-np.abs(ratios))]
    canaries = len(right)
    guesses = [
        Guesses(canaries, guessed, int(right[:guessed].sum()))
        for guessed in (canaries // 20, canaries // 5, canaries)
    ]
    return max(lower_bound(one, delta, confidence=_EACH) for one in guesses)


def _canary_rows(taking_part: np.ndarray[Any, Any], length: float) -> Iterator[Tensor]:
    members = np.flatnonzero(taking_part)
    for start in range(0, len(members), _CHUNK_UNITS):
        chunk = members[start : start + _CHUNK_UNITS]
        rows_UP = torch.zeros(len(chunk), len(taking_part))
        rows_UP[torch.arange(len(chunk)), torch.from_numpy(chunk)] = length
        yield rows_UP


def noise_test(
    plan: PrivacyPlan, *, coordinates: int = 250_000, steps: int = 5, release: Release | None = None
) -> Finding:
    """Compare the noise of ``steps`` empty draws with the plan's claim."""
    make = release or GaussianMechanism(plan, coordinates, NoiseSource()).release
    empty_P = torch.zeros(coordinates)
    # the grid widens the noise by what rounding costs, more so the larger sigma and P are
    claimed = max(plan.noise_std, grid_for(plan, coordinates).std)
    rows = [make(empty_P).double().numpy() / claimed for _ in range(steps)]
    noise_SP = np.stack(rows)
    complaints = noise_complaints(noise_SP)
    figure = float(noise_SP.std())
    return Finding(
        audit="noise test",
        figure=figure,
        meaning=f"standard deviation of {noise_SP.size} noise samples over the claim, "
        "rounding to the grid included",
        null=1.0,
        interval=spread_interval(figure, noise_SP.size),
        limit=1.0,
        false_alarm=3 * FALSE_ALARM,
        passed=not complaints,
        verdict=verdict_of("as claimed", complaints),
    )


def inversion_test(
    session: Session,
    records: Sequence[Encoded],
    plan: PrivacyPlan,
    *,
    kind: type[PrivateGradient] = PrivateGradient,
    expect_private: bool = True,
) -> Finding:
    """Try to tell which tokens patients' records hold, each from one released gradient.

    The gradient of the first layer's v_proj B is s sum_t g_t z_t^T with z_t = A RMSNorm(e_t), so
    its row space lies in the span of the record's z. Every token of the vocabulary is scored by
    how far its z is from that span; the figure is the area under the ROC curve for a record's
    tokens, as a mean over records: 1 is full disclosure, 0.5 is chance.

    ``records`` hold tokens drawn uniformly, as ``chance_limit`` supposes, each alone in its draw:
    the patient's worst case. ``v_proj`` is adapted at a rank above a record's number of tokens.

    Raises:
        ValueError: if so few records cannot tell chance from disclosure.
    """
    areas = []
    for record in records:
        source = kind([record], single_release(plan), NoiseSource(), seed=0, micro_batch=1)
        source(session, 0)
        areas.append(disclosure(session, session.adapter.flat_grad, record.input_ids))
    figure = float(np.mean(areas))
    tokens = [len(_read_tokens(record.input_ids)) for record in records]
    limit = chance_limit(tokens, int(session.model.config.vocab_size))
    if limit >= DISCLOSED:
        raise ValueError(f"{len(records)} records are too few: chance reaches {limit:.2f}")
    passed = figure < limit if expect_private else figure > DISCLOSED
    return Finding(
        audit="inversion test" if expect_private else "inversion without privacy",
        figure=figure,
        meaning=f"mean area under the ROC curve for a record's tokens, {len(records)} records, "
        "one gradient each",
        null=0.5 if expect_private else 1.0,
        interval=mean_interval(areas),
        limit=limit if expect_private else DISCLOSED,
        false_alarm=FALSE_ALARM if expect_private else 0.0,
        passed=passed,
        verdict=("near chance" if passed else "tokens are disclosed")
        if expect_private
        else ("the attack works" if passed else "the attack has no power here"),
    )


def chance_limit(tokens: Sequence[int], vocabulary: int) -> float:
    """Return what the mean ROC area of guesses at random exceeds with probability ``FALSE_ALARM``.

    Mann and Whitney (1947): for n positives among m negatives the area has mean 1/2 and variance
    (n + m + 1) / 12 n m. The mean over independent records is taken as normal; the true tails are
    lighter, as the area is bounded.

    >>> round(chance_limit([4], 1024), 2), round(chance_limit([4] * 12, 1024), 2)
    (1.19, 0.7)
    """
    from scipy.stats import norm

    variances = [(vocabulary + 1) / (12 * n * (vocabulary - n)) for n in tokens]
    return 0.5 + float(norm.isf(FALSE_ALARM)) * math.sqrt(sum(variances)) / len(variances)


def disclosure(session: Session, gradient_P: Tensor, tokens: Sequence[int]) -> float:
    """Return the ROC area with which a gradient tells a record's tokens from the others."""
    adapter, layer = session.adapter, session.model.model.layers[0]
    (module,) = [
        m for m in adapter.modules if m.key.startswith("model.layers.0.") and "v_proj" in m.key
    ]
    key = module.key + ".lora_B"
    gradient_OR = gradient_P[adapter.slices[key]].view(adapter.shapes[key]).double()
    with torch.no_grad():
        embedded_VD = layer.input_layernorm(session.model.model.embed_tokens.weight)
        z_VR = (embedded_VD @ module.lora_A.to(embedded_VD.dtype).T).double()
    present = np.zeros(len(z_VR), dtype=np.bool_)
    present[_read_tokens(tokens)] = True
    span = min(int(present.sum()), gradient_OR.shape[1] - 1)
    directions_RS = torch.linalg.svd(gradient_OR, full_matrices=False).Vh[:span].T
    inside_V = ((z_VR @ directions_RS).norm(dim=1) / z_VR.norm(dim=1)).cpu().numpy()
    return area_with_deviation(inside_V[present], inside_V[~present]).value


def _read_tokens(tokens: Sequence[int]) -> list[int]:
    # the last token predicts nothing and attends to nothing that is kept
    return sorted(set(tokens[:-1]))
