"""Membership of patients, guessed from a trained adapter alone.

A patient whose list the trained model finds likelier than models that never saw that patient do is
taken for one it was trained on: the likelihood ratio of RMIA (Zarifzadeh, Liu, Shokri, ICML 2024)
with reference models, of which the untrained backbone is always one. With gamma = 1 RMIA's score
is the share of a population that has a smaller ratio, so it orders patients as the ratio itself.

Shapes: N patients, M models (the target first).
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from common.model.session import Session
from common.privacy.canaries import area_with_deviation
from common.privacy.findings import FALSE_ALARM
from common.records.checks import Finding
from common.tensor_files import Tensors
from common.text.batches import Encoded
from common.training.loop import token_losses

Floats = NDArray[np.float64]
_PACK_TOKENS = 4096
_RESAMPLES = 2000


def patient_losses(
    session: Session, records: Sequence[Encoded], models: Sequence[Tensors]
) -> tuple[Floats, NDArray[np.int64]]:
    """Return each patient's loss per answer token under each model, a mean over its records.

    Returns:
        [N, M] losses, and the patients' local keys in the same order.
    """
    units = np.array([record.unit for record in records])
    patients = np.unique(units)
    losses_RM = np.zeros((len(records), len(models)))
    for place, b in enumerate(models):
        session.adapter.load(b)
        losses_RM[:, place] = _record_losses(session, records)
    losses_NM = np.stack([losses_RM[units == patient].mean(0) for patient in patients])
    return losses_NM, patients


def _record_losses(session: Session, records: Sequence[Encoded]) -> list[float]:
    losses: list[float] = []
    for batch, losses_N in token_losses(session, records, _PACK_TOKENS):
        sums_S = torch.zeros(batch.segments, device=losses_N.device)
        sums_S.index_add_(0, batch.label_segments_N, losses_N)
        labels_S = torch.bincount(batch.label_segments_N, minlength=batch.segments)
        losses += (sums_S / labels_S).tolist()
    return losses


def ratios(losses_NM: Floats) -> Floats:
    """Return log p(target) - log mean p(reference), [N], from losses with the target first.

    >>> ratios(np.array([[1.0, 3.0], [2.0, 2.0]])).tolist()
    [2.0, 0.0]
    """
    references = losses_NM[:, 1:]
    from scipy.special import logsumexp  # slow to import, and a run needs it last

    log_mean = logsumexp(-references, axis=1) - math.log(references.shape[1])
    result: Floats = -losses_NM[:, 0] - log_mean
    return result


def largest_area(epsilon: float, delta: float) -> float:
    """Return the ROC area that no attack exceeds under (epsilon, delta)-differential privacy.

    TPR <= e^epsilon FPR + delta and the same with both complemented (Kairouz, Oh, Viswanath 2015);
    for delta = 0 the region's corner lies at 1 / (1 + e^epsilon), and the area is one minus that.

    >>> largest_area(0.0, 0.0), round(largest_area(3.0, 0.0), 3), largest_area(math.inf, 0.0)
    (0.5, 0.953, 1.0)
    """
    return min(1.0, 1 / (1 + math.exp(-epsilon)) + delta)


def membership_findings(
    members_N: Floats, outsiders_N: Floats, *, epsilon: float, delta: float, references: int
) -> list[Finding]:
    """Judge how well patients trained on are told from others by their ratios.

    ``references`` counts the untrained backbone; ``epsilon`` is infinite without privacy.
    """
    area, deviation = area_with_deviation(members_N, outsiders_N)
    limit = largest_area(epsilon, delta)
    low, high = area - 1.96 * deviation, area + 1.96 * deviation
    from scipy.stats import norm

    refuted = area - float(norm.isf(FALSE_ALARM)) * deviation > limit
    if refuted:
        verdict = "the claim is refuted"
    elif low <= 0.5 <= high:
        verdict = "patients trained on are not told from others"
    elif area > 0.5:
        verdict = "patients trained on are told from others better than by chance"
        verdict += "" if math.isfinite(epsilon) else "; no protection was claimed"
    else:
        verdict = (
            "patients trained on look less familiar than others: chance, or groups that differ"
        )
    count = f"{len(members_N)} patients trained on, {len(outsiders_N)} others"
    findings = [
        Finding(
            audit="membership of patients",
            figure=area,
            meaning="area under the ROC curve of the answers' likelihood under the trained adapter "
            f"over {references} reference model(s); {count}; 0.5 is chance, the limit is the most "
            "that the claimed epsilon allows",
            null=0.5,
            interval=(low, high),
            limit=limit,
            false_alarm=FALSE_ALARM if math.isfinite(epsilon) else 0.0,
            passed=not refuted,
            verdict=verdict,
        )
    ]
    for share in (0.01, 0.001):
        findings.append(_at_false_positives(members_N, outsiders_N, share, epsilon, delta))
    return findings


def true_positives(members_N: Floats, outsiders_N: Floats, share: float) -> float:
    """Return the share of members above all but ``share`` of the outsiders.

    >>> true_positives(np.array([1.0, 3.0, 5.0]), np.array([0.0, 2.0, 4.0, 2.5]), 0.25)
    0.6666666666666666
    """
    allowed = int(share * len(outsiders_N))
    threshold = np.sort(outsiders_N)[::-1][allowed]
    return float((members_N > threshold).mean())


def _at_false_positives(
    members_N: Floats, outsiders_N: Floats, share: float, epsilon: float, delta: float
) -> Finding:
    figure = true_positives(members_N, outsiders_N, share)
    generator = np.random.default_rng(0)
    again = [
        true_positives(
            generator.choice(members_N, len(members_N)),
            generator.choice(outsiders_N, len(outsiders_N)),
            share,
        )
        for _ in range(_RESAMPLES)
    ]
    needed = round(1 / share)
    low, high = np.quantile(again, [0.025, 0.975])
    verdict = "no more than chance" if low <= share else "more than chance"
    if len(outsiders_N) < needed:
        verdict = (
            f"not resolved: {len(outsiders_N)} others do not show {share:.1%}, {needed} would; "
            "the figure is at no false accusation"
        )
    return Finding(
        audit=f"membership, true positives at {share * 100:g}% false",
        figure=figure,
        meaning="share of the patients trained on that are found; bootstrap interval by patient",
        null=share,
        interval=(float(low), float(high)),
        limit=min(1.0, math.exp(min(epsilon, 50.0)) * share + delta),
        passed=True,
        verdict=verdict,
    )
