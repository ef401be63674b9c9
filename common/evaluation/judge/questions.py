"""What judging a run will ask: which lists, which judges, how often, where, at what price."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ConfigDict, Field, computed_field

from common.config import JudgeConfig
from common.errors import UserError
from common.evaluation.answers_file import Patient, Prediction, read_answers
from common.evaluation.judge.cache import Exchanges, exchange_key
from common.evaluation.judge.cost import cost_usd, estimated_tokens, usage
from common.evaluation.judge.dialect import dialects
from common.evaluation.judge.gate import Endpoint, Statement, check_endpoint, source_of_run
from common.evaluation.judge.rubric import Verdict, distinct_drugs, messages
from common.records import Record
from common.records.judged import Estimate
from common.rundir import RunDirectory

EXCHANGES = Path("judge") / "exchanges.jsonl"
_VERDICT_TOKENS = 32
"""Usual length of one verdict beside the drug's name."""


class Item(NamedTuple):
    """One list of one model, and whom it was written for; the truth is not in it."""

    case: str
    cluster: int
    model: str
    patient: Patient
    diagnoses: tuple[str, ...]
    drugs: tuple[str, ...]


class Judgement(Record):
    """One list before one judge, once, and what came of it: a line of judge.jsonl."""

    model_config = ConfigDict(extra="ignore")

    case: str
    model: str
    judge: str
    repeat: int
    verdicts: tuple[Verdict, ...] | None = None
    """None: unscored, or not asked."""
    problem: str | None = None
    """Why it is unscored: the kind of the last reply's problem, or how the server failed."""
    exchanges: tuple[str, ...] = ()
    """Their keys in the cache; the second is the repair."""
    server: str = ""
    """Two servers may call different judges by one name."""
    escaped: int = 0
    """Texts of the reply that UTF-8 cannot hold; in the file only where there are some."""
    asked: bool = Field(default=True, exclude=True)
    """False before its turn; it has no line then."""

    def found(self, **what: Any) -> "Judgement":
        """Return what came of it."""
        return self.model_copy(update={"asked": True, **what})

    @computed_field  # type: ignore[prop-decorator]
    @property
    def scored(self) -> bool:
        """Whether there are verdicts."""
        return self.verdicts is not None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def score(self) -> float | None:
        """Suitable / all; None when unscored."""
        if self.verdicts is None:
            return None
        return sum(verdict.suitable for verdict in self.verdicts) / len(self.verdicts)

    def as_json(self) -> dict[str, Any]:
        """Return the line's content."""
        line = super().as_json()
        return line if self.escaped else {k: v for k, v in line.items() if k != "escaped"}


@dataclass(frozen=True, kw_only=True)
class JudgeQuestions:
    """What judging a run asks for."""

    lists: Mapping[tuple[str, str], Item]
    """Every list of the run that can be judged, by case and model."""
    unanswered: Mapping[str, int]
    """Per model: answers that were not in the format; there is no list to judge."""
    empty: Mapping[str, int]
    """Per model: answers in the format without a drug."""
    models: tuple[str, ...]
    """Whose lists are judged now."""
    judges: tuple[str, ...]
    endpoint: Endpoint
    source: str
    config: JudgeConfig
    retry_refused: bool = False
    """Ask again what the server did not take the last time."""

    @property
    def items(self) -> tuple[Item, ...]:
        """The lists that are judged now."""
        return tuple(i for i in self.lists.values() if i.model in self.models)

    @cached_property
    def tasks(self) -> tuple[Judgement, ...]:
        """Every list before every judge, as often as asked for."""
        return tuple(
            Judgement(
                case=item.case,
                model=item.model,
                judge=judge,
                repeat=repeat,
                server=self.endpoint.named,
                asked=False,
            )
            for item in self.items
            for judge in self.judges
            for repeat in range(self.config.repeats)
        )

    def first_messages(self, task: Judgement) -> list[dict[str, str]]:
        """Return what a task asks first."""
        item = self.lists[task.case, task.model]
        return messages(item.patient, item.diagnoses, item.drugs)

    def keys(self, task: Judgement, asked: Sequence[Mapping[str, str]]) -> list[str]:
        """Return the cache keys of one question, one for each dialect it may be asked in."""
        bodies = (dialect.body(task.judge, asked, self.config) for dialect in dialects(self.config))
        return [exchange_key(self.endpoint.named, body, task.repeat) for body in bodies]


def questions_of(
    run: RunDirectory,
    config: JudgeConfig,
    *,
    predicted_by: Sequence[str] = (),
    statement: Statement | None = None,
    dry_run: bool = False,
    retry_refused: bool = False,
) -> JudgeQuestions:
    """Read the predictions and check that they may go where the configuration sends them.

    Args:
        run: A run with predictions.jsonl.
        config: The ``[judge]`` section.
        predicted_by: Models to judge; empty for all.
        statement: From the command line.
        dry_run: Nothing will be sent: a judge need not be named.
        retry_refused: Ask again what the server did not take the last time.

    Raises:
        UserError: Without predictions or a judge model, or if the data may not go there.
    """
    source = source_of_run(run)
    endpoint = check_endpoint(config.base_url, source=source, statement=statement)
    _require_prices(config)
    lines = read_answers(run)
    present = tuple(dict.fromkeys(line.model for line in lines))
    _require_predictions(run, present, predicted_by)
    items = [item for line in lines if (item := item_of(line)).drugs]
    lists = Counter(line.model for line in lines)
    unanswered = Counter(line.model for line in lines if line.answer is None)
    judged = Counter(item.model for item in items)
    return JudgeQuestions(
        lists={(item.case, item.model): item for item in items},
        unanswered={name: unanswered[name] for name in present},
        empty={name: lists[name] - unanswered[name] - judged[name] for name in present},
        models=tuple(name for name in present if not predicted_by or name in predicted_by),
        judges=_judges(config, named=not dry_run),
        endpoint=endpoint,
        source=source,
        config=config,
        retry_refused=retry_refused,
    )


def _judges(config: JudgeConfig, *, named: bool) -> tuple[str, ...]:
    judges = tuple(name.strip() for name in config.model.split(",") if name.strip())
    if len(set(judges)) < len(judges) or (named and not judges):
        raise UserError(
            f"judge.model={config.model!r}",
            allowed="the judge's name on the server, or several different ones comma-separated",
            fix="--set judge.model=NAME",
        )
    return judges or ("",)


def _require_prices(config: JudgeConfig) -> None:
    if config.max_cost_usd and not (config.input_usd_per_million or config.output_usd_per_million):
        raise UserError(
            "judge.max-cost-usd is set, but no price",
            fix="set judge.input-usd-per-million and judge.output-usd-per-million",
        )


def _require_predictions(run: RunDirectory, present: Sequence[str], wanted: Sequence[str]) -> None:
    unknown = [name for name in wanted if name not in present]
    if not present or unknown:
        raise UserError(
            f"{run.path} has no predictions" + (f" by {', '.join(unknown)}" if unknown else ""),
            allowed=", ".join(present),
            fix="name models of this run" if present else "run `fedrx evaluate` first",
        )


def item_of(line: Prediction) -> Item:
    """Take what a judge may know out of a line of predictions.jsonl."""
    drugs = distinct_drugs(line.answer or ())
    return Item(line.case, line.cluster, line.model, line.patient, line.diagnoses, drugs)


def read_judgements(run: RunDirectory) -> list[Judgement]:
    """Return the lines of judge.jsonl, if they are about the run's present answers.

    An evaluation of other answers takes the judgement out of the summary.
    """
    judged = run.summary().judge
    if judged is None:
        return []
    lines = [{"server": judged.server, **line} for line in run.lines("judge.jsonl")]
    return [
        Judgement.read(line, what=f"judge.jsonl, line {number}")
        for number, line in enumerate(lines, start=1)
    ]


def estimate(run: RunDirectory, questions: JudgeQuestions) -> Estimate:
    """Return what judging would ask and cost, without any call; tokens follow from text sizes."""
    made = Exchanges(run.path / EXCHANGES)
    # Equal lists for one patient are one call.
    calls: dict[str, Judgement] = {}
    for task in questions.tasks:
        keys = questions.keys(task, questions.first_messages(task))
        refused = keys[0] in made.refused and not questions.retry_refused
        if not refused and not any(key in made.by_key for key in keys):
            calls.setdefault(keys[0], task)
    input_tokens = output_tokens = 0
    for task in calls.values():
        asked, drugs = questions.first_messages(task), questions.lists[task.case, task.model].drugs
        input_tokens += estimated_tokens(sum(len(m["content"].encode()) for m in asked))
        names = sum(len(drug.encode()) for drug in drugs)
        output_tokens += estimated_tokens(names) + _VERDICT_TOKENS * len(drugs)
    most_output = 2 * len(calls) * questions.config.max_output_tokens
    most_input = 2 * ceil(3.5 * input_tokens) + most_output
    return Estimate(
        lists=len(questions.items),
        judgements=len(questions.tasks),
        calls=len(calls),
        cached=len(questions.tasks) - len(calls),
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        cost_usd=round(cost_usd(questions.config, input_tokens, output_tokens), 6),
        most_usd=round(cost_usd(questions.config, most_input, most_output), 6),
        spent_usd=round(usage(made, questions.config)["cost_usd"], 6),
        max_cost_usd=questions.config.max_cost_usd,
        server=questions.endpoint.named,
        source=questions.source,
    )
