"""Appropriateness by LLM judges: suitable / all drugs of a list, averaged over samples.

Each list of predictions.jsonl is shown to each judge ``repeats`` times. A reply that is not one
verdict per drug is asked for once more; then the judgement is ``unscored``: counted beside the
mean, never a number. Everything asked and answered lies in ``judge/exchanges.jsonl``, so the same
command goes on where it was stopped, and judge.jsonl is derived from it.
"""

import asyncio
import contextlib
import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from common.errors import FedrxError, RunFailed
from common.evaluation.judge.cache import Exchange, ExchangeCache, exchange_key
from common.evaluation.judge.client import JudgeClient, Unavailable, Unsupported, dialects
from common.evaluation.judge.cost import CostLimit, Meter
from common.evaluation.judge.gate import Statement
from common.evaluation.judge.plan import (
    EXCHANGES,
    Judgement,
    JudgePlan,
    Task,
    exchange_keys,
    first_messages,
    prices_of,
    spent_usd,
)
from common.evaluation.judge.rubric import (
    ReplyProblem,
    Verdict,
    read_verdicts,
    repair_messages,
)
from common.evaluation.judge.summary import summarise
from common.files import atomic_path, write_json
from common.rundir import RunDirectory

STATEMENTS = Path("judge") / "statements.jsonl"
_FAILURES_IN_A_ROW = 3

Progress = Callable[[int, int], None]


@dataclass
class _Progress:
    """What the workers share."""

    total: int
    report: Progress | None
    done: dict[int, Judgement] = field(default_factory=dict)
    failures_in_a_row: int = 0
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
    shared = _Progress(total=len(plan.tasks), report=progress)
    with ExchangeCache(run.path / EXCHANGES) as cache:
        prices = prices_of(plan.config)
        meter = Meter(
            prices,
            limit_usd=plan.config.max_cost_usd,
            spent_usd=spent_usd(cache.exchanges, plan.config),
        )
        try:
            asyncio.run(_judge_all(plan, cache, meter, shared, api_key))
        finally:
            judgements = [
                shared.done.get(place, Judgement(task=task, verdicts=None, asked=False))
                for place, task in enumerate(plan.tasks)
            ]
            result = summarise(plan, judgements, cache.exchanges, prices, seed=seed)
            # A server that gave nothing does not replace what an earlier one gave.
            if not shared.stopped or result["judgements"]["scored"]:
                _write_lines(run.path / "judge.jsonl", judgements)
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
        plan.endpoint, plan.config, api_key=api_key, meter=meter, lost=cache.put_lost
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
            except Unavailable as failure:
                shared.failures_in_a_row += 1
                if shared.failures_in_a_row >= _FAILURES_IN_A_ROW:
                    shared.stopped = shared.stopped or RunFailed(
                        f"judge server {plan.endpoint.named} fails: {failure} "
                        f"({plan.config.attempts} tries each for {shared.failures_in_a_row} lists "
                        "in a row); start it, then run the same command again"
                    )
                judgement = Judgement(task=task, verdicts=None, problem=f"server: {failure}")
            else:
                shared.failures_in_a_row = 0
            shared.add(place, judgement)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(plan.config.concurrency, len(plan.tasks))):
                group.create_task(work())
    finally:
        with contextlib.suppress(Exception):
            await client.close()


class _Session:
    """Judges one task at a time per caller; exchanges are looked up before they are made."""

    def __init__(self, plan: JudgePlan, cache: ExchangeCache, client: JudgeClient) -> None:
        self._plan, self._cache, self._client = plan, cache, client
        self._dialect = dialects(plan.config)[0]
        self._locks: dict[str, asyncio.Lock] = {}

    async def judge(self, task: Task) -> Judgement:
        asked = first_messages(task)
        first = await self._exchange(task, asked)
        try:
            verdicts = _verdicts(first, task)
        except ReplyProblem as problem:
            mended = repair_messages(asked, first.text, problem)
            second = await self._exchange(task, mended)
            keys = (first.key, second.key)
            try:
                return Judgement(task=task, verdicts=_verdicts(second, task), keys=keys)
            except ReplyProblem as last:
                return Judgement(task=task, verdicts=None, problem=last.kind, keys=keys)
        return Judgement(task=task, verdicts=verdicts, keys=(first.key,))

    async def _exchange(self, task: Task, asked: Sequence[Mapping[str, str]]) -> Exchange:
        keys = exchange_keys(self._plan, task, asked)
        # Equal lists of two models are one question: the second waits for the first's answer.
        async with self._locks.setdefault(keys[0], asyncio.Lock()):
            return self._known(keys) or await self._ask(task, asked)

    def _known(self, keys: Sequence[str]) -> Exchange | None:
        found = (self._cache.exchanges.get(key) for key in keys)
        return next((exchange for exchange in found if exchange), None)

    async def _ask(self, task: Task, asked: Sequence[Mapping[str, str]]) -> Exchange:
        while True:
            dialect = self._dialect
            body = dialect.body(task.judge, asked, self._plan.config)
            try:
                reply = await self._client.send(body, dialect)
            except Unsupported as other:
                self._dialect = other.dialect
                continue
            key = exchange_key(self._plan.endpoint.named, body, task.repeat)
            exchange = Exchange(key=key, **asdict(reply))
            self._cache.put(exchange)
            return exchange


def _verdicts(exchange: Exchange, task: Task) -> tuple[Verdict, ...]:
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


def _write_lines(target: Path, judgements: Sequence[Judgement]) -> None:
    with atomic_path(target, mode=0o600) as temporary:
        records = [json.dumps(_record(j), ensure_ascii=False) + "\n" for j in judgements if j.asked]
        temporary.write_text("".join(records), encoding="utf-8")


def _record(judgement: Judgement) -> dict[str, Any]:
    task, verdicts = judgement.task, judgement.verdicts
    return {
        "case": task.item.case,
        "model": task.item.predicted_by,
        "judge": task.judge,
        "repeat": task.repeat,
        "scored": verdicts is not None,
        "score": judgement.score,
        "verdicts": None if verdicts is None else [asdict(verdict) for verdict in verdicts],
        "problem": judgement.problem or None,
        "exchanges": list(judgement.keys),
    }
