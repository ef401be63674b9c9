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
from common.evaluation.high_priority import high_priority
from common.evaluation.interactions import Interactions, interaction_figures, read_interactions
from common.evaluation.lists import Answer
from common.evaluation.metrics import (
    drug_map_of,
    f1_by_admission,
    interval_of_mean,
    score,
)
from common.evaluation.ranking import Ranking
from common.evaluation.ranking_metrics import at_k, average_precision, calibration

REFERENCES = ("popularity", "nearest_neighbours", "logistic_regression")
"""Whom models are compared with, admission by admission."""
DEPTHS = (5, 10, 20)
"""k of precision and recall at k."""
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
    answers: Mapping[str, Sequence[Answer]],
    compared: Compared,
) -> dict[str, dict[str, JsonValue]]:
    """Return what stands beside each model's metrics.

    Args:
        rows: Predictions by model, each in the order of the cases.
        answers: What the rows were made of, in the same order: rankings and confidences.
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
            return interval_of_mean(
                values, clusters, resamples=settings.bootstrap, seed=settings.seed
            )._asdict()

        part: dict[str, JsonValue] = {"drugs_per_list": _lengths(of_model)}
        part["ddi_high_priority"] = _interactions(of_model, high_priority())
        if interactions:
            part["interactions"] = _interactions(of_model, interactions)
        if drug_map:
            part["unmapped"] = _unmapped(of_model, drug_map)
        if len(set(compared.hospitals)) > 1:
            part |= _by_hospital(of_model, compared, drug_map)
        given = answers.get(model, ())
        orders = [one.order for one in given if one.order is not None]
        if len(orders) == len(of_model):
            hits = [_hits(row, order) for row, order in zip(of_model, orders, strict=True)]
            true = [len(set(map(normalise_string, row.truth))) for row in of_model]
            precisions = list(map(average_precision, hits, true))
            part["prauc"] = interval(precisions)
            if "by_hospital" in part:
                part["prauc_by_hospital"] = _means(precisions, compared.hospitals)
            part["at"] = _depths(hits, true)
            rankings = [one.ranking for one in given if one.ranking is not None]
            if rankings:
                part["calibration"] = _calibration(hits, rankings)
        if model not in REFERENCES:
            part["f1_beyond"] = {
                other: interval(np.subtract(f1[model], f1[other]).tolist())
                for other in REFERENCES
                if other in f1
            }
        found[model] = part
    return found


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


def _unmapped(rows: Sequence[Prediction], drug_map: Mapping[str, tuple[str, ...]]) -> JsonValue:
    """Return the share of names that ``data.drug-map`` lacks: each counts as itself."""

    def share(lists: Sequence[Sequence[str]]) -> float | None:
        names = [normalise_string(name) for names in lists for name in names]
        return sum(name not in drug_map for name in names) / len(names) if names else None

    return {
        "predicted": share([row.answer or () for row in rows]),
        "true": share([row.truth for row in rows]),
    }


def _by_hospital(
    rows: Sequence[Prediction],
    compared: Compared,
    drug_map: Mapping[str, tuple[str, ...]] | None,
) -> dict[str, JsonValue]:
    each: dict[str, JsonValue] = {}
    f1s: dict[str, float] = {}
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
        f1s[name] = metrics.value("f1") or 0.0
    worst = min(f1s, key=lambda name: f1s[name])
    gap = max(f1s.values()) - f1s[worst]
    return {"by_hospital": each, "worst_hospital": worst, "hospital_gap": gap}


def _means(values: Sequence[float], hospitals: Sequence[str]) -> JsonValue:
    return {
        name: float(
            np.mean([one for one, own in zip(values, hospitals, strict=True) if own == name])
        )
        for name in sorted(set(hospitals))
    }


def _hits(row: Prediction, order: Sequence[str]) -> list[bool]:
    true = set(map(normalise_string, row.truth))
    return [normalise_string(name) in true for name in order]


def _depths(hits: Sequence[Sequence[bool]], true: Sequence[int]) -> JsonValue:
    found: dict[str, JsonValue] = {}
    for k in DEPTHS:
        pairs = [at_k(one, count, k) for one, count in zip(hits, true, strict=True)]
        precision, recall = np.mean(pairs, axis=0).tolist()
        found[str(k)] = {"precision": precision, "recall": recall}
    return found


def _calibration(hits: Sequence[Sequence[bool]], rankings: Sequence[Ranking]) -> JsonValue:
    found = calibration(
        [drug.confidence for ranking in rankings for drug in ranking.drugs],
        [hit for one in hits for hit in one],
    )
    return {**found._asdict(), "bins": [one._asdict() for one in found.bins]}
