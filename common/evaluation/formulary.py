"""A hospital's formulary: the drug names that an answer may hold.

It is what the hospital ordered in its own training split, or a file of names that the user gives. A
formulary never leaves its hospital: answers are decoded, and lists scored, where the data is.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.data.names import normalise_string
from common.errors import UserError
from common.evaluation.cutoff import Frequencies

if TYPE_CHECKING:
    from common.data.samples import Admission

MOST_NAMES = 20_000
"""Names of a file; the largest hospitals stock a fifth of that."""
LONGEST_NAME = 300
"""Characters of a name in a file."""
Formulary = tuple[str, ...]
"""Drug names, distinct at the string level and in the order of their string-level names."""


def formulary_of(admissions: Iterable["Admission"]) -> Formulary:
    """Return what was ordered, each drug in its most common spelling.

    Args:
        admissions: A training split; whatever is held out must not be in it.

    >>> from common.data.samples import Admission
    >>> one = Admission(patient=1, admission=1, sex="F", age=50, drugs=("Insulin", "Aspirin"))
    >>> two = Admission(patient=2, admission=2, sex="F", age=50, drugs=("insulin", "Heparin"))
    >>> formulary_of([one, one, two])
    ('Aspirin', 'Heparin', 'Insulin')

    Raises:
        UserError: If no drug was ordered.
    """
    ordered = Counter(drug for one in admissions for drug in one.drugs)
    if not (spelled := _spellings(ordered)):
        raise UserError(
            "the training split holds no drug, so there is no formulary",
            fix="use more patients, or name a file with evaluation.formulary",
        )
    return tuple(min(one, key=lambda name: (-ordered[name], name)) for one in spelled)


def frequencies_of(formulary: Formulary, admissions: Sequence["Admission"]) -> Frequencies:
    """Count a formulary's names in a hospital's training split.

    Half an admission more with and without each drug keeps the odds finite.

    >>> from common.data.samples import Admission
    >>> one = Admission(patient=1, admission=1, sex="F", age=50, drugs=("Insulin", "Aspirin"))
    >>> two = Admission(patient=2, admission=2, sex="F", age=50, drugs=("insulin", "Insulin"))
    >>> found = frequencies_of(formulary_of([one, two]), [one, two])
    >>> [round(odds, 2) for odds in found.log_odds], found.length
    ([0.0, 1.61], 2)
    """
    lists = [{normalise_string(drug) for drug in one.drugs} for one in admissions]
    counts = Counter(name for drugs in lists for name in drugs)
    ordered = np.array([counts[normalise_string(name)] for name in formulary])
    odds = (ordered + 0.5) / (len(lists) - ordered + 0.5)
    mean = sum(map(len, lists)) / max(1, len(lists))
    return Frequencies(log_odds=tuple(np.log(odds).tolist()), length=max(1, round(mean)))


def read_formulary(path: Path) -> Formulary:
    """Read a file of drug names, one a line, in UTF-8; blank lines do not count.

    Spellings that are equal at the string level are one name, shown as it stands first.

    Raises:
        UserError: If the file cannot be read, is empty, or holds what is no formulary.
    """
    what = f"evaluation.formulary={path}"
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{what} is not UTF-8 (byte {error.start})", fix="save it as UTF-8"
        ) from None
    except OSError as error:
        raise UserError(
            f"{what}: {error.strerror}", allowed="a text file, one name a line", fix="name one"
        ) from None
    names = [" ".join(line.split()) for line in lines]
    for number, name in enumerate(names, start=1):
        if len(name) > LONGEST_NAME or not name.isprintable():
            raise UserError(
                f"{what}, line {number} is no drug name",
                allowed=f"printable, up to {LONGEST_NAME} characters",
                fix="one name a line",
            )
    spelled = _spellings(names)
    if not 1 <= len(spelled) <= MOST_NAMES:
        raise UserError(
            f"{what} holds {len(spelled):,} names",
            allowed=f"1 to {MOST_NAMES:,}",
            fix="name the drugs that may be listed, one a line",
        )
    return tuple(first for first, *_ in spelled)


def formularies(trains: Sequence[Sequence["Admission"]], file: str) -> list[Formulary]:
    """Return each hospital's formulary: its own, or the user's file for all.

    Args:
        trains: Training splits.
        file: ``evaluation.formulary``; empty for the hospitals' own.
    """
    if file:
        return [read_formulary(Path(file).expanduser())] * len(trains)
    return [formulary_of(train) for train in trains]


def _spellings(names: Iterable[str]) -> list[list[str]]:
    """Return the spellings of each name as they come, by string-level name."""
    spelled: dict[str, list[str]] = {}
    for name in names:
        if folded := normalise_string(name):
            spelled.setdefault(folded, []).append(name)
    return [spelled[folded] for folded in sorted(spelled)]
