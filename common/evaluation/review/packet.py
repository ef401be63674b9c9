"""The clinicians' packet: blinded lists of some cases, and the key that stays with the run.

A packet shows each case's patient, diagnoses and one list per model, named A, B, C in an order that
a seed draws anew for every case; drugs stand in alphabetical order, so that neither place nor order
tells the models apart. It is named by sha256 of what it shows. Which list is whose is written to
the key alone.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from common.errors import UserError
from common.evaluation.answers_file import Patient, Prediction
from common.evaluation.judge.rubric import distinct_drugs
from common.files import utf8
from common.records import Record
from common.seeds import stream

FORMAT: Final = "fedrx-review-1"
ORDERED = "ordered"
"""Name of the true list, where it is shown among the others as a control."""
_LABELS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class ShownList(Record):
    """One list under its letter; the drugs in alphabetical order."""

    id: str
    drugs: tuple[str, ...]


class ShownCase(Record):
    """One case under its number."""

    id: str
    patient: Patient
    diagnoses: tuple[str, ...]
    lists: tuple[ShownList, ...]


class Shown(Record):
    """Everything that is in the page, and packet.json."""

    format: Literal["fedrx-review-1"] = FORMAT
    source: str
    cases: tuple[ShownCase, ...]

    @property
    def sha256(self) -> str:
        """The packet's name: sha256 of what it shows, in canonical JSON."""
        text = json.dumps(self.as_json(), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(utf8(text)).hexdigest()


class KeyCase(Record):
    """Whose the lists of one case are."""

    id: str
    case: str
    lists: dict[str, str]
    """Model by letter."""


class Key(Record):
    """What only the run knows: key.json."""

    format: Literal["fedrx-review-1"] = FORMAT
    sha256: str
    seed: int
    models: tuple[str, ...]
    cases: tuple[KeyCase, ...]


@dataclass(frozen=True, kw_only=True)
class Packet:
    """What reviewers get, and what only the run knows."""

    shown: Shown
    key: Key

    @property
    def sha256(self) -> str:
        """The packet's name."""
        return self.key.sha256


def packet_folder(sha256: str) -> str:
    """Return a packet's folder below the run directory."""
    return f"review/{sha256[:12]}"


def make_packet(
    lines: Sequence[Prediction],
    *,
    source: str,
    models: Sequence[str] = (),
    cases: int = 0,
    seed: int = 0,
    include_ordered: bool = False,
) -> Packet:
    """Build a packet from the lines of predictions.jsonl.

    Args:
        lines: Predictions of all models.
        source: The run's source tag, shown on the page.
        models: Whose lists are shown; empty for all.
        cases: How many cases, a seeded choice; 0 for all.
        seed: Of the choice and of every case's order of lists.
        include_ordered: Show the true list, blinded as the others, as a control.

    Raises:
        UserError: Without predictions, for an unknown model, or too few cases.
    """
    present = list(dict.fromkeys(line.model for line in lines))
    chosen = list(dict.fromkeys(models)) or present
    unknown = [name for name in chosen if name not in present]
    if unknown or not lines or len(chosen) + include_ordered > len(_LABELS):
        raise UserError(
            f"predictions by {', '.join(unknown) or 'these models'} cannot be shown",
            allowed=", ".join(present),
            fix="run `fedrx evaluate` first, or name models of this run",
        )
    by_case: dict[str, list[Prediction]] = {}
    for line in lines:
        if line.model in chosen:
            by_case.setdefault(line.case, []).append(line)
    names = list(by_case)
    if cases > len(names):
        raise UserError(
            f"--cases {cases}",
            allowed=f"1 to {len(names)}; 0 for all",
            fix="name fewer, or evaluate the run with more evaluation.samples",
        )
    if cases:
        places = stream(seed, "review-cases").choice(len(names), size=cases, replace=False)
        names = [names[place] for place in sorted(places.tolist())]
    pairs = [
        _case(str(number), by_case[name], seed=seed, include_ordered=include_ordered)
        for number, name in enumerate(names, 1)
    ]
    shown = Shown(source=source, cases=tuple(shown for shown, _ in pairs))
    key = Key(
        sha256=shown.sha256,
        seed=seed,
        models=(*chosen, *([ORDERED] if include_ordered else [])),
        cases=tuple(key for _, key in pairs),
    )
    return Packet(shown=shown, key=key)


def _case(
    number: str, lines: Sequence[Prediction], *, seed: int, include_ordered: bool
) -> tuple[ShownCase, KeyCase]:
    one = lines[0]
    answers = {line.model: line.answer for line in lines if line.answer is not None}
    if include_ordered:
        answers[ORDERED] = one.truth
    models = sorted(answers)
    stream(seed, "review-lists", one.case).shuffle(models)
    lists = dict(zip(_LABELS, models, strict=False))
    shown = ShownCase(
        id=number,
        patient=one.patient,
        diagnoses=one.diagnoses,
        lists=tuple(
            ShownList(
                id=label, drugs=tuple(sorted(distinct_drugs(answers[model]), key=str.casefold))
            )
            for label, model in lists.items()
        ),
    )
    return shown, KeyCase(id=number, case=one.case, lists=lists)
