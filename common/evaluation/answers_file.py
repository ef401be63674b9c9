"""A run's answers: predictions.jsonl and, in summary.json, how they came about and their figures.

Judge, review and report read answers only as they were evaluated, by the digest in summary.json. A
summary without a digest (a run of an earlier FedRx, or one killed within an evaluation) promises
nothing about them, and they are taken as they are.
"""

import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from pydantic import ConfigDict, JsonValue, ValidationError

from common.config import EvaluationConfig
from common.files import json_line, utf8, writable, write_bytes
from common.records import Record
from common.records.summary import Summary
from common.rundir import SUMMARY, RunDirectory
from common.tensor_files import AS_WRITTEN, Altered

PREDICTIONS = "predictions.jsonl"
ANSWERS_SHA256 = "answers_sha256"
"""Key of ``evaluation`` in summary.json."""
_ABOUT_ANSWERS = ("judge", "review")
"""Parts of summary.json that are worth nothing without the answers that they are about."""


class Patient(Record):
    """What a prompt, a judge and a reviewer see of a patient; None is unknown."""

    model_config = ConfigDict(extra="ignore")

    sex: str
    age: str
    """As printed, see ``common.text.prompts.age_text``."""
    height_cm: float | None = None
    weight_kg: float | None = None
    bmi: float | None = None


class Prediction(Record):
    """One line of predictions.jsonl: one admission and one model's list; no ids, no dates."""

    absent_when_none = ("confidence",)
    case: str
    cluster: int
    """Number of the patient within this evaluation."""
    model: str
    patient: Patient
    diagnoses: tuple[str, ...]
    truth: tuple[str, ...]
    text: str | None
    """What the model wrote; None of a baseline."""
    answer: tuple[str, ...] | None
    """None: the text was not in the format."""
    confidence: tuple[float, ...] | None = None
    """Of a scored list: the probability of each of its drugs; else no key."""


class CutoffFacts(Record):
    """Where one hospital cuts its ranking of drugs; see ``common.evaluation.cutoff``."""

    names: int
    """Of the formulary."""
    threshold: float | None = None
    """None: lists have a length."""
    slope: float
    intercept: float
    admissions: int
    """Validation admissions that chose it."""
    f1: float
    """Mean F1 on those; it flatters."""
    weight: float | None = None
    """Of the training split's frequencies, where they count."""
    length: int | None = None
    """Drugs of every list, where they count."""


class Generation(Record):
    """How one model's answers were generated."""

    seconds: float
    tokens: int
    """Written; of scored lists those that the backbone read, of prompts and names."""
    cut_answers: int
    """Answers that ended at ``evaluation.max-new-tokens``."""
    escaped_names: int = 0
    """Names that UTF-8 cannot hold; in the file only where there are some."""
    cutoffs: dict[str, CutoffFacts] | None = None
    """Of scored lists, by hospital."""

    def and_(self, other: "Generation") -> "Generation":
        """Return both together, of two hospitals."""
        both = {**(self.cutoffs or {}), **(other.cutoffs or {})}
        return Generation(
            seconds=round(self.seconds + other.seconds, 3),
            tokens=self.tokens + other.tokens,
            cut_answers=self.cut_answers + other.cut_answers,
            escaped_names=self.escaped_names + other.escaped_names,
            cutoffs=both or None,
        )


class Way(NamedTuple):
    """What decides answers: those of two ways do not stand together."""

    checkpoint: str
    """The last of the run."""
    settings: EvaluationConfig
    device: str
    dtype: str


class Facts(Record):
    """``evaluation`` in summary.json: how the answers came about."""

    samples: int
    constrained: bool
    settings: EvaluationConfig
    dropped_diagnoses: int
    """Left out of prompts for ``train.max-length``."""
    left_out: dict[str, int] | None = None
    """The same of what only other protocols show, by kind; no key where it is nothing."""
    generation: dict[str, Generation]
    checkpoint: str
    """The last of the run."""
    device: str
    dtype: str
    answers_sha256: str | None = None

    @property
    def way(self) -> Way:
        """How they came about."""
        return Way(self.checkpoint, self.settings, self.device, self.dtype)

    def as_json(self) -> dict[str, Any]:
        """Return the part of summary.json; what is not there has no key."""
        part: dict[str, Any] = self.model_dump(mode="json", exclude_none=True)
        for one in part["generation"].values():
            if not one["escaped_names"]:
                del one["escaped_names"]
        return part


class _WithFigures(Record):
    """summary.json beside an evaluation: its figures are there."""

    model_config = ConfigDict(extra="ignore")

    metrics: dict[str, JsonValue]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The answers of one way, and their figures."""

    facts: Facts
    metrics: Mapping[str, JsonValue]
    """By model and baseline; see ``common.evaluation.metrics``."""
    predictions: Sequence[Prediction]

    @classmethod
    def read(cls, run: RunDirectory) -> "Evaluation | None":
        """Return what a run's directory holds; None if nothing says how it came about.

        Raises:
            Altered: if the answers are not those that were evaluated.
            UserError: if summary.json or a line of the answers is none that FedRx writes.
        """
        predictions = read_answers(run)
        summary = run.summary().as_json()
        try:
            facts = Facts.model_validate(summary.get("evaluation"))
        except ValidationError:
            return None
        figures = _WithFigures.read(summary, what=str(run.path / SUMMARY))
        return cls(facts=facts, metrics=figures.metrics, predictions=predictions)

    def beside(self, newer: "Evaluation") -> "Evaluation":
        """Return both, of one way; the newer answers take the place of older ones of a model."""
        rows = {(row.case, row.model): row for row in (*self.predictions, *newer.predictions)}
        generation = {**self.facts.generation, **newer.facts.generation}
        return replace(
            newer,
            facts=newer.facts.model_copy(update={"generation": generation}),
            metrics={**self.metrics, **newer.metrics},
            predictions=list(rows.values()),
        )


class EvaluationStore:
    """What a run's directory keeps of evaluations, by their way: those of one way at a time."""

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        self._kept: Evaluation | None = None
        self.damage: Altered | None = None
        """Why what is there cannot be used."""
        try:
            self._kept = Evaluation.read(run)
        except Altered as error:
            self.damage = error

    def get(self, way: Way) -> Evaluation | None:
        """Return what came about in this way."""
        return self._kept if self._kept and self._kept.facts.way == way else None

    def replaced_by(self, way: Way) -> Facts | None:
        """Return how the answers came about that answers of this way do not stand beside."""
        return self._kept.facts if self._kept and self._kept.facts.way != way else None

    def put(self, newer: Evaluation, summary: Summary) -> Summary:
        """Keep answers beside older ones of their way, in place of those of another.

        What is about answers that will be gone goes before them. Returns the summary as written.
        """
        kept = self.get(newer.facts.way)
        whole = kept.beside(newer) if kept else newer
        old: set[Prediction] = set()
        with contextlib.suppress(Altered):
            old = set(read_answers(self._run))
        if not old or not old <= set(whole.predictions):
            summary = summary.without(_ABOUT_ANSWERS)
        self._run.write_json(SUMMARY, summary)
        digest = write_answers(self._run, whole.predictions)
        evaluation = whole.facts.as_json() | {ANSWERS_SHA256: digest}
        summary = summary.having(metrics=whole.metrics, evaluation=evaluation)
        self._run.write_json(SUMMARY, summary)
        return summary


def read_answers(run: RunDirectory) -> list[Prediction]:
    """Return a run's answers.

    Raises:
        Altered: if they are not those that were evaluated.
        UserError: if summary.json or a line is none that FedRx writes.
    """
    evaluation = run.summary().evaluation
    digest = evaluation.answers_sha256 if evaluation else None
    file = run.path / PREDICTIONS
    content = file.read_bytes() if file.exists() else b""
    if digest is not None and hashlib.sha256(content).hexdigest() != digest:
        raise Altered(
            f"{PREDICTIONS} is damaged or was altered: it is not used",
            allowed=AS_WRITTEN,
            fix="bring it back from a copy, or let `fedrx evaluate` answer again",
        )
    return [
        Prediction.read(writable(line)[0], what=f"{PREDICTIONS}, line {number}")
        for number, line in enumerate(run.lines(PREDICTIONS), start=1)
    ]


def write_answers(run: RunDirectory, rows: Sequence[Prediction]) -> str:
    """Replace a run's answers; the old digest goes first, so that no kill leaves a wrong one.

    Returns:
        Their digest, for the ``evaluation`` that the caller writes next.
    """
    summary = run.summary().as_json()
    if (summary.get("evaluation") or {}).pop(ANSWERS_SHA256, None):
        run.write_json(SUMMARY, summary)
    content = utf8("".join(json_line(row.as_json()) for row in rows))
    write_bytes(run.path / PREDICTIONS, content)
    return hashlib.sha256(content).hexdigest()
