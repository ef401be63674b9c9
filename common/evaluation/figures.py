"""A model's figures: its metrics, and lengths, rankings, interactions, hospitals, pairs beside.

Everything is plain JSON under a model's name in summary.json; a part that does not exist for a
model (a ranking of a written list, a second hospital) has no key.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from pydantic import JsonValue

from common.config import Config
from common.data.names import normalise_string
from common.data.partition import Hospital
from common.evaluation.answers_file import Prediction
from common.evaluation.high_priority import high_priority
from common.evaluation.interactions import Interactions, interaction_figures, read_interactions
from common.evaluation.lists import Answer, places_of
from common.evaluation.metrics import (
    Metrics,
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

    @classmethod
    def of(cls, hospitals: Sequence[Hospital], cases: Sequence[int], config: Config) -> "Compared":
        """Return it for cases that are at these places of ``hospitals``."""
        trained_on = (sample for one in hospitals for sample in one.train)
        return cls(
            config=config,
            hospitals=[hospitals[place].name for place in cases],
            vocabulary=frozenset(drug for sample in trained_on for drug in sample.drugs),
        )

    @cached_property
    def interactions(self) -> Interactions | None:
        """The user's file, if one is named."""
        file = self.config.evaluation.interactions
        return read_interactions(Path(file).expanduser()) if file else None

    @cached_property
    def drug_map(self) -> dict[str, tuple[str, ...]] | None:
        """What ``data.normalisation`` needs."""
        return drug_map_of(self.config.data)

    def score(self, rows: Sequence[Prediction], *, resamples: int) -> Metrics:
        """Return the metrics of some admissions."""
        return score(
            rows,
            level=self.config.data.normalisation,
            vocabulary=self.vocabulary,
            drug_map=self.drug_map,
            resamples=resamples,
            seed=self.config.evaluation.seed,
        )

    def interval(self, values: Sequence[float], rows: Sequence[Prediction]) -> JsonValue:
        """Return the mean of one value for each row, and its interval over patients."""
        settings = self.config.evaluation
        clusters = [row.cluster for row in rows]
        return interval_of_mean(
            values, clusters, resamples=settings.bootstrap, seed=settings.seed
        )._asdict()


def figures(
    rows: Mapping[str, Sequence[Prediction]],
    answers: Mapping[str, Sequence[Answer]],
    compared: Compared,
) -> dict[str, dict[str, JsonValue]]:
    """Return each model's metrics and what stands beside them.

    Args:
        rows: Predictions by model, each in the order of the cases.
        answers: What the rows were made of, in the same order: rankings and confidences.
        compared: What they share.
    """
    data, resamples = compared.config.data, compared.config.evaluation.bootstrap
    f1 = {
        model: f1_by_admission(of_model, level=data.normalisation, drug_map=compared.drug_map)
        for model, of_model in rows.items()
    }
    found: dict[str, dict[str, JsonValue]] = {}
    for model, of_model in rows.items():
        found[model] = {
            **compared.score(of_model, resamples=resamples).to_dict(),
            **_of_lists(of_model, compared),
            **_of_rankings(of_model, answers.get(model, ()), compared),
        }
        if model not in REFERENCES:
            found[model]["f1_beyond"] = {
                other: compared.interval(np.subtract(f1[model], f1[other]).tolist(), of_model)
                for other in REFERENCES
                if other in f1
            }
    return found


def _of_lists(rows: Sequence[Prediction], compared: Compared) -> dict[str, JsonValue]:
    """Return lengths, interactions and hospitals."""
    part: dict[str, JsonValue] = {
        "drugs_per_list": _lengths(rows),
        "ddi_high_priority": _interactions(rows, high_priority()),
    }
    if compared.interactions:
        part["interactions"] = _interactions(rows, compared.interactions)
    if compared.drug_map:
        part["unmapped"] = _unmapped(rows, compared.drug_map)
    if len(set(compared.hospitals)) > 1:
        part |= _by_hospital(rows, compared)
    return part


def _of_rankings(
    rows: Sequence[Prediction], answers: Sequence[Answer], compared: Compared
) -> dict[str, JsonValue]:
    """Return what a ranking for every case gives; nothing without one."""
    orders = [one.order for one in answers if one.order is not None]
    if len(orders) < len(rows):
        return {}
    hits = [_hits(row, order) for row, order in zip(rows, orders, strict=True)]
    true = [len(set(map(normalise_string, row.truth))) for row in rows]
    precisions = list(map(average_precision, hits, true))
    part: dict[str, JsonValue] = {"prauc": compared.interval(precisions, rows)}
    if len(set(compared.hospitals)) > 1:
        part["prauc_by_hospital"] = {
            name: float(np.mean([precisions[place] for place in places]))
            for name, places in places_of(compared.hospitals).items()
        }
    part["at"] = _depths(hits, true)
    if rankings := [one.ranking for one in answers if one.ranking is not None]:
        part["calibration"] = _calibration(hits, rankings)
    return part


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


def _by_hospital(rows: Sequence[Prediction], compared: Compared) -> dict[str, JsonValue]:
    each: dict[str, JsonValue] = {}
    f1s: dict[str, float] = {}
    for name, places in places_of(compared.hospitals).items():
        metrics = compared.score([rows[place] for place in places], resamples=0)
        each[name] = {"samples": len(places), **{key: metrics.value(key) for key in BY_HOSPITAL}}
        f1s[name] = metrics.value("f1") or 0.0
    worst = min(f1s, key=lambda name: f1s[name])
    gap = max(f1s.values()) - f1s[worst]
    return {"by_hospital": each, "worst_hospital": worst, "hospital_gap": gap}


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
