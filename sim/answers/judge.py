"""``fedrx judge``: appropriateness of a run's lists by an LLM, gated by the data's use terms."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

from common.configio import changed_freely
from common.data.protocols import ADMISSION, VISITS, require_protocol
from common.errors import RunFailed, UserError
from common.evaluation.judge.gate import Statement
from common.evaluation.judge.judging import judge_run
from common.evaluation.judge.questions import JudgeQuestions, estimate, questions_of
from common.records.judged import Appropriateness, Estimate, Judged
from common.rundir import RunDirectory
from sim.process.lock import exclusive
from sim.process.progress import SILENT, Console, Meter
from sim.report.terminal import NARROW, table


def prepare(
    run: RunDirectory,
    *,
    overrides: Iterable[str] = (),
    agreement_host: str = "",
    agreement: str = "",
    dry_run: bool = False,
    **choices: Any,
) -> JudgeQuestions:
    """Check settings and data-use terms; nothing is sent.

    Args:
        run: A run with predictions.
        overrides: ``key=value`` of the section ``judge`` alone: the run is done.
        agreement_host: The host that an agreement covers.
        agreement: The agreement, in words.
        dry_run: Nothing will be sent: neither a judge nor a key is needed.
        choices: See ``questions_of``.

    Raises:
        UserError: For other keys, half a statement, no API key for another machine's server, and
            see ``questions_of``.
    """
    if bool(agreement_host) != bool(agreement):
        raise UserError(
            "--agreement-host and --agreement go together",
            allowed="both or neither",
            fix="state the host and the agreement that covers it",
        )
    require_diagnoses(run)
    config = changed_freely(run.config(), overrides, ("judge.",)).judge
    statement = Statement(host=agreement_host, agreement=agreement) if agreement else None
    questions = questions_of(run, config, statement=statement, dry_run=dry_run, **choices)
    if not dry_run:
        _require_key(run, questions)
    return questions


def _require_key(run: RunDirectory, questions: JudgeQuestions) -> None:
    """Refuse to call another machine without the key that the configuration names."""
    variable = questions.config.api_key_env
    if not variable or os.environ.get(variable) or questions.endpoint.loopback:
        return
    if estimate(run, questions).calls:
        raise UserError(
            f"the environment variable {variable}, the API key for {questions.endpoint.host}, is "
            "not set",
            fix=f"export {variable}=..., or --set judge.api-key-env= for a server without keys",
        )


def require_diagnoses(run: RunDirectory) -> None:
    """Refuse a run whose cases show no diagnoses: nobody can judge a list by them.

    Raises:
        UserError: If the run stands at the first 24 hours.
    """
    require_protocol(run.config(), (ADMISSION, VISITS), "a list is judged by its stay's diagnoses")


def judge(run: RunDirectory, prepared: JudgeQuestions, *, console: Console = SILENT) -> Judged:
    """Ask the judge with progress shown.

    Args:
        run: The run that the questions are about.
        prepared: From ``prepare``.
        console: Where progress is shown.

    Returns:
        The ``judge`` part of summary.json.

    Raises:
        UserError: If the server refuses.
        RunFailed: If it does not answer, or the cost limit is reached.
    """
    key = os.environ.get(prepared.config.api_key_env, "") if prepared.config.api_key_env else ""
    with exclusive(run), Meter(console, "judgements", len(prepared.tasks)) as meter:
        return judge_run(
            run, prepared, api_key=key, progress=lambda done, of: meter.update(done, "")
        )


def estimate_text(figures: Estimate) -> str:
    """Say what a dry run found."""
    return (
        f"{figures.calls} calls to {figures.server} ({figures.cached} more are in the "
        f"cache; each may need one repair)\nabout {figures.input_tokens:,} tokens in and "
        f"{figures.output_tokens:,} out: {figures.cost_usd:.2f} USD, at most "
        f"{figures.most_usd:.2f}; spent so far {figures.spent_usd:.2f}\n"
        f"data: {figures.source}. Nothing was sent."
    )


def judgement_parts(result: Judged) -> list[object]:
    """Return each judge's appropriateness by model, what is not in the mean, and what it cost."""
    shown = [
        table(
            ("list by", "suitable", "95% interval", "scored", "unscored", "no list", "empty"),
            [
                (
                    *(model, percent(one.mean), _interval(one)),
                    *map(str, (one.scored, one.unscored, one.unanswered, one.empty)),
                )
                for model, one in theirs.appropriateness.items()
            ],
            words=1,
            title=f"Appropriateness by {judge} (research only)",
            **NARROW,
        )
        for judge, theirs in result.judges.items()
    ]
    lines = [
        f"unscored by {judge}: {problems_in_words(theirs.judgements.problems)}"
        for judge, theirs in result.judges.items()
        if theirs.judgements.problems
    ]
    if escaped := result.judgements.escaped_texts:
        lines.append(f"{escaped} texts of judges could not be written as UTF-8, and are escaped")
    agreement = result.agreement
    if agreement.drugs:
        lines.append(
            f"agreement on {agreement.drugs} drugs: unanimous {percent(agreement.unanimous)}, "
            f"Krippendorff's alpha {alpha(agreement.alpha)}, flip rate {percent(result.flip_rate)}"
        )
    lines += [
        f"{when}: {usage.calls} calls, {usage.input_tokens:,} tokens in, "
        f"{usage.output_tokens:,} out, {cost_usd:.4f} USD"
        for when, usage, cost_usd in (
            ("this time", result.invocation, result.invocation.cost_usd),
            ("all together", result.usage, result.cost_usd),
        )
    ]
    return [*shown, *lines]


def require_scores(result: Judged) -> None:
    """Fail a judging that gave no figure at all.

    Raises:
        RunFailed: Saying why, and what to do.
    """
    if result.invocation.scored:
        return
    problems = result.invocation.problems
    raise RunFailed(
        f"nothing was scored: {problems_in_words(problems) or 'there is no list to judge'}"
        + "; look at judge.model and the server, or see judge/exchanges.jsonl for the replies"
        * bool(problems)
    )


def problems_in_words(problems: Mapping[str, int]) -> str:
    """Write why lists are unscored, the most frequent reason first.

    >>> problems_in_words({"empty": 1, "refused: status 400": 3})
    '3 x refused: status 400, 1 x empty'
    """
    ordered = sorted(problems.items(), key=lambda item: -item[1])
    return ", ".join(f"{count} x {problem}" for problem, count in ordered)


def percent(share: float | None) -> str:
    """Write a share.

    >>> percent(0.8114), percent(None)
    ('81.1%', '-')
    """
    return "-" if share is None else f"{share:.1%}"


def alpha(value: float | None) -> str:
    """Write how far raters agree.

    >>> alpha(0.8114), alpha(None)
    ('0.811', '-')
    """
    return "-" if value is None else f"{value:.3f}"


def _interval(one: Appropriateness) -> str:
    return f"{100 * one.interval[0]:.1f}-{percent(one.interval[1])}" if one.interval else "-"
