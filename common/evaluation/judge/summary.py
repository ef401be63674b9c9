"""The judge's figures: appropriateness per model, agreement, flip rate, usage and cost."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from common.evaluation.agreement import krippendorff_alpha, unanimous_share
from common.seeds import stream

if TYPE_CHECKING:
    from common.evaluation.judge.cache import Exchanges
    from common.evaluation.judge.cost import Prices
    from common.evaluation.judge.plan import Judgement, JudgePlan

RESAMPLES = 1000
CONFIDENCE = 0.95


def summarise(
    plan: "JudgePlan",
    judgements: Sequence["Judgement"],
    made: "Exchanges",
    prices: "Prices",
    *,
    seed: int,
) -> dict[str, Any]:
    """Return the ``judge`` part of summary.json.

    A sample's score is the mean over its scored judgements; a sample without any is unscored. The
    mean over samples leaves unscored ones out, and says how many.
    """
    asked = sum(judgement.asked for judgement in judgements)
    return {
        "model": plan.config.model,
        "server": plan.endpoint.named,
        "temperature": plan.config.temperature,
        "repeats": plan.config.repeats,
        "source": plan.source,
        "agreement_stated": plan.endpoint.statement is not None,
        "complete": asked == len(judgements),
        "judgements": {
            "asked": asked,
            "scored": sum(judgement.verdicts is not None for judgement in judgements),
            "unscored": sum(j.asked and j.verdicts is None for j in judgements),
            "not_asked": len(judgements) - asked,
            "repaired": sum(len(j.keys) == 2 and j.verdicts is not None for j in judgements),
            "problems": dict(Counter(j.problem for j in judgements if j.problem)),
        },
        "appropriateness": {
            model: _appropriateness(
                [j for j in judgements if j.task.item.predicted_by == model],
                unanswered=plan.unanswered[model],
                empty=plan.empty[model],
                seed=seed,
            )
            for model in plan.unanswered
        },
        **_agreement(judgements),
        "served_by": sorted({exchange.served_by for exchange in made.all()}),
        **_usage(made, prices),
    }


def _appropriateness(
    judgements: Sequence["Judgement"], *, unanswered: int, empty: int, seed: int
) -> dict[str, Any]:
    by_case: dict[str, list[Judgement]] = {}
    for judgement in judgements:
        by_case.setdefault(judgement.task.item.case, []).append(judgement)
    scores: list[tuple[int, float]] = []
    not_asked = 0
    for of_case in by_case.values():
        known = [judgement.score for judgement in of_case if judgement.score is not None]
        if known:
            scores.append((of_case[0].task.item.cluster, sum(known) / len(known)))
        elif not all(judgement.asked for judgement in of_case):
            not_asked += 1
    verdicts = [v for judgement in judgements for v in judgement.verdicts or ()]
    return {
        "mean": sum(score for _, score in scores) / len(scores) if scores else None,
        "interval": _interval(scores, seed),
        "scored": len(scores),
        "unscored": len(by_case) - len(scores) - not_asked,
        "not_asked": not_asked,
        "unanswered": unanswered,
        "empty": empty,
        "suitable": sum(verdict.suitable for verdict in verdicts),
        "unsuitable": sum(not verdict.suitable for verdict in verdicts),
    }


def _interval(scores: Sequence[tuple[int, float]], seed: int) -> list[float] | None:
    """Percentile bootstrap over patients; None with fewer than two of them."""
    patients, place_n = np.unique([patient for patient, _ in scores], return_inverse=True)
    if len(patients) < 2:
        return None
    sums_k2 = np.zeros((len(patients), 2))
    np.add.at(sums_k2, place_n, [(score, 1.0) for _, score in scores])
    shares = np.full(len(patients), 1 / len(patients))
    drawn_r2 = stream(seed, "judge-bootstrap").multinomial(len(patients), shares, RESAMPLES)
    means_r = (drawn_r2 @ sums_k2)[:, 0] / (drawn_r2 @ sums_k2)[:, 1]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means_r, [tail, 1 - tail]).tolist()
    return [low, high]


def _agreement(judgements: Sequence["Judgement"]) -> dict[str, Any]:
    """Alpha over all judges and repeats per drug; flips among the repeats of one judge."""
    by_drug: dict[tuple[str, str, str], list[bool]] = {}
    by_judge: dict[tuple[str, str, str, str], list[bool]] = {}
    for judgement in judgements:
        item = judgement.task.item
        for verdict in judgement.verdicts or ():
            drug = (item.case, item.predicted_by, verdict.drug)
            by_drug.setdefault(drug, []).append(verdict.suitable)
            by_judge.setdefault((*drug, judgement.task.judge), []).append(verdict.suitable)
    units = [values for values in by_drug.values() if len(values) > 1]
    steady = unanimous_share(list(by_judge.values()))
    return {
        "agreement": {
            "alpha": krippendorff_alpha(units),
            "unanimous": unanimous_share(units),
            "drugs": len(units),
        },
        "flip_rate": None if steady is None else 1 - steady,
    }


def _usage(made: "Exchanges", prices: "Prices") -> dict[str, Any]:
    """Everything the run's judging has taken so far, over all sessions."""
    calls = made.all()
    input_tokens = sum(exchange.input_tokens for exchange in calls)
    output_tokens = sum(exchange.output_tokens for exchange in calls)
    return {
        "usage": {
            "calls": len(calls),
            "input_tokens": input_tokens,
            "output_tokens": output_tokens,
            "calls_without_usage": sum(not exchange.counted for exchange in calls),
            "lost_input_tokens_at_most": made.lost_input_tokens,
            "lost_output_tokens_at_most": made.lost_output_tokens,
        },
        "cost_usd": prices.cost_usd(
            input_tokens + made.lost_input_tokens, output_tokens + made.lost_output_tokens
        ),
    }
