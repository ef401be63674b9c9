"""The user message as a template: its placeholders, and what is refused.

An admission's values are put in once, escaped beforehand: no value can add a placeholder, a line or
a diagnosis. The answer's format is no part of it, so that its parser stays the writer's inverse.
"""

import difflib
import string
from collections.abc import Mapping

DIAGNOSES = "diagnoses"
PLACEHOLDERS = ("sex", "age", "height", "weight", "bmi", DIAGNOSES)
PATIENT_LINES = """\
Sex: {sex}
Age: {age}
Height: {height}
Weight: {weight}
BMI: {bmi}"""
"""How every message of FedRx's own begins."""
OWN_TEMPLATE = PATIENT_LINES + "\nDiagnoses:\n{diagnoses}"
"""FedRx's own user message."""
_NAMED = ", ".join(f"{{{name}}}" for name in PLACEHOLDERS)


def is_template(value: str) -> bool:
    r"""Tell a template's text from the name of a file that holds it.

    >>> is_template("Ill with:\n{diagnoses}"), is_template("prompts/mine.txt")
    (True, False)
    """
    return "{" in value or "}" in value or "\n" in value


def template_fault(template: str) -> str:
    r"""Return what is wrong with a template, what is allowed and the fix; nothing for a good one.

    >>> template_fault("Age: {agee}\n{diagnoses}").partition(":")[0]
    'unknown placeholder {agee} (did you mean {age}?)'
    >>> template_fault("") or template_fault(OWN_TEMPLATE)
    ''
    """
    fault = _fault(template) if template else ""
    return f"{fault} (allowed: {_NAMED})" if fault else ""


def _fault(template: str) -> str:
    if not is_template(template):
        return f"{template!r} is no template: it has no placeholder: give its text, not a file"
    try:
        fields = [field for field in string.Formatter().parse(template) if field[1] is not None]
    except ValueError:
        return "a brace stands alone: write {{ and }} for braces that are no placeholder"
    for _, name, form, conversion in fields:
        if name not in PLACEHOLDERS:
            return _unknown(str(name))
        if form or conversion:
            return f"{{{name}}} takes no format: write {{{name}}} alone"
    count = [name for _, name, *_ in fields].count(DIAGNOSES)
    if count != 1:
        said = "is missing" if count == 0 else f"stands there {count} times"
        return "{diagnoses} " + said + ": put it once, on a line of its own"
    if f"{{{DIAGNOSES}}}" not in (line.strip() for line in template.splitlines()):
        return "{diagnoses} shares its line: put it on one of its own, it becomes a list"
    return ""


def _unknown(name: str) -> str:
    if name == "drugs":
        return (
            "{drugs}: the answer's format is fixed, for what is written must be read back: "
            "leave it out"
        )
    near = difflib.get_close_matches(name, PLACEHOLDERS, n=1)
    hint = f" (did you mean {{{near[0]}}}?)" if near else ""
    return f"unknown placeholder {{{name}}}{hint}: take one that is allowed, or write {{{{"


def filled(template: str, values: Mapping[str, str]) -> str:
    r"""Put values into a template (empty: FedRx's own); blanks around the whole are dropped.

    >>> filled("Ill with:\n{diagnoses}\n\n", {"diagnoses": "- {age}"})
    'Ill with:\n- {age}'
    """
    return (template or OWN_TEMPLATE).format_map(values).strip()
