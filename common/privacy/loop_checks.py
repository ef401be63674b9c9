"""What a watched run is held to: exact where the watch allows it, else by a test with its null.

Shapes: P parameters, S steps.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.model.session import Session
from common.privacy.accounting import pld_epsilon
from common.privacy.budget.receipts import terms
from common.privacy.findings import (
    FALSE_ALARM,
    noise_complaints,
    spread_interval,
    verdict_of,
)
from common.privacy.mechanism.isolation import choose_passes
from common.privacy.mechanism.release import ARITHMETIC_SLACK, grid_for
from common.privacy.plan import PrivacyPlan
from common.privacy.watch import Step, Watched
from common.records.checks import Finding
from common.text.batches import Encoded, PackedBatch, pack
from common.training.gradients import add_unit_gradients

_SIGMAS = 7.0
"""Limit of the dispersion of single patients' draws: a chi-square of 20 or more degrees of freedom
exceeds it with less than 2e-6."""


class Opening(NamedTuple):
    """One release taken apart into the patients' clipped gradients and the rest."""

    rest_P: Tensor
    """D release - sum of clipped gradients, in clip norms: what has to be the noise."""
    deviation: float
    """Length of what is left when the noise that was handed out is taken away as well, in clip
    norms for each unit drawn; infinite where not one draw of noise was handed out."""


def records_of(batch: PackedBatch) -> list[Encoded]:
    """Return the records that a packed batch holds: the inverse of ``pack``.

    >>> records = [Encoded(input_ids=(5, 6, 7), answer_start=2, unit=1),
    ...            Encoded(input_ids=(8, 9), answer_start=1, unit=2)]
    >>> records_of(pack(records)) == records
    True
    """
    ids = batch.input_ids[0].tolist()
    labels = torch.bincount(batch.label_segments_N, minlength=batch.segments).tolist()
    bounds = zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False)
    return [
        Encoded(
            input_ids=tuple(ids[start:stop]),
            answer_start=stop - start - int(count),
            unit=unit,
        )
        for (start, stop), count, unit in zip(bounds, labels, batch.units, strict=True)
    ]


def clipped_alone(
    session: Session, passes: Sequence[Sequence[Encoded]], clip_norm: float
) -> Tensor:
    """Return one unit's clipped gradient from passes of its own, fp64 on the host.

    The oracle of the private path: the unit's records as they were packed, without neighbours, a
    mean over the records, one clip in fp64.
    """
    row_1P = torch.zeros(1, session.adapter.trainable_parameters, device=session.torch_device)
    apart = choose_passes(session).value == "apart"
    for records in passes:
        add_unit_gradients(session, pack(records), [0] * len(records), row_1P, apart=apart)
    gradient_P = row_1P[0].to("cpu", torch.float64) / sum(len(records) for records in passes)
    norm = float(gradient_P.norm())
    if not math.isfinite(norm):
        return torch.zeros_like(gradient_P)
    return gradient_P * min(1.0, clip_norm / norm) if norm else gradient_P


def opened(session: Session, step: Step, plan: PrivacyPlan) -> Opening:
    """Take one release apart."""
    adapter = session.adapter
    adapter.flat.copy_(step.before_P)
    by_unit: dict[int, list[list[Encoded]]] = {}
    for batch in step.passes:
        mine: dict[int, list[Encoded]] = {}
        for record in records_of(batch):
            mine.setdefault(record.unit, []).append(record)
        for unit, records in mine.items():
            by_unit.setdefault(unit, []).append(records)
    sum_P = torch.zeros(adapter.flat.numel(), dtype=torch.float64)
    for passes in by_unit.values():
        sum_P += clipped_alone(session, passes, plan.clip_norm)
    rest_P = (step.release_P * plan.expected_batch - sum_P) / plan.clip_norm
    if len(step.noise) != 1 or step.noise[0].shape != tuple(rest_P.shape):
        return Opening(rest_P, math.inf)
    drawn_P = torch.from_numpy(step.noise[0]).double() * grid_for(plan, len(rest_P)).step
    left_P = rest_P - drawn_P * plan.expected_batch / plan.clip_norm
    return Opening(rest_P, float(left_P.norm()) / max(1, len(by_unit)))


def release_check(openings: Sequence[Opening], steps: Sequence[Step]) -> Finding:
    """Hold every release to its parts: clipped gradients over D, and one draw of secret noise."""
    worst = max(opening.deviation for opening in openings)
    draws = {len(step.noise) for step in steps}
    empty = sum(not step.passes for step in steps)
    passed = worst <= ARITHMETIC_SLACK and empty > 0
    if draws != {1}:
        verdict = f"a release has {'no' if 0 in draws else 'more than one'} draw of secret noise"
    elif not empty:
        verdict = "no empty draw was seen"
    else:
        verdict = "exactly as claimed" if passed else "a release holds more than it may"
    return Finding(
        audit="releases taken apart",
        figure=worst,
        meaning=f"what is left of {len(steps)} releases ({empty} of empty draws) without the "
        "clipped gradients, computed anew, over D and without the secret noise; clip norms for "
        "each patient drawn",
        null=0.0,
        limit=ARITHMETIC_SLACK,
        passed=passed,
        verdict=verdict,
    )


def loop_noise_check(openings: Sequence[Opening], plan: PrivacyPlan) -> Finding:
    """Hold what releases hold beside the gradients to the claimed noise, over steps and runs."""
    width = len(openings[0].rest_P)
    claimed = max(plan.noise_std, grid_for(plan, width).std) * plan.expected_batch / plan.clip_norm
    noise_SP = np.stack([opening.rest_P.numpy() for opening in openings]) / claimed
    constant = noise_SP.std(axis=1) == 0
    complaints = ["absence in a step"] if constant.any() else noise_complaints(noise_SP)
    figure = math.sqrt(float((noise_SP**2).mean()))
    pairs = len(noise_SP) * (len(noise_SP) - 1) // 2 + 2 * len(noise_SP)
    return Finding(
        audit="noise in the loop",
        figure=figure,
        meaning=f"standard deviation of what {len(noise_SP)} releases of the loop hold beside the "
        "gradients, over the claim; shape, and correlation over steps and runs, are tested too",
        null=1.0,
        interval=spread_interval(figure, noise_SP.size),
        limit=1.0,
        false_alarm=2 * FALSE_ALARM + 2e-9 * pairs,
        passed=not complaints,
        verdict=verdict_of("as claimed", complaints),
    )


def draw_check(
    runs: Sequence[Watched], twins: tuple[Watched, Watched], plan: PrivacyPlan
) -> Finding:
    """Hold the draws to Poisson sampling at the plan's rate from the secret source."""
    from scipy.stats import binomtest

    rate = plan.sampling_rate
    tables = [_draws(run) for run in runs if run.units]
    taken, chances = sum(int(t.sum()) for t in tables), sum(t.size for t in tables)
    test = binomtest(taken, chances, rate)
    complaints = [] if test.pvalue >= FALSE_ALARM else ["rate"]
    if rate < 1:
        complaints += _dispersion(tables, rate)
        first, second = _draws(twins[0]), _draws(twins[1])
        agreement = rate**2 + (1 - rate) ** 2
        same = int((first == second).sum())
        if binomtest(same, first.size, agreement).pvalue < FALSE_ALARM:
            complaints.append("secrecy (two runs with the same seeds draw alike)")
    if not all(_as_tossed(step, run.units, rate) for run in runs for step in run.steps):
        complaints.append("source (who entered is not whom secret coins at the rate name)")
    if not all(run.secret for run in runs):
        complaints.append("key (not from the operating system)")
    interval = test.proportion_ci(0.95)
    return Finding(
        audit="draws",
        figure=taken / chances,
        meaning=f"share of {chances} chances at which a patient entered a step; spread over "
        "patients and steps, secrecy and source of the coins are tested too",
        null=rate,
        interval=(float(interval.low), float(interval.high)),
        limit=rate,
        false_alarm=6 * FALSE_ALARM,
        passed=not complaints,
        verdict=verdict_of("Poisson, secret, at the claimed rate", complaints),
    )


def _draws(run: Watched) -> np.ndarray[Any, Any]:
    """Return who entered which step, [S, units]."""
    return np.array([[unit in step.entered for unit in run.units] for step in run.steps])


def _as_tossed(step: Step, units: Sequence[int], rate: float) -> bool:
    """Return whether those entered whom one toss of the secret source names, at the rate."""
    if len(step.tosses) != 1:
        return False
    probability, outcome = step.tosses[0]
    if probability != rate or outcome.shape != (len(units),):
        return False
    return step.entered == {units[place] for place in np.flatnonzero(outcome).tolist()}


def _dispersion(tables: Sequence[np.ndarray[Any, Any]], rate: float) -> list[str]:
    """Test that patients, and steps, differ as independent coins make them.

    The squares of standardised counts of n coins have mean 1 and variance 2 + (1 - 6 v) / (n v),
    v = q (1 - q); the steps' sum is compared with the chi-square of these moments.
    """
    from scipy.stats import chi2

    complaints = []
    variance = rate * (1 - rate)
    excess = spread = sizes = degrees = sizes_spread = 0.0
    for table in tables:
        steps, units = table.shape
        counts = (table.sum(0) - steps * rate) ** 2 / (steps * variance)
        excess += float((counts - 1).sum())
        spread += units * (2 + (1 - 6 * variance) / (steps * variance))
        sizes += float(((table.sum(1) - units * rate) ** 2).sum() / (units * variance))
        sizes_spread += steps * (2 + (1 - 6 * variance) / (units * variance))
        degrees += steps
    if abs(excess) > _SIGMAS * math.sqrt(spread):
        complaints.append("independence of steps")
    scale = sizes_spread / (2 * degrees)
    tail = chi2.cdf(sizes / scale, degrees / scale)
    if not FALSE_ALARM / 2 <= tail <= 1 - FALSE_ALARM / 2:
        complaints.append("independence of patients")
    return complaints


def pass_check(steps: Sequence[Step], session: Session) -> Finding:
    """Ask that no pass mixes patients: rows round by who is beside them."""
    most = max(step.mixed for step in steps)
    where = (session.torch_device.type, session.dtype.value, session.attention.value)
    words = ", ".join(where)
    return Finding(
        audit="patients in one pass",
        figure=float(most),
        meaning=f"most patients that one pass through the backbone held and mixed ({words})",
        null=1.0,
        limit=1.0,
        passed=most <= 1,
        verdict="apart" if most <= 1 else "patients share passes that mix them",
    )


def ledger_check(runs: Sequence[Watched], plan: PrivacyPlan) -> Finding:
    """Hold the ledger and the receipt to the releases that were seen."""
    claimed = [float(run.receipt.epsilon) for run in runs]
    promised = {**terms(plan), "relation": plan.relation, "expected_batch": plan.expected_batch}
    seen = max(len(run.steps) for run in runs)
    spent = pld_epsilon(plan.sigma, plan.sampling_rate, seen, plan.delta)
    complaints = []
    for run in runs:
        late = any(step.charged < number for number, step in enumerate(run.steps, 1))
        if late or run.receipt.steps < len(run.steps):
            complaints.append("a release was not charged")
        if any(getattr(run.receipt, key) != value for key, value in promised.items()):
            complaints.append("the receipt tells other terms")
    if min(claimed) < spent - 1e-6:
        complaints.append("the receipt tells less than was spent")
    return Finding(
        audit="ledger",
        figure=min(claimed),
        meaning=f"epsilon on the receipt; the limit is what the {seen} releases that were seen "
        "cost by dp-accounting",
        null=None,
        limit=spent,
        passed=not complaints,
        verdict="covers every release, before it was made"
        if not complaints
        else "; ".join(dict.fromkeys(complaints)),
    )
