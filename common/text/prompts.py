r"""Chat text of one admission, and the strict answer format: writer and parser are inverses.

The task as the text puts it: a patient's physical data and diagnoses in, the drug list out.
Be honest about it: MIMIC-IV's diagnoses are coded at *discharge*, and the drug list is the whole
stay's orders, so a model learns to reconstruct what was ordered, not to decide at the bedside.

Lists are one item a line, because a third of the diagnosis titles hold a comma. An answer is::

    Drugs:
    - Furosemide
    - Insulin

Every string of at least one character is a legal item: what would break a line or vanish at its
edge is escaped (``\u{a}`` for a line feed, ``\\`` for a backslash), and nothing else is.
"""

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from common.config import OWN_TEXT, TextConfig
from common.data.protocols import ADMISSION, FIRST_24H, system_prompt
from common.template import PATIENT_LINES, filled

if TYPE_CHECKING:
    from common.data.samples import Admission

ANSWER_HEADER = "Drugs:"
ITEM_PREFIX = "- "
NEXT_ITEM = "\n-"
"""How every item's line begins; the blank after it belongs to the name, as tokenizers have it."""
UNKNOWN = "unknown"
OLDEST_PRINTED_AGE = 89

ANSWER_GRAMMAR = r"""
start: "Drugs:" ("\n- " NAME)+
NAME: /[!-\[\]-~¡-¬®-ɏ]+( +[!-\[\]-~¡-¬®-ɏ]+)*/
"""
"""Lark grammar (llguidance's dialect) of the answers with at least one drug and no escapes.

Names are of printable Latin characters: ranges, because what counts as printable beyond them
differs between Unicode's versions. Every complete sentence of it parses; a generation cut by a
token limit is not complete.
"""

_ESCAPE = re.compile(r"\\(?:\\|u\{([0-9a-f]{1,6})\})")


def messages(admission: "Admission", text: TextConfig = OWN_TEXT) -> list[dict[str, str]]:
    """Return the system and user messages of one admission, for a chat template.

    Nothing that identifies the patient, the stay or the hospital is read. Ages above 89 are
    printed "> 89", as MIMIC-IV's de-identification asks; absent measures say "unknown".

    Args:
        admission: One sample. Height in cm and weight in kg are printed whole, BMI (kg/m2) with
            one decimal; diagnoses are titles in coded order, one a line.
        text: The run's system message and template of the user's.
    """
    values = {
        "sex": _escape(admission.sex),
        "age": age_text(admission.age),
        "height": _measure(admission.height_cm, ".0f", " cm"),
        "weight": _measure(admission.weight_kg, ".0f", " kg"),
        "bmi": _measure(admission.bmi, ".1f", ""),
        "diagnoses": "\n".join(_item_lines(admission.diagnoses)),
    }
    user = (
        filled(text.template, values)
        if admission.protocol == ADMISSION
        else "\n".join([filled(PATIENT_LINES, values), *_protocol_lines(admission)])
    )
    return [
        {"role": "system", "content": system_prompt(text, admission.protocol)},
        {"role": "user", "content": user},
    ]


def _protocol_lines(admission: "Admission") -> list[str]:
    """Return what another protocol than ``admission`` shows beyond the patient.

    Sections without items are left out, so that an absent table and a stay without any are alike.
    """
    lines = []
    for place, visit in enumerate(admission.earlier):
        back = len(admission.earlier) - place
        lines.append("Last visit:" if back == 1 else f"{back} visits ago:")
        lines += _section("Diagnoses", visit.diagnoses)
        lines += _section("Procedures", visit.procedures)
        lines += _section("Drugs", visit.drugs)
    lines.append("This visit:")
    if admission.protocol == FIRST_24H:
        lines.append(f"Admission type: {_escape(admission.admission_type)}")
        lines += _section("Services", admission.services)
        lines += _section("Laboratory results of the first 24 hours", admission.labs)
        lines += _section("Drugs ordered in the first 24 hours", admission.ordered)
    else:
        lines += _section("Diagnoses", admission.diagnoses)
        lines += _section("Procedures", admission.procedures)
    return lines


def _section(name: str, items: Sequence[str]) -> list[str]:
    return [f"{name}:", *_item_lines(items)] if items else []


def age_text(age_years: int) -> str:
    """Return the age as it may be shown.

    >>> age_text(89), age_text(90)
    ('89', '> 89')
    """
    return str(age_years) if age_years <= OLDEST_PRINTED_AGE else f"> {OLDEST_PRINTED_AGE}"


def render_answer(drugs: Sequence[str]) -> str:
    r"""Write a drug list in the answer's format; ``parse_answer`` gives the same list back.

    Raises:
        ValueError: If a name is empty.

    >>> print(render_answer(["Insulin", "- odd\nname"]))
    Drugs:
    - Insulin
    - - odd\u{a}name
    """
    if not all(drugs):
        raise ValueError("a drug name is empty")
    return "\n".join([ANSWER_HEADER, *_item_lines(drugs)])


def parse_answer(text: str) -> list[str] | None:
    r"""Read an answer; None when the text is not in the format.

    Exact: blanks around the whole text are forgiven (names' own edge blanks are escaped, so none
    can be lost), and otherwise ``text`` must be what ``render_answer`` writes. Duplicates stay.

    >>> parse_answer("Drugs:\n- Insulin\n- Aspirin\n")
    ['Insulin', 'Aspirin']
    >>> parse_answer("Drugs:")
    []
    >>> parse_answer("Drugs: Insulin, Aspirin") is None
    True
    """
    header, *lines = text.strip().split("\n")
    if header != ANSWER_HEADER:
        return None
    drugs = []
    for line in lines:
        item = line.removeprefix(ITEM_PREFIX)
        name = _unescape(item)
        # Escaping again must give the same text: this refuses a missing prefix's look-alikes,
        # stray backslashes and raw edge blanks in one rule.
        if item == line or not name or _escape(name) != item:
            return None
        drugs.append(name)
    return drugs


def _item_lines(items: Iterable[str]) -> list[str]:
    return [ITEM_PREFIX + _escape(item) for item in items]


def _measure(value: float | None, form: str, unit: str) -> str:
    return UNKNOWN if value is None else f"{value:{form}}{unit}"


def _escape(item: str) -> str:
    if item.isprintable() and "\\" not in item and item == item.strip(" "):
        return item
    last = len(item) - 1
    return "".join(
        "\\\\"
        if character == "\\"
        else f"\\u{{{ord(character):x}}}"
        if not character.isprintable() or (character == " " and place in (0, last))
        else character
        for place, character in enumerate(item)
    )


def _unescape(item: str) -> str:
    def character(match: re.Match[str]) -> str:
        if match[1] is None:
            return "\\"
        point = int(match[1], 16)
        return chr(point) if point <= 0x10FFFF else match[0]

    return _ESCAPE.sub(character, item)
