"""What the reviews say: the paper's two criteria, agreement of reviewers, agreement with the judge.

The paper's people looked at two things: whether an answer keeps to the format, and how similar it
is to the true list. Both follow from the predictions of the reviewed cases, and are computed here;
the second once more for the list as the reviewers left it (kept drugs and the added ones).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from common.data.names import normalise_string
from common.evaluation.agreement import krippendorff_alpha, unanimous_share
from common.evaluation.metrics import Prediction, score
from common.evaluation.review.packet import ORDERED

DrugMap = Mapping[str, tuple[str, ...]]


class Mark(NamedTuple):
    """One reviewer's mark on one drug."""

    case: str
    model: str
    drug: str
    reviewer: str
    mark: str


@dataclass(frozen=True, kw_only=True)
class Level:
    """When two drug names are equal."""

    name: str
    drug_map: DrugMap | None = None


def summarise_reviews(
    shown: Mapping[str, Any],
    key: Mapping[str, Any],
    reviews: Sequence[Mapping[str, Any]],
    predictions: Sequence[Mapping[str, Any]],
    judged: Sequence[Mapping[str, Any]],
    *,
    level: Level,
) -> dict[str, Any]:
    """Return the ``review`` part of summary.json.

    Args:
        shown: What the packet shows.
        key: Which list is whose.
        reviews: Checked reviews, one per reviewer.
        predictions: Lines of predictions.jsonl.
        judged: Lines of judge.jsonl; empty when no judge ran.
        level: For the similarity to the true list.
    """
    marks = list(_marks(shown, key, reviews))
    by_drug: dict[tuple[str, str, str], list[str]] = {}
    for mark in marks:
        by_drug.setdefault((mark.case, mark.model, mark.drug), []).append(mark.mark)
    overall: dict[tuple[str, str], list[int]] = {}
    for case, model, _, reviewed in _lists(shown, key, reviews):
        if reviewed["overall"] is not None:
            overall.setdefault((case, model), []).append(reviewed["overall"])
    units = list(by_drug.values())
    return {
        "packet": key["sha256"],
        "reviewers": [review["reviewer"] for review in reviews],
        "cases": len(key["cases"]),
        "level": level.name,
        "models": {
            model: _of_model(model, shown, key, reviews, predictions, level=level)
            for model in key["models"]
        },
        "agreement": {
            "alpha_drugs": krippendorff_alpha(units),
            "alpha_overall": krippendorff_alpha(list(overall.values()), "ordinal"),
            "unanimous": unanimous_share(units),
            "drugs": sum(len(unit) > 1 for unit in units),
        },
        "judge": _against_judge(by_drug, judged) if judged else None,
    }


def _lists(
    shown: Mapping[str, Any], key: Mapping[str, Any], reviews: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[str, str, Mapping[str, Any], Mapping[str, Any]]]:
    """Yield case, model, shown list and what one reviewer made of it, reviewer by reviewer."""
    for review in reviews:
        for case, names in zip(shown["cases"], key["cases"], strict=True):
            for listed in case["lists"]:
                reviewed = review["cases"][case["id"]]["lists"][listed["id"]]
                yield names["case"], names["lists"][listed["id"]], listed, reviewed


def _marks(
    shown: Mapping[str, Any], key: Mapping[str, Any], reviews: Sequence[Mapping[str, Any]]
) -> Iterator[Mark]:
    for review in reviews:
        for case, model, listed, reviewed in _lists(shown, key, [review]):
            for drug, mark in zip(listed["drugs"], reviewed["marks"], strict=True):
                if mark is not None:
                    yield Mark(case, model, drug, review["reviewer"], mark)


def _of_model(
    model: str,
    shown: Mapping[str, Any],
    key: Mapping[str, Any],
    reviews: Sequence[Mapping[str, Any]],
    predictions: Sequence[Mapping[str, Any]],
    *,
    level: Level,
) -> dict[str, Any]:
    names = {names["case"] for names in key["cases"]}
    lines = {
        line["case"]: line
        for line in predictions
        if line["case"] in names and (line["model"] == model or model == ORDERED)
    }
    answers = {
        case: tuple(line["truth"]) if model == ORDERED else _answer(line)
        for case, line in lines.items()
    }
    kept_shares: list[float] = []
    overall: list[int] = []
    counts = dict.fromkeys(("keep", "remove", "unsure", "unmarked"), 0)
    added = touched = 0
    edited: list[Prediction] = []
    for case, owner, listed, reviewed in _lists(shown, key, reviews):
        if owner != model:
            continue
        marks = reviewed["marks"]
        for mark in marks:
            counts[mark or "unmarked"] += 1
        added += len(reviewed["missing"])
        if reviewed["overall"] is not None:
            overall.append(reviewed["overall"])
        decided = marks.count("keep") + marks.count("remove")
        if decided:
            kept_shares.append(marks.count("keep") / decided)
        if marks and None not in marks:
            touched += 1
            kept = [d for d, mark in zip(listed["drugs"], marks, strict=True) if mark == "keep"]
            edited.append(_prediction(lines[case], (*kept, *reviewed["missing"])))
    return {
        "format_followed": _mean([answer is not None for answer in answers.values()]),
        "similarity": _similarity([_prediction(lines[c], a) for c, a in answers.items()], level),
        "similarity_after_review": _similarity(edited, level),
        "kept_share": _mean(kept_shares),
        "overall": _mean(overall),
        "lists_reviewed": touched,
        "drugs": counts,
        "added": added,
    }


def _answer(line: Mapping[str, Any]) -> tuple[str, ...] | None:
    return None if line["answer"] is None else tuple(line["answer"])


def _prediction(line: Mapping[str, Any], answer: tuple[str, ...] | None) -> Prediction:
    return Prediction(
        case=line["case"], cluster=line["cluster"], truth=tuple(line["truth"]), answer=answer
    )


def _similarity(predictions: Sequence[Prediction], level: Level) -> dict[str, float | None] | None:
    if not predictions:
        return None
    metrics = score(
        predictions, level=level.name, vocabulary=(), drug_map=level.drug_map, resamples=0
    )
    return {name: metrics.value(name) for name in ("jaccard", "f1")}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _against_judge(
    by_drug: Mapping[tuple[str, str, str], Sequence[str]], judged: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Compare the reviewers' majority (keep against remove) with the judge's; ties are left out."""
    votes: dict[tuple[str, str, str], list[bool]] = {}
    for line in judged:
        for verdict in line["verdicts"] or ():
            name = (line["case"], line["model"], normalise_string(verdict["drug"]))
            votes.setdefault(name, []).append(verdict["suitable"])
    counts = dict.fromkeys(
        ("keep_suitable", "keep_unsuitable", "remove_suitable", "remove_unsuitable"), 0
    )
    units: list[list[bool]] = []
    for (case, model, drug), marks in by_drug.items():
        suitable = votes.get((case, model, normalise_string(drug)), [])
        people = marks.count("keep") - marks.count("remove")
        machine = 2 * sum(suitable) - len(suitable)
        if people and machine:
            counts[
                f"{'keep' if people > 0 else 'remove'}_"
                f"{'suitable' if machine > 0 else 'unsuitable'}"
            ] += 1
            units.append([people > 0, machine > 0])
    agree = counts["keep_suitable"] + counts["remove_unsuitable"]
    return {
        "drugs": len(units),
        "agree": agree / len(units) if units else None,
        "alpha": krippendorff_alpha(units),
        **counts,
    }
