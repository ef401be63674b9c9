"""Appropriateness by LLM judges: suitable / all drugs of a list, averaged over samples.

Each list of predictions.jsonl is shown to each judge ``repeats`` times. A reply that is not one
verdict per drug is asked for once more; then the judgement is ``unscored``: counted beside the
mean, never a number. Everything asked and answered lies in ``judge/exchanges.jsonl``, so the same
command goes on where it was stopped. judge.jsonl holds the verdicts of every judge that was asked
about the run's present answers: a second one is written beside the first.
"""

import asyncio
import contextlib
import datetime
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from common.errors import FedrxError, RunFailed, UserError
from common.evaluation.judge.cache import Exchange, Exchanges, RefusedQuestion
from common.evaluation.judge.client import Clock, JudgeClient, Refused, Unavailable
from common.evaluation.judge.cost import CostLimit, Meter, usage
from common.evaluation.judge.gate import Statement
from common.evaluation.judge.questions import EXCHANGES, Judgement, JudgeQuestions, read_judgements
from common.evaluation.judge.rubric import (
    Reading,
    ReplyProblem,
    read_verdicts,
    repair_messages,
)
from common.evaluation.judge.summary import counts, summarise
from common.files import json_line, writable, write_text
from common.records.judged import Counts, Judged
from common.rundir import SUMMARY, RunDirectory

STATEMENTS = Path("judge") / "statements.jsonl"
_FAILURES_IN_A_ROW = 3
_REFUSED_AT_FIRST = 10
"""So many refusals and no answer: not the lists are wrong, but the call."""

Progress = Callable[[int, int], None]


def judge_run(
    run: RunDirectory,
    questions: JudgeQuestions,
    *,
    api_key: str = "",
    seed: int = 0,
    progress: Progress = lambda done, of: None,
    clock: Clock | None = None,
) -> Judged:
    """Ask the judges, write judge.jsonl and the ``judge`` part of summary.json.

    Args:
        run: The run that the questions are about.
        questions: From ``questions_of``.
        api_key: Empty for none.
        seed: Of the interval's resamples.
        progress: Called with (done, all).
        clock: What waits are by; None: the machine's.

    Returns:
        The ``judge`` part of the summary.

    Raises:
        UserError: If the server refuses the calls as such.
        RunFailed: If it does not answer, or the cost limit stopped it. What was judged so far, if
            anything, is written first, and the same command goes on from there.
    """
    if questions.endpoint.statement:
        _keep_statement(run, questions, questions.endpoint.statement)
    beside = _judged_before(run, questions)
    exchanges = Exchanges(run.path / EXCHANGES)
    before = usage(exchanges, questions.config)
    client = JudgeClient(
        questions.endpoint,
        questions.config,
        api_key=api_key,
        meter=Meter(questions.config, spent_usd=before["cost_usd"]),
        exchanges=exchanges,
        clock=clock or Clock(),
    )
    work = _Judging(questions, exchanges, client, progress)
    try:
        asyncio.run(work.run())
    finally:
        judgements = [work.done.get(place, task) for place, task in enumerate(questions.tasks)]
        together = [*beside, *judgements]
        result = summarise(questions, together, seed=seed).model_copy(
            update=_accounting(questions, judgements, exchanges, before)
        )
        # A server that gave nothing does not replace what an earlier one gave.
        if not work.stopped or result.invocation.scored:
            records = [json_line(one.as_json()) for one in together if one.asked]
            write_text(run.path / "judge.jsonl", "".join(records))
            run.write_json(SUMMARY, run.summary().having(judge=result))
    if work.stopped:
        raise work.stopped
    if work.limit_reached:
        raise RunFailed(
            f"judging stopped at judge.max-cost-usd={questions.config.max_cost_usd:g}: "
            f"{len(work.done)} of {len(questions.tasks)} judgements are done; raise the limit and "
            "run the same command, it goes on from there"
        )
    return result


def _accounting(
    questions: JudgeQuestions,
    judgements: Sequence[Judgement],
    exchanges: Exchanges,
    before: Mapping[str, float],
) -> dict[str, object]:
    """Return who answered, and what asking took: of all invocations, and of this one."""
    after = usage(exchanges, questions.config)
    spent = {key: after[key] - before[key] for key in after}
    return {
        "served_by": tuple(sorted({one.served_by for one in exchanges.by_key.values()})),
        "usage": Counts.model_validate({key: after[key] for key in after if key != "cost_usd"}),
        "cost_usd": after["cost_usd"],
        "invocation": counts(judgements).model_copy(update={"judges": questions.judges, **spent}),
    }


@dataclass
class _Judging:
    """One invocation, shared by its workers; exchanges are looked up before they are made."""

    questions: JudgeQuestions
    exchanges: Exchanges
    client: JudgeClient
    progress: Progress
    done: dict[int, Judgement] = field(default_factory=dict)
    """By the task's place."""
    failures_in_a_row: int = 0
    refusals: int = 0
    refused: dict[str, tuple[str, int]] = field(default_factory=dict)
    """Judge and status, by question."""
    stopped: FedrxError | None = None
    limit_reached: bool = False
    locks: dict[str, asyncio.Lock] = field(default_factory=dict)

    async def run(self) -> None:
        """Let as many workers as are asked for do all tasks."""
        tasks = iter(enumerate(self.questions.tasks))
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self.questions.config.concurrency, len(self.questions.tasks))):
                    group.create_task(self._work(tasks))
        finally:
            for key, (judge, status) in self.refused.items():
                # A judge that answers others: this list alone was at fault.
                if judge in self.client.kept:
                    self.exchanges.put(RefusedQuestion(refused=status, key=key))
            with contextlib.suppress(Exception):
                await self.client.close()

    async def _work(self, tasks: Iterator[tuple[int, Judgement]]) -> None:
        for place, task in tasks:
            if self.stopped or self.limit_reached:
                return
            try:
                judgement = await self._judge(task)
                self.failures_in_a_row = 0
            except CostLimit:
                self.limit_reached = True
                return
            except FedrxError as error:
                self._stop(error)
                return
            except Refused as refusal:
                self._count_refusal(refusal)
                judgement = task.found(problem=str(refusal))
            except Unavailable as failure:
                self._count_failure(failure)
                judgement = task.found(problem=f"server: {failure}")
            self.done[place] = judgement
            self.progress(len(self.done), len(self.questions.tasks))

    def _stop(self, error: FedrxError) -> None:
        self.stopped = self.stopped or error

    def _count_refusal(self, refusal: Refused) -> None:
        self.refusals += 1
        if self.refusals >= _REFUSED_AT_FIRST and not self.client.kept:
            self._stop(
                UserError(
                    f"judge server {self.questions.endpoint.named} refuses the call (status "
                    f"{refusal.status} for each of {self.refusals} lists)",
                    fix="check judge.model, judge.max-output-tokens (it counts towards the "
                    "server's context) and the server's log",
                )
            )

    def _count_failure(self, failure: Unavailable) -> None:
        self.failures_in_a_row += 1
        if self.failures_in_a_row >= _FAILURES_IN_A_ROW:
            here = self.questions.endpoint.loopback
            fix = "start it" if here else "check judge.base-url and the network or proxy"
            self._stop(
                RunFailed(
                    f"judge server {self.questions.endpoint.named} fails: {failure} "
                    f"({self.questions.config.attempts} tries each for {self.failures_in_a_row} "
                    f"lists in a row); {fix}, then run the same command again"
                )
            )

    async def _judge(self, task: Judgement) -> Judgement:
        asked = self.questions.first_messages(task)
        first = await self._exchange(task, asked)
        keys: tuple[str, ...] = (first.key,)
        try:
            try:
                reading = self._verdicts(first, task)
            except ReplyProblem as problem:
                mending = repair_messages(asked, writable(first.text)[0], problem)
                second = await self._exchange(task, mending)
                keys = (first.key, second.key)
                reading = self._verdicts(second, task)
        except ReplyProblem as last:
            return task.found(problem=last.kind, exchanges=keys)
        return task.found(verdicts=reading.verdicts, exchanges=keys, escaped=reading.escaped)

    def _verdicts(self, exchange: Exchange, task: Judgement) -> Reading:
        try:
            return read_verdicts(exchange.text, self.questions.lists[task.case, task.model].drugs)
        except ReplyProblem as problem:
            if exchange.cut:
                detail = "it was cut off; keep the reasons shorter"
                raise ReplyProblem("cut", detail) from problem
            raise

    async def _exchange(self, task: Judgement, asked: Sequence[Mapping[str, str]]) -> Exchange:
        keys = self.questions.keys(task, asked)
        question, known = keys[0], self.exchanges.by_key
        # Equal lists of two models are one question: the second waits for the first's answer.
        async with self.locks.setdefault(question, asyncio.Lock()):
            if answered := next((known[key] for key in keys if key in known), None):
                return answered
            before = None if self.questions.retry_refused else self.exchanges.refused.get(question)
            if question in self.refused or before:
                raise Refused(before or self.refused[question][1])
            try:
                return await self.client.ask(task.judge, asked, task.repeat)
            except Refused as refusal:
                self.refused[question] = task.judge, refusal.status
                raise


def _keep_statement(run: RunDirectory, questions: JudgeQuestions, statement: Statement) -> None:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    record = {"time": now, "source": questions.source, "server": questions.endpoint.named}
    (run.path / STATEMENTS).parent.mkdir(parents=True, exist_ok=True)
    run.append(str(STATEMENTS), {**record, **asdict(statement)})


def _judged_before(run: RunDirectory, questions: JudgeQuestions) -> list[Judgement]:
    """Read what stays: other judges' words on the answers that are still there."""
    stay = []
    for line in read_judgements(run):
        item = questions.lists.get((line.case, line.model))
        now = line.judge in questions.judges and line.server == questions.endpoint.named
        if item is None or (now and line.model in questions.models):
            continue
        if not line.verdicts or tuple(verdict.drug for verdict in line.verdicts) == item.drugs:
            stay.append(line)
    return stay
