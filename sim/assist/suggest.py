"""``fedrx suggest``: one patient's list from a run's adapter, and what hospitals ordered before."""

import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from client.personal import b_of
from common.config import Config
from common.configio import changed_freely
from common.data.dataset import Dataset, open_hospitals
from common.data.icd import (
    Diagnosis,
    DiagnosisIndex,
    code_frequency,
    public_diagnoses,
)
from common.data.protocols import ADMISSION, require_protocol
from common.data.sources import titles_of
from common.errors import UserError
from common.evaluation.high_priority import warned_of
from common.evaluation.interactions import Interaction, interacting
from common.evaluation.judge.gate import source_of_run
from common.evaluation.support import Support, SupportIndex
from common.rundir import RunDirectory
from common.text.prompts import age_text
from common.training.worker import Worker
from sim.assist.listing import ListedDrugs, Lister
from sim.assist.orders import Orders
from sim.assist.patient_form import PatientRequest
from sim.process.open_run import COMPUTING, open_run, require_same
from sim.report.html import Block
from sim.report.words import NOTICE, OWN_NOTE, RANDOM_WEIGHTS

_CODE = re.compile(r"[A-Za-z]?\d[\w.]{1,7}")
_FREE_KEYS = (
    *(
        "evaluation.max-new-tokens",
        "evaluation.method",
        "evaluation.decoding",
        "evaluation.formulary",
        "evaluation.interactions",
        "evaluation.threshold-samples",
        "evaluation.frequencies",
    ),
    *COMPUTING,
)


@dataclass(frozen=True, kw_only=True)
class SuggestedDrug:
    """One line of a suggested list."""

    name: str
    support: Support | None
    """None where no training data is at hand, or no admission is similar."""
    confidence: float | None = None
    """Probability that it is ordered; None where the run's data is not at hand."""
    remarks: tuple[str, ...] = ()
    """What the data's orders say against it for this patient."""


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """What the model answered."""

    drugs: tuple[SuggestedDrug, ...]
    in_format: bool
    """False when the answer was no drug list; then there are no drugs."""
    similar: int
    """Training admissions that count as similar."""
    dropped_diagnoses: int
    """Left out of the prompt, from the end, because it would have been too long."""
    seconds: float
    ends: str = ""
    """Why the list ends where it does."""
    warnings: tuple[str, ...] = ()
    """What a person must know before reading the list."""
    uncovered: str = ""
    """That of them which says that no epsilon covers the list; empty of the common B's."""

    def as_dict(self) -> dict[str, object]:
        """Return plain JSON."""
        return {
            "drugs": [
                {
                    "name": drug.name,
                    "confidence": drug.confidence,
                    "ordered": drug.support.ordered if drug.support else None,
                    "similar": drug.support.similar if drug.support else None,
                    "remarks": drug.remarks,
                }
                for drug in self.drugs
            ],
            "warnings": self.warnings,
            "in_format": self.in_format,
            "ends": self.ends,
            "similar": self.similar,
            "dropped_diagnoses": self.dropped_diagnoses,
            "seconds": round(self.seconds, 3),
        }


@dataclass(frozen=True, kw_only=True)
class ReferenceData:
    """What is known around a run without its model: titles to search, admissions to compare."""

    index: DiagnosisIndex
    support: SupportIndex | None
    note: str
    """Where titles and support come from, or why there is none."""
    data: Dataset | None = None
    orders: Orders | None = None


class Assistant:
    """A run's adapter on its backbone, ready to answer.

    Args:
        run: Whose adapter.
        config: Of the run, see ``assistant_config``.
        reference: See ``reference_of``.
        checkpoint: Name; default the last.
        personal: Hospital whose own B is added; empty: the common B answers.

    Raises:
        UserError: If the backbone or A is not the run's, there is no such checkpoint, or the
            hospital has no own B beside it.
    """

    def __init__(
        self,
        run: RunDirectory,
        config: Config,
        *,
        reference: ReferenceData,
        checkpoint: str | None = None,
        personal: str = "",
    ) -> None:
        loaded = run.load_checkpoint(checkpoint)
        b = b_of(run, loaded, personal)
        self.checkpoint, self.personal = loaded.name, personal
        self.reference = reference
        self.interactions = warned_of(config.evaluation.interactions)
        self._session = Worker().session(config)
        inputs = run.inputs()
        fingerprint = self._session.spec.fingerprint
        require_same("the backbone", fingerprint, inputs.backbone, "model.backbone")
        require_same("A", self._session.adapter.a_fingerprint, inputs.a, "adapter.seed")
        self._session.adapter.load(b)
        self._lister = Lister(self._session, config, reference.data)
        self._one_at_a_time = threading.Lock()

    @property
    def busy(self) -> bool:
        """Whether somebody is being answered."""
        return self._one_at_a_time.locked()

    @property
    def uncovered(self) -> str:
        """What is said of every list that a hospital's own B makes; else empty."""
        return OWN_NOTE.format(hospital=self.personal) if self.personal else ""

    def suggest(self, request: PatientRequest) -> Suggestion:
        """Answer for one patient; deterministic."""
        started = time.perf_counter()
        with self._one_at_a_time:
            listed = self._lister.list_drugs(request.admission())
        names = listed.names or ()
        index, orders = self.reference.support, self.reference.orders
        supports: Sequence[Support | None] = (
            index.support(request.codes, names) if index else [None] * len(names)
        )
        return Suggestion(
            drugs=tuple(
                SuggestedDrug(
                    name=name,
                    support=support,
                    confidence=confidence,
                    remarks=orders.remarks(name, sex=request.sex, age=request.age)
                    if orders
                    else (),
                )
                for name, support, confidence in zip(
                    names, supports, listed.confidences, strict=True
                )
            ),
            in_format=listed.names is not None,
            ends=listed.ends,
            warnings=tuple(filter(None, (self.uncovered, *self._warnings(request, listed)))),
            uncovered=self.uncovered,
            similar=len(index.similar(request.codes)) if index else 0,
            dropped_diagnoses=listed.dropped_diagnoses,
            seconds=time.perf_counter() - started,
        )

    def _warnings(self, request: PatientRequest, listed: ListedDrugs) -> Iterator[str]:
        if self._session.spec.name == "tiny":
            yield RANDOM_WEIGHTS
        free = [diagnosis.title for diagnosis in request.diagnoses if not diagnosis.code]
        origin = self.reference.index.origin
        for code in filter(_CODE.fullmatch, free):
            yield f"{code} looks like a code, but is not in {origin}: it was read as free text."
        if words := [text for text in free if not _CODE.fullmatch(text)]:
            yield f"Not recognised in {origin}, and read as free text: {'; '.join(words)}."
        if listed.names is None:
            yield "The model's answer was not a drug list."
        elif self.reference.orders is None:
            yield "No orders are at hand: a name may be one that no hospital ever ordered."
        yield from interaction_lines(interacting(listed.names or (), self.interactions))
        if listed.dropped_diagnoses:
            yield f"The last {listed.dropped_diagnoses} diagnoses did not fit and were not read."


def interaction_lines(found: Iterable[Interaction]) -> Iterator[str]:
    """Say which names of a list interact: a line for each reason, high priority first.

    >>> list(interaction_lines([Interaction("A", "B", ""), Interaction("A", "C", "one class")]))
    ['High-priority interaction (one class): A with C.', 'Interaction by the named file: A with B.']
    """
    by_reason: dict[str, list[str]] = {}
    for one in found:
        by_reason.setdefault(one.high_priority, []).append(f"{one.first} with {one.second}")
    for reason in sorted(by_reason, key=lambda reason: not reason):
        what = (
            f"High-priority interaction ({reason})" if reason else "Interaction by the named file"
        )
        yield f"{what}: {'; '.join(by_reason[reason])}."


def reference_of(
    config: Config, *, personal: str = "", load: Callable[[Config], Dataset] = open_hospitals
) -> ReferenceData:
    """Look for the run's data; without it, the public titles serve and there is no support.

    Args:
        config: Of the run.
        personal: Hospital whose own B answers: its admissions alone are compared, its formulary
            and its threshold alone count. Empty: those of all.
        load: Opens its data.
    """
    try:
        data = _narrowed(load(config), personal)
    except UserError as error:
        index = DiagnosisIndex(public_diagnoses(), frequency={}, origin="the public ICD-10-CM")
        place = Path(config.data.path).expanduser()
        why = f"cannot be used ({error})" if place.exists() else "are not on this machine"
        note = f"The run's tables {why}: no support from similar admissions."
        return ReferenceData(index=index, support=None, note=note)
    train = data.train
    known = [
        Diagnosis(title=title, code=code)
        for one in data.samples.admissions
        for title, code in zip(one.diagnoses, one.diagnosis_codes, strict=True)
    ]
    known += titles_of(config.data)
    index = DiagnosisIndex(
        known, frequency=code_frequency(train), origin=f"the titles of the {data.source} tables"
    )
    places = f"{len(data.hospitals)} training hospital{'s' * (len(data.hospitals) > 1)}"
    note = (
        f"Support: among the most similar of {len(train):,} admissions of {places} "
        f"({data.source} data), by coded diagnoses."
    )
    return ReferenceData(
        index=index, support=SupportIndex(train), note=note, data=data, orders=Orders(train)
    )


def _narrowed(data: Dataset, hospital: str) -> Dataset:
    """Return the data of one hospital; all of it where it is not dealt to that one."""
    own = tuple(one for one in data.hospitals if one.name == hospital)
    return replace(data, hospitals=own or data.hospitals)


def assistant_config(run: RunDirectory, overrides: Iterable[str] = ()) -> Config:
    """Return the run's configuration with overrides of how to compute.

    Raises:
        UserError: If an override would change what was trained, or the run asks for more of a
            patient than a form holds.
    """
    config = run.config()
    require_protocol(
        config, (ADMISSION,), "one patient's form holds no earlier visits, results or orders"
    )
    changed = changed_freely(config, overrides, _FREE_KEYS)
    # One answer at a time needs no more than one slot.
    return replace(changed, evaluation=replace(changed.evaluation, batch_size=1))


def within_formulary(config: Config, reference: ReferenceData, asked: Iterable[str]) -> Config:
    """Return the configuration, lists held to the formulary unless the user or the run decided.

    Args:
        config: See ``assistant_config``.
        reference: Whether orders are at hand.
        asked: The user's overrides.
    """
    settings = config.evaluation
    decided = any(one.startswith(("evaluation.method", "evaluation.decoding")) for one in asked)
    at_hand = reference.orders is not None or settings.formulary
    if decided or settings.method != "generate" or settings.decoding != "greedy" or not at_hand:
        return config
    return replace(config, evaluation=replace(settings, decoding="formulary"))


def find_run(path: Path | None) -> RunDirectory:
    """Open the named run, or the newest finished one below ``runs``.

    Raises:
        UserError: If there is none.
    """
    if path is not None:
        return open_run(path)
    for file in sorted(Path("runs").absolute().glob("*/run.json"), reverse=True):
        run = RunDirectory(file.parent)
        record = run.record()
        if record and record.has_model and run.is_finished:
            return run
    raise UserError(
        "there is no finished run below ./runs",
        fix="name a run directory, or make one with `fedrx demo`",
    )


def about_run(
    run: RunDirectory, config: Config, checkpoint: str, *, personal: str = ""
) -> dict[str, str]:
    """Return what a page and a decision record say about the model."""
    source = source_of_run(run)
    return {
        "run": run.path.name,
        "checkpoint": checkpoint,
        "backbone": config.model.backbone,
        "source": source,
        **({"personal": personal} if personal else {}),
    }


def suggestion_blocks(
    run: RunDirectory,
    request: PatientRequest,
    suggestion: Suggestion,
    reference: ReferenceData,
) -> list[Block]:
    """Return one list as the terminal shows it."""
    measures = [f"{request.height_cm:g} cm"] if request.height_cm else []
    measures += [f"{request.weight_kg:g} kg"] if request.weight_kg else []
    measures += [f"BMI {request.bmi:.1f}"] if request.bmi else []
    person = {"F": "woman", "M": "man"}[request.sex]
    blocks = [
        Block(note=NOTICE, warning=True),
        Block(note=", ".join([f"{person}, {age_text(request.age)} years", *measures])),
        *(Block(note=f"  {d.label or 'free text'}: {d.title}") for d in request.diagnoses),
        *(Block(note=warning, warning=True) for warning in suggestion.warnings),
    ]
    if suggestion.in_format:
        rows = tuple(
            (
                "\n  ! ".join([drug.name, *drug.remarks]),
                "-" if drug.confidence is None else f"{drug.confidence:.0%}",
                f"{drug.support.ordered} of {drug.support.similar}" if drug.support else "-",
            )
            for drug in suggestion.drugs
        )
        headers = ("drug", "confidence", "similar stays with it")
        title = f"{len(rows)} suggested drug{'s' * (len(rows) != 1)}"
        note = f"Why it ends there: {suggestion.ends}."
        blocks.append(Block(title=title, headers=headers, rows=rows, note=note))
    return [*blocks, Block(note=f"{reference.note} Run: {run.path.name}.")]
