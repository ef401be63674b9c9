"""What judging a run will ask: which lists, which judges, how often, where, at what price."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

from common.config import JudgeConfig
from common.errors import UserError
from common.evaluation.judge.cache import Exchanges, exchange_key, read_exchanges
from common.evaluation.judge.client import dialects
from common.evaluation.judge.cost import Prices, estimated_tokens
from common.evaluation.judge.gate import Endpoint, Statement, check_endpoint, source_of_run
from common.evaluation.judge.rubric import Verdict, distinct_drugs, messages
from common.rundir import RunDirectory

EXCHANGES = Path("judge") / "exchanges.jsonl"
_VERDICT_TOKENS = 32
"""Usual length of one verdict beside the drug's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One list of one model, and whom it was written for; the truth is not in it."""

    case: str
    cluster: int
    predicted_by: str
    patient: Mapping[str, Any]
    diagnoses: tuple[str, ...]
    drugs: tuple[str, ...]


class Task(NamedTuple):
    """One list before one judge, once."""

    item: Item
    judge: str
    repeat: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What came of one task."""

    task: Task
    verdicts: tuple[Verdict, ...] | None
    """None: unscored, or not asked."""
    problem: str = ""
    """Why it is unscored: the kind of the last reply's problem, or how the server failed."""
    asked: bool = True
    """False when the run stopped before its turn."""
    keys: tuple[str, ...] = ()
    """Its exchanges in the cache; the second is the repair."""

    @property
    def score(self) -> float | None:
        """Suitable / all; None when unscored."""
        if self.verdicts is None:
            return None
        return sum(verdict.suitable for verdict in self.verdicts) / len(self.verdicts)


@dataclass(frozen=True, kw_only=True)
class JudgePlan:
    """What judging a run asks for."""

    items: tuple[Item, ...]
    unanswered: Mapping[str, int]
    """Per model: answers that were not in the format; there is no list to judge."""
    empty: Mapping[str, int]
    """Per model: answers in the format without a drug."""
    tasks: tuple[Task, ...]
    endpoint: Endpoint
    source: str
    config: JudgeConfig


def plan_judging(
    run: RunDirectory,
    config: JudgeConfig,
    *,
    predicted_by: Sequence[str] = (),
    statement: Statement | None = None,
) -> JudgePlan:
    """Read the predictions and check that they may go where the configuration sends them.

    Args:
        run: A run with predictions.jsonl.
        config: The ``[judge]`` section.
        predicted_by: Models to judge; empty for all.
        statement: From the command line.

    Raises:
        UserError: Without predictions or a judge model, or if the data may not go there.
    """
    source = source_of_run(run.read_json("summary.json"), run.read_json("data.json"))
    endpoint = check_endpoint(config.base_url, source=source, statement=statement)
    judges = [name.strip() for name in config.model.split(",") if name.strip()]
    if not judges or len(set(judges)) < len(judges):
        raise UserError(
            f"judge.model={config.model!r}",
            allowed="the judge's name on the server, or several different ones comma-separated",
            fix="--set judge.model=NAME",
        )
    if config.max_cost_usd and not (config.input_usd_per_million or config.output_usd_per_million):
        raise UserError(
            "judge.max-cost-usd is set, but no price",
            fix="set judge.input-usd-per-million and judge.output-usd-per-million",
        )
    lines = run.lines("predictions.jsonl")
    present = list(dict.fromkeys(line["model"] for line in lines))
    unknown = [name for name in predicted_by if name not in present]
    if not lines or unknown:
        raise UserError(
            f"{run.path} has no predictions" + (f" by {', '.join(unknown)}" if unknown else ""),
            allowed=", ".join(present),
            fix="run `fedrx evaluate` first" if not lines else "name models of this run",
        )
    kept = [line for line in lines if not predicted_by or line["model"] in predicted_by]
    items = [item_of(line) for line in kept if line["answer"] and distinct_drugs(line["answer"])]
    names = [name for name in present if not predicted_by or name in predicted_by]
    unanswered = {n: sum(x["answer"] is None and x["model"] == n for x in kept) for n in names}
    all_lists = {n: sum(x["model"] == n for x in kept) for n in names}
    judged = {n: sum(item.predicted_by == n for item in items) for n in names}
    return JudgePlan(
        items=tuple(items),
        unanswered=unanswered,
        empty={n: all_lists[n] - unanswered[n] - judged[n] for n in names},
        tasks=tuple(
            Task(item, judge, repeat)
            for item in items
            for judge in judges
            for repeat in range(config.repeats)
        ),
        endpoint=endpoint,
        source=source,
        config=config,
    )


def item_of(line: Mapping[str, Any]) -> Item:
    """Take what a judge may know out of a line of predictions.jsonl."""
    return Item(
        case=line["case"],
        cluster=line["cluster"],
        predicted_by=line["model"],
        patient=line["patient"],
        diagnoses=tuple(line["diagnoses"]),
        drugs=distinct_drugs(line["answer"]),
    )


def estimate(run: RunDirectory, plan: JudgePlan) -> dict[str, Any]:
    """Return what judging would ask and cost, without any call.

    ``input_tokens`` and ``output_tokens`` are estimates from text sizes for one try per list;
    ``most_usd`` is the price if every list needed its repair and every reply took all its tokens.
    """
    made = read_exchanges(run.path / EXCHANGES)
    # Equal lists for one patient are one call.
    calls: dict[str, Task] = {}
    for task in plan.tasks:
        keys = exchange_keys(plan, task, first_messages(task))
        if not any(made.get(key) for key in keys):
            calls.setdefault(keys[0], task)
    input_tokens = output_tokens = 0
    for task in calls.values():
        asked = first_messages(task)
        input_tokens += estimated_tokens(sum(len(m["content"].encode()) for m in asked))
        names = sum(len(drug.encode()) for drug in task.item.drugs)
        output_tokens += estimated_tokens(names) + _VERDICT_TOKENS * len(task.item.drugs)
    prices = prices_of(plan.config)
    most_output = 2 * len(calls) * plan.config.max_output_tokens
    most_input = 2 * ceil(3.5 * input_tokens) + most_output
    return {
        "lists": len(plan.items),
        "judgements": len(plan.tasks),
        "calls": len(calls),
        "cached": len(plan.tasks) - len(calls),
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "cost_usd": round(prices.cost_usd(input_tokens, output_tokens), 6),
        "most_usd": round(prices.cost_usd(most_input, most_output), 6),
        "spent_usd": round(spent_usd(made, plan.config), 6),
        "max_cost_usd": plan.config.max_cost_usd,
        "server": plan.endpoint.named,
        "source": plan.source,
    }


def first_messages(task: Task) -> list[dict[str, str]]:
    """Return what a task asks first."""
    return messages(task.item.patient, task.item.diagnoses, task.item.drugs)


def exchange_keys(plan: JudgePlan, task: Task, asked: Sequence[Mapping[str, str]]) -> list[str]:
    """Return the cache keys of one question, one for each dialect it may be asked in."""
    bodies = (dialect.body(task.judge, asked, plan.config) for dialect in dialects(plan.config))
    return [exchange_key(plan.endpoint.named, body, task.repeat) for body in bodies]


def prices_of(config: JudgeConfig) -> Prices:
    """Return the configured prices."""
    return Prices(input_usd=config.input_usd_per_million, output_usd=config.output_usd_per_million)


def spent_usd(made: Exchanges, config: JudgeConfig) -> float:
    """Return what all calls so far have cost, broken ones at their worst."""
    return prices_of(config).cost_usd(
        sum(exchange.input_tokens for exchange in made.all()) + made.lost_input_tokens,
        sum(exchange.output_tokens for exchange in made.all()) + made.lost_output_tokens,
    )
