"""What stands beside the metrics of a model: lengths, rankings, interactions, hospitals, pairs.

Everything is plain JSON under a model's name in summary.json; a part that does not exist for a
model (a ranking of a written list, a second hospital) has no key.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import JsonValue

from common.config import Config
from common.data.names import normalise_string
from common.evaluation.answers_file import Prediction
from common.evaluation.interactions import Interactions, interaction_figures, read_interactions
from common.evaluation.metrics import (
    Estimate,
    drug_map_of,
    f1_by_admission,
    interval_of_mean,
    score,
)
from common.evaluation.ranking import Ranking
from common.evaluation.ranking_metrics import average_precision, calibration

REFERENCES = ("popularity", "nearest_neighbours", "logistic_regression")
"""Whom models are compared with, admission by admission."""
BY_HOSPITAL = ("precision", "recall", "jaccard", "f1")


@dataclass(frozen=True, kw_only=True)
class Compared:
    """What all models of an evaluation have in common."""

    config: Config
    hospitals: Sequence[str]
    """Name of each case's hospital."""
    vocabulary: frozenset[str]

    @property
    def interactions(self) -> Interactions | None:
        """The user's file, if one is named."""
        file = self.config.evaluation.interactions
        return read_interactions(Path(file).expanduser()) if file else None


def figures(
    rows: Mapping[str, Sequence[Prediction]],
    rankings: Mapping[str, Sequence[Ranking | None]],
    compared: Compared,
) -> dict[str, dict[str, JsonValue]]:
    """Return what stands beside each model's metrics.

    Args:
        rows: Predictions by model, each in the order of the cases.
        rankings: Rankings by model, in the same order; None where a list was not scored.
        compared: What they share.
    """
    data, settings = compared.config.data, compared.config.evaluation
    drug_map, interactions = drug_map_of(data), compared.interactions
    f1 = {
        model: f1_by_admission(of_model, level=data.normalisation, drug_map=drug_map)
        for model, of_model in rows.items()
    }
    found: dict[str, dict[str, JsonValue]] = {}
    for model, of_model in rows.items():
        clusters = [row.cluster for row in of_model]

        def interval(values: Sequence[float], clusters: Sequence[int] = clusters) -> JsonValue:
            return _json(
                interval_of_mean(values, clusters, resamples=settings.bootstrap, seed=settings.seed)
            )

        part: dict[str, JsonValue] = {"drugs_per_list": _lengths(of_model)}
        if interactions:
            part["interactions"] = _interactions(of_model, interactions)
        if len(set(compared.hospitals)) > 1:
            part |= _by_hospital(of_model, compared, drug_map)
        ranked = [ranking for ranking in rankings.get(model, ()) if ranking is not None]
        if len(ranked) == len(of_model):
            part["prauc"] = interval(
                [_precision(row, one) for row, one in zip(of_model, ranked, strict=True)]
            )
            part["calibration"] = _calibration(of_model, ranked)
        if model not in REFERENCES:
            part["f1_beyond"] = {
                other: interval(np.subtract(f1[model], f1[other]).tolist())
                for other in REFERENCES
                if other in f1
            }
        found[model] = part
    return found


def _json(estimate: Estimate) -> JsonValue:
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high}


def _lengths(rows: Sequence[Prediction]) -> JsonValue:
    """Return mean list lengths; an answer that is no list has none."""
    return {
        "predicted": sum(len(row.answer or ()) for row in rows) / len(rows),
        "true": sum(len(row.truth) for row in rows) / len(rows),
    }


def _interactions(rows: Sequence[Prediction], interactions: Interactions) -> JsonValue:
    predicted = interaction_figures([row.answer or () for row in rows], interactions)
    true = interaction_figures([row.truth for row in rows], interactions)
    return {"predicted": predicted._asdict(), "true": true._asdict()}


def _by_hospital(
    rows: Sequence[Prediction],
    compared: Compared,
    drug_map: Mapping[str, tuple[str, ...]] | None,
) -> dict[str, JsonValue]:
    each: dict[str, JsonValue] = {}
    worst: tuple[float, str] | None = None
    for name in sorted(set(compared.hospitals)):
        own = [row for row, place in zip(rows, compared.hospitals, strict=True) if place == name]
        metrics = score(
            own,
            level=compared.config.data.normalisation,
            vocabulary=compared.vocabulary,
            drug_map=drug_map,
            resamples=0,
        )
        each[name] = {"samples": len(own), **{key: metrics.value(key) for key in BY_HOSPITAL}}
        f1 = metrics.value("f1") or 0.0
        worst = min(worst or (f1, name), (f1, name))
    assert worst is not None
    return {"by_hospital": each, "worst_hospital": worst[1]}


def _hits(row: Prediction, ranking: Ranking) -> list[bool]:
    true = set(map(normalise_string, row.truth))
    return [normalise_string(drug.name) in true for drug in ranking.drugs]


def _precision(row: Prediction, ranking: Ranking) -> float:
    return average_precision(_hits(row, ranking), len(set(map(normalise_string, row.truth))))


def _calibration(rows: Sequence[Prediction], rankings: Sequence[Ranking]) -> JsonValue:
    told = calibration(
        [drug.confidence for ranking in rankings for drug in ranking.drugs],
        [hit for row, ranking in zip(rows, rankings, strict=True) for hit in _hits(row, ranking)],
    )
    return {
        "brier": told.brier,
        "expected_error": told.expected_error,
        "bins": [one._asdict() for one in told.bins],
    }
