"""The judge's figures: appropriateness per model, agreement and flip rate."""

from collections import Counter
from collections.abc import Sequence

from common.evaluation.agreement import krippendorff_alpha, unanimous_share
from common.evaluation.judge.questions import Judgement, JudgeQuestions
from common.evaluation.metrics import interval_of_mean
from common.records.judged import Agreement, Appropriateness, Counts, Judged

RESAMPLES = 1000


def summarise(questions: JudgeQuestions, judgements: Sequence[Judgement], *, seed: int) -> Judged:
    """Return what the ``judge`` part of summary.json says of the judgements.

    A sample's score is the mean over its scored judgements; a sample without any is unscored. The
    mean over samples leaves unscored ones out, and says how many.

    Args:
        questions: Of the last invocation.
        judgements: Its judgements, and those of earlier ones that stand beside them.
        seed: Of the interval's resamples.
    """
    names = _names(judgements)
    of_judge = {
        name: [one for one in judgements if names[one.judge, one.server] == name]
        for name in names.values()
    }
    agreement, flip_rate = _agreement(judgements)
    return Judged(
        model=", ".join(of_judge) or questions.config.model,
        server=questions.endpoint.named,
        temperature=questions.config.temperature,
        repeats=questions.config.repeats,
        source=questions.source,
        agreement_stated=questions.endpoint.statement is not None,
        complete=all(judgement.asked for judgement in judgements),
        judgements=counts(judgements),
        appropriateness=_by_model(questions, judgements, questions.models, seed),
        judges={
            name: Judged(
                server=theirs[0].server,
                judgements=counts(theirs),
                appropriateness=_by_model(questions, theirs, _asked(questions, theirs[0]), seed),
            )
            for name, theirs in of_judge.items()
        },
        agreement=agreement,
        flip_rate=flip_rate,
    )


def _names(judgements: Sequence[Judgement]) -> dict[tuple[str, str], str]:
    """Name every judge, with its server where two servers have one of that name."""
    judges = list(dict.fromkeys((j.judge, j.server) for j in judgements))
    often = Counter(judge for judge, _ in judges)
    return {
        (judge, server): f"{judge} at {server}" if often[judge] > 1 else judge
        for judge, server in judges
    }


def counts(judgements: Sequence[Judgement]) -> Counts:
    """Count judgements by what came of them, and the reasons of those without a score."""
    asked = sum(judgement.asked for judgement in judgements)
    escaped = sum(judgement.escaped for judgement in judgements)
    found = Counts(
        asked=asked,
        scored=sum(judgement.scored for judgement in judgements),
        unscored=sum(j.asked and not j.scored for j in judgements),
        not_asked=len(judgements) - asked,
        repaired=sum(len(j.exchanges) == 2 and j.scored for j in judgements),
        problems=dict(Counter(j.problem for j in judgements if j.problem)),
    )
    return found.model_copy(update={"escaped_texts": escaped}) if escaped else found


def _asked(questions: JudgeQuestions, one: Judgement) -> Sequence[str]:
    """Return the models that the judge of ``one`` is asked about now, lists or not."""
    now = one.judge in questions.judges and one.server == questions.endpoint.named
    return questions.models if now else ()


def _by_model(
    questions: JudgeQuestions, judgements: Sequence[Judgement], asked: Sequence[str], seed: int
) -> dict[str, Appropriateness]:
    of_model = {
        name: [one for one in judgements if one.model == name] for name in questions.unanswered
    }
    return {
        model: _appropriateness(questions, model, theirs, seed=seed)
        for model, theirs in of_model.items()
        if theirs or model in asked
    }


def _appropriateness(
    questions: JudgeQuestions, model: str, judgements: Sequence[Judgement], *, seed: int
) -> Appropriateness:
    by_case: dict[str, list[Judgement]] = {}
    for judgement in judgements:
        by_case.setdefault(judgement.case, []).append(judgement)
    scores: list[float] = []
    patients: list[int] = []
    not_asked = 0
    for case, of_case in by_case.items():
        known = [judgement.score for judgement in of_case if judgement.score is not None]
        if known:
            scores.append(sum(known) / len(known))
            patients.append(questions.lists[case, model].cluster)
        elif not all(judgement.asked for judgement in of_case):
            not_asked += 1
    interval = None
    if scores:
        _, low, high = interval_of_mean(
            scores, patients, resamples=RESAMPLES, seed=seed, name="judge-bootstrap"
        )
        interval = None if low is None or high is None else (low, high)
    verdicts = [v for judgement in judgements for v in judgement.verdicts or ()]
    return Appropriateness(
        mean=sum(scores) / len(scores) if scores else None,
        interval=interval,
        scored=len(scores),
        unscored=len(by_case) - len(scores) - not_asked,
        not_asked=not_asked,
        unanswered=questions.unanswered[model],
        empty=questions.empty[model],
        suitable=sum(verdict.suitable for verdict in verdicts),
        unsuitable=sum(not verdict.suitable for verdict in verdicts),
    )


def _agreement(judgements: Sequence[Judgement]) -> tuple[Agreement, float | None]:
    """Alpha over all judges and repeats per drug; flips among the repeats of one judge."""
    by_drug: dict[tuple[str, str, str], list[bool]] = {}
    by_judge: dict[tuple[str, ...], list[bool]] = {}
    for judgement in judgements:
        for verdict in judgement.verdicts or ():
            drug = (judgement.case, judgement.model, verdict.drug)
            by_drug.setdefault(drug, []).append(verdict.suitable)
            judge = (*drug, judgement.judge, judgement.server)
            by_judge.setdefault(judge, []).append(verdict.suitable)
    units = [values for values in by_drug.values() if len(values) > 1]
    steady = unanimous_share(list(by_judge.values()))
    alpha, unanimous = krippendorff_alpha(units), unanimous_share(units)
    found = Agreement(alpha=alpha, unanimous=unanimous, drugs=len(units))
    return found, None if steady is None else 1 - steady
