"""The clinicians' packet: blinded lists of some cases, and the key that stays with the run.

A packet shows each case's patient, diagnoses and one list per model, named A, B, C in an order that
a seed draws anew for every case; drugs stand in alphabetical order, so that neither place nor order
tells the models apart. It is named by sha256 of what it shows. Which list is whose is written to
the key alone.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.errors import UserError
from common.evaluation.judge.rubric import distinct_drugs
from common.files import utf8
from common.seeds import stream

FORMAT = "fedrx-review-1"
MARKS = ("keep", "remove", "unsure")
OVERALL = (1, 2, 3, 4, 5)
ORDERED = "ordered"
"""Name of the true list, where it is shown among the others as a control."""
_LABELS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_PATIENT = ("sex", "age", "height_cm", "weight_kg", "bmi")


@dataclass(frozen=True, kw_only=True)
class Packet:
    """What reviewers get, and what only the run knows."""

    shown: Mapping[str, Any]
    """``format``, ``source`` and ``cases``: everything that is in the page."""
    key: Mapping[str, Any]
    """``sha256`` of the shown, ``cases`` (id, case, lists: label -> model), ``models``."""

    @property
    def sha256(self) -> str:
        """The packet's name."""
        return packet_sha256(self.shown)


def packet_sha256(shown: Mapping[str, Any]) -> str:
    """Return sha256 of what a packet shows, in canonical JSON."""
    text = json.dumps(shown, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(utf8(text)).hexdigest()


def make_packet(
    lines: Sequence[Mapping[str, Any]],
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
    present = list(dict.fromkeys(line["model"] for line in lines))
    chosen = list(dict.fromkeys(models)) or present
    unknown = [name for name in chosen if name not in present]
    if unknown or not lines or len(chosen) + include_ordered > len(_LABELS):
        raise UserError(
            f"predictions by {', '.join(unknown) or 'these models'} cannot be shown",
            allowed=", ".join(present),
            fix="run `fedrx evaluate` first, or name models of this run",
        )
    by_case: dict[str, dict[str, Mapping[str, Any]]] = {}
    for line in lines:
        if line["model"] in chosen:
            by_case.setdefault(line["case"], {})[line["model"]] = line
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
        _case(str(number), name, by_case[name], seed=seed, include_ordered=include_ordered)
        for number, name in enumerate(names, 1)
    ]
    shown = {"format": FORMAT, "source": source, "cases": [shown for shown, _ in pairs]}
    key = {
        "format": FORMAT,
        "sha256": packet_sha256(shown),
        "seed": seed,
        "models": [*chosen, *([ORDERED] if include_ordered else [])],
        "cases": [key for _, key in pairs],
    }
    return Packet(shown=shown, key=key)


def _case(
    number: str,
    name: str,
    by_model: Mapping[str, Mapping[str, Any]],
    *,
    seed: int,
    include_ordered: bool,
) -> tuple[dict[str, Any], dict[str, Any]]:
    any_line = next(iter(by_model.values()))
    answers = {m: line["answer"] for m, line in by_model.items() if line["answer"] is not None}
    if include_ordered:
        answers[ORDERED] = any_line["truth"]
    models = sorted(answers)
    stream(seed, "review-lists", name).shuffle(models)
    lists = [
        {"id": label, "drugs": sorted(distinct_drugs(answers[model]), key=str.casefold)}
        for label, model in zip(_LABELS, models, strict=False)
    ]
    shown = {
        "id": number,
        "patient": {field: any_line["patient"].get(field) for field in _PATIENT},
        "diagnoses": list(any_line["diagnoses"]),
        "lists": lists,
    }
    key = {"id": number, "case": name, "lists": dict(zip(_LABELS, models, strict=False))}
    return shown, key


def packet_folder(sha256: str) -> str:
    """Return the packet's folder below the run directory."""
    return f"review/{sha256[:12]}"
