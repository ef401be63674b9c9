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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from common.errors import FedrxError, RunFailed, UserError
from common.evaluation.judge.cache import Exchange, ExchangeCache, exchange_key
from common.evaluation.judge.client import JudgeClient, Refused, Unavailable
from common.evaluation.judge.cost import CostLimit, Meter
from common.evaluation.judge.dialect import Dialect, dialects
from common.evaluation.judge.gate import Statement
from common.evaluation.judge.plan import (
    EXCHANGES,
    Judgement,
    JudgePlan,
    Task,
    exchange_keys,
    first_messages,
    prices_of,
    read_judgements,
)
from common.evaluation.judge.rubric import (
    Reading,
    ReplyProblem,
    read_verdicts,
    repair_messages,
)
from common.evaluation.judge.summary import counts, summarise, usage
from common.files import json_line, writable, write_json, write_text
from common.rundir import RunDirectory

STATEMENTS = Path("judge") / "statements.jsonl"
_FAILURES_IN_A_ROW = 3
_REFUSED_AT_FIRST = 10
"""So many refusals and no answer: not the lists are wrong, but the call."""

Progress = Callable[[int, int], None]


@dataclass
class _Progress:
    """What the workers share."""

    total: int
    report: Progress | None
    done: dict[int, Judgement] = field(default_factory=dict)
    failures_in_a_row: int = 0
    refused: int = 0
    stopped: FedrxError | None = None
    limit_reached: bool = False

    def add(self, place: int, judgement: Judgement) -> None:
        self.done[place] = judgement
        if self.report:
            self.report(len(self.done), self.total)


def judge_run(
    run: RunDirectory,
    plan: JudgePlan,
    *,
    api_key: str = "",
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Ask the judges, write judge.jsonl and the ``judge`` part of summary.json.

    Args:
        run: The run that the plan was made for.
        plan: From ``plan_judging``.
        api_key: Empty for none.
        seed: Of the interval's resamples.
        progress: Called with (done, all).

    Returns:
        The ``judge`` part of the summary.

    Raises:
        UserError: If the server refuses the calls as such.
        RunFailed: If it does not answer, or the cost limit stopped it. What was judged so far, if
            anything, is written first, and the same command goes on from there.
    """
    if plan.endpoint.statement:
        _keep_statement(run, plan, plan.endpoint.statement)
    beside = _judged_before(run, plan)
    shared = _Progress(total=len(plan.tasks), report=progress)
    prices = prices_of(plan.config)
    with ExchangeCache(run.path / EXCHANGES) as cache:
        before = usage(cache.exchanges, prices)
        limit = plan.config.max_cost_usd
        meter = Meter(prices, limit_usd=limit, spent_usd=before["cost_usd"])
        try:
            asyncio.run(_judge_all(plan, cache, meter, shared, api_key))
        finally:
            judgements = [
                shared.done.get(place, Judgement.of(task, asked=False))
                for place, task in enumerate(plan.tasks)
            ]
            scored = sum(judgement.scored for judgement in judgements)
            together = [*beside, *judgements]
            after = usage(cache.exchanges, prices)
            result = summarise(plan, together, seed=seed) | {
                "served_by": sorted({one.served_by for one in cache.exchanges.all()}),
                "usage": {key: after[key] for key in after if key != "cost_usd"},
                "cost_usd": after["cost_usd"],
                "invocation": {
                    "judges": list(plan.judges),
                    **counts(judgements),
                    **{key: after[key] - before[key] for key in after},
                },
            }
            # A server that gave nothing does not replace what an earlier one gave.
            if not shared.stopped or scored:
                records = [json_line(j.as_json()) for j in together if j.asked]
                write_text(run.path / "judge.jsonl", "".join(records))
                summary = run.read_json("summary.json")
                write_json(run.path / "summary.json", {**summary, "judge": result})
    if shared.stopped:
        raise shared.stopped
    if shared.limit_reached:
        raise RunFailed(
            f"judging stopped at judge.max-cost-usd={plan.config.max_cost_usd:g}: "
            f"{len(shared.done)} of {shared.total} judgements are done; raise the limit and run "
            "the same command, it goes on from there"
        )
    return result


async def _judge_all(
    plan: JudgePlan,
    cache: ExchangeCache,
    meter: Meter,
    shared: _Progress,
    api_key: str,
) -> None:
    client = JudgeClient(
        plan.endpoint,
        plan.config,
        api_key=api_key,
        meter=meter,
        lost=cache.put_lost,
        kept=_kept_dialects(plan, cache),
    )
    session = _Session(plan, cache, client)
    queue = iter(enumerate(plan.tasks))

    async def work() -> None:
        for place, task in queue:
            if shared.stopped or shared.limit_reached:
                return
            try:
                judgement = await session.judge(task)
            except CostLimit:
                shared.limit_reached = True
                return
            except FedrxError as error:
                shared.stopped = shared.stopped or error
                return
            except Refused as refusal:
                shared.refused += 1
                if shared.refused >= _REFUSED_AT_FIRST and not client.kept:
                    shared.stopped = shared.stopped or UserError(
                        f"judge server {plan.endpoint.named} refuses the call (status "
                        f"{refusal.status} for each of {shared.refused} lists)",
                        fix="check judge.model, judge.max-output-tokens (it counts towards the "
                        "server's context) and the server's log",
                    )
                judgement = Judgement.of(task, problem=str(refusal))
            except Unavailable as failure:
                shared.failures_in_a_row += 1
                if shared.failures_in_a_row >= _FAILURES_IN_A_ROW:
                    shared.stopped = shared.stopped or RunFailed(
                        f"judge server {plan.endpoint.named} fails: {failure} "
                        f"({plan.config.attempts} tries each for {shared.failures_in_a_row} lists "
                        "in a row); start it, then run the same command again"
                    )
                judgement = Judgement.of(task, problem=f"server: {failure}")
            else:
                shared.failures_in_a_row = 0
            shared.add(place, judgement)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(plan.config.concurrency, len(plan.tasks))):
                group.create_task(work())
    finally:
        session.keep()
        with contextlib.suppress(Exception):
            await client.close()


def _kept_dialects(plan: JudgePlan, cache: ExchangeCache) -> dict[str, Dialect]:
    known = {
        judge: Dialect(**cache.exchanges.dialects[f"{plan.endpoint.named} {judge}"])
        for judge in plan.judges
        if f"{plan.endpoint.named} {judge}" in cache.exchanges.dialects
    }
    allowed = dialects(plan.config)
    return {judge: dialect for judge, dialect in known.items() if dialect in allowed}


class _Session:
    """Judges one task at a time per caller; exchanges are looked up before they are made."""

    def __init__(self, plan: JudgePlan, cache: ExchangeCache, client: JudgeClient) -> None:
        self._plan, self._cache, self._client = plan, cache, client
        self._locks: dict[str, asyncio.Lock] = {}
        self._refused: dict[str, tuple[str, int]] = {}

    async def judge(self, task: Task) -> Judgement:
        asked = first_messages(task)
        first = await self._exchange(task, asked)
        keys: tuple[str, ...] = (first.key,)
        try:
            try:
                reading = _verdicts(first, task)
            except ReplyProblem as problem:
                second = await self._exchange(
                    task, repair_messages(asked, writable(first.text)[0], problem)
                )
                keys = (first.key, second.key)
                reading = _verdicts(second, task)
        except ReplyProblem as last:
            return Judgement.of(task, problem=last.kind, exchanges=keys)
        return Judgement.of(
            task, verdicts=reading.verdicts, exchanges=keys, escaped=reading.escaped
        )

    def keep(self) -> None:
        """Keep what was refused by a judge that answers: its lists alone were at fault."""
        for key, (judge, status) in self._refused.items():
            if judge in self._client.kept:
                self._cache.put_refused(key, status)

    async def _exchange(self, task: Task, asked: Sequence[Mapping[str, str]]) -> Exchange:
        keys = exchange_keys(self._plan, task, asked)
        # Equal lists of two models are one question: the second waits for the first's answer.
        async with self._locks.setdefault(keys[0], asyncio.Lock()):
            made = self._cache.exchanges
            known = next((made.by_key[key] for key in keys if key in made.by_key), None)
            return known or await self._ask(task, asked, keys[0])

    async def _ask(self, task: Task, asked: Sequence[Mapping[str, str]], question: str) -> Exchange:
        before = None if self._plan.retry_refused else self._cache.exchanges.refused.get(question)
        if question in self._refused or before:
            raise Refused(before or self._refused[question][1])
        try:
            body, reply = await self._client.ask(task.judge, asked)
        except Refused as refusal:
            self._refused[question] = task.judge, refusal.status
            raise
        named = self._plan.endpoint.named
        exchange = Exchange(key=exchange_key(named, body, task.repeat), **asdict(reply))
        self._cache.put(exchange)
        dialect = self._client.kept[task.judge]
        if dialect != dialects(self._plan.config)[0]:
            self._cache.put_dialect(f"{named} {task.judge}", asdict(dialect))
        return exchange


def _verdicts(exchange: Exchange, task: Task) -> Reading:
    try:
        return read_verdicts(exchange.text, task.item.drugs)
    except ReplyProblem as problem:
        if exchange.cut:
            raise ReplyProblem("cut", "it was cut off; keep the reasons shorter") from problem
        raise


def _keep_statement(run: RunDirectory, plan: JudgePlan, statement: Statement) -> None:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    record = {"time": now, "source": plan.source, "server": plan.endpoint.named}
    (run.path / STATEMENTS).parent.mkdir(parents=True, exist_ok=True)
    run.append(str(STATEMENTS), {**record, **asdict(statement)})


def _judged_before(run: RunDirectory, plan: JudgePlan) -> list[Judgement]:
    """Read what stays beside this plan: other judges' words on the answers that are still there."""
    stay = []
    for line in read_judgements(run):
        item = plan.lists.get((line.case, line.model))
        now = line.judge in plan.judges and line.server == plan.endpoint.named
        if item is None or (now and line.model in plan.models):
            continue
        if not line.verdicts or tuple(verdict.drug for verdict in line.verdicts) == item.drugs:
            stay.append(line)
    return stay
