"""What the reviews say: the paper's two criteria, agreement of reviewers, agreement with the judge.

The paper's people looked at two things: whether an answer keeps to the format, and how similar it
is to the true list. Both follow from the predictions of the reviewed cases, and are computed here;
the second once more for the list as the reviewers left it (kept drugs and the added ones).
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from common.config import DataConfig
from common.data.names import normalise_string
from common.evaluation.agreement import krippendorff_alpha, unanimous_share
from common.evaluation.answers_file import Prediction
from common.evaluation.judge.questions import Judgement
from common.evaluation.metrics import Metrics, drug_map_of, score
from common.evaluation.review.packet import ORDERED, Packet
from common.evaluation.review.packet_import import Mark, Review
from common.records.judged import AgainstJudge, Agreement, Reviewed, ReviewedModel

_MARKS = ("keep", "remove", "unsure", "unmarked")
Drug = tuple[str, str, str]
"""Case, model and name."""


class Entry(NamedTuple):
    """One reviewer's word on one list."""

    line: Prediction
    """Of the list's model; of the ordered list, any of its case."""
    model: str
    marks: Mapping[str, Mark | None]
    """By drug, in the order of the page."""
    missing: Sequence[str]
    overall: int | None

    @property
    def kept(self) -> tuple[str, ...]:
        """The list as the reviewer left it."""
        return (*(drug for drug, mark in self.marks.items() if mark == "keep"), *self.missing)


def summarise_reviews(
    packet: Packet,
    reviews: Sequence[Review],
    predictions: Sequence[Prediction],
    judged: Sequence[Judgement],
    data: DataConfig,
) -> Reviewed:
    """Return the ``review`` part of summary.json.

    Args:
        packet: What was reviewed.
        reviews: Checked reviews, one per reviewer.
        predictions: Lines of predictions.jsonl.
        judged: Lines of judge.jsonl; empty when no judge ran.
        data: Says when two drug names are equal, for the similarity to the true list.
    """
    cases = {case.case for case in packet.key.cases}
    lines = {(line.case, line.model): line for line in predictions if line.case in cases}
    lines |= {
        (case, ORDERED): line.model_copy(update={"answer": line.truth})
        for (case, _), line in lines.items()
    }
    entries = list(_entries(packet, reviews, lines))
    by_drug: dict[Drug, list[str]] = {}
    overall: dict[tuple[str, str], list[int]] = {}
    for line, model, marks, _, mark_of_all in entries:
        for drug, mark in marks.items():
            if mark is not None:
                by_drug.setdefault((line.case, model, drug), []).append(mark)
        if mark_of_all is not None:
            overall.setdefault((line.case, model), []).append(mark_of_all)
    units = list(by_drug.values())
    scored = partial(
        score, level=data.normalisation, vocabulary=(), drug_map=drug_map_of(data), resamples=0
    )
    found = Reviewed(
        packet=packet.sha256,
        reviewers=tuple(review.reviewer for review in reviews),
        cases=len(packet.key.cases),
        level=data.normalisation,
        models={
            model: _of_model(
                [line for (_, name), line in lines.items() if name == model],
                [entry for entry in entries if entry.model == model],
                scored,
            )
            for model in packet.key.models
        },
        agreement=Agreement(
            alpha_drugs=krippendorff_alpha(units),
            alpha_overall=krippendorff_alpha(list(overall.values()), "ordinal"),
            unanimous=unanimous_share(units),
            drugs=sum(len(unit) > 1 for unit in units),
        ),
        judge=_against_judge(by_drug, judged) if judged else None,
    )
    escaped = sum(review.escaped for review in reviews)
    return found.model_copy(update={"escaped_texts": escaped}) if escaped else found


def _entries(
    packet: Packet, reviews: Sequence[Review], lines: Mapping[tuple[str, str], Prediction]
) -> Iterator[Entry]:
    for review in reviews:
        for case, names in zip(packet.shown.cases, packet.key.cases, strict=True):
            for listed in case.lists:
                model, given = names.lists[listed.id], review.cases[case.id].lists[listed.id]
                yield Entry(
                    lines[names.case, model],
                    model,
                    dict(zip(listed.drugs, given.marks, strict=True)),
                    given.missing,
                    given.overall,
                )


def _of_model(
    lines: Sequence[Prediction], entries: Sequence[Entry], scored: Callable[..., Metrics]
) -> ReviewedModel:
    counts = Counter[str](mark or "unmarked" for entry in entries for mark in entry.marks.values())
    whole = [entry for entry in entries if entry.marks and None not in entry.marks.values()]
    kept_shares = []
    for entry in entries:
        given = Counter(entry.marks.values())
        if decided := given["keep"] + given["remove"]:
            kept_shares.append(given["keep"] / decided)
    return ReviewedModel(
        format_followed=_mean([line.answer is not None for line in lines]),
        similarity=_similarity(lines, scored),
        similarity_after_review=_similarity(
            [entry.line.model_copy(update={"answer": entry.kept}) for entry in whole], scored
        ),
        kept_share=_mean(kept_shares),
        overall=_mean([entry.overall for entry in entries if entry.overall is not None]),
        lists_reviewed=len(whole),
        drugs={mark: counts[mark] for mark in _MARKS},
        added=sum(len(entry.missing) for entry in entries),
    )


def _similarity(
    lines: Sequence[Prediction], scored: Callable[..., Metrics]
) -> dict[str, float | None] | None:
    return {name: scored(lines).value(name) for name in ("jaccard", "f1")} if lines else None


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _against_judge(
    by_drug: Mapping[Drug, Sequence[str]], judged: Sequence[Judgement]
) -> AgainstJudge:
    """Compare the reviewers' majority (keep against remove) with the judge's; ties are left out."""
    votes: dict[Drug, int] = {}
    for line in judged:
        for verdict in line.verdicts or ():
            name = (line.case, line.model, normalise_string(verdict.drug))
            votes[name] = votes.get(name, 0) + (1 if verdict.suitable else -1)
    units: list[tuple[bool, bool]] = []
    for (case, model, drug), marks in by_drug.items():
        people = marks.count("keep") - marks.count("remove")
        machine = votes.get((case, model, normalise_string(drug)), 0)
        if people and machine:
            units.append((people > 0, machine > 0))
    return AgainstJudge(
        drugs=len(units),
        agree=_mean([people == machine for people, machine in units]),
        alpha=krippendorff_alpha(units),
        keep_suitable=units.count((True, True)),
        keep_unsuitable=units.count((True, False)),
        remove_suitable=units.count((False, True)),
        remove_unsuitable=units.count((False, False)),
    )
