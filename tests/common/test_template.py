"""A template of the user message: what is refused, in one line that says what to write."""

from pathlib import Path

import pytest

from common.template import OWN_TEMPLATE, PLACEHOLDERS, filled, template_fault

VALUES = {name: f"<{name}>" for name in PLACEHOLDERS}


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("Age: {agee}\n{diagnoses}", "unknown placeholder {agee} (did you mean {age}?)"),
        ("{service}\n{diagnoses}", "unknown placeholder {service}: take one"),
        ("{}\n{diagnoses}", "unknown placeholder {}"),
        ("{0}\n{diagnoses}", "unknown placeholder {0}"),
        ("{age.real}\n{diagnoses}", "unknown placeholder {age.real}"),
        ("{age[0]}\n{diagnoses}", "unknown placeholder {age[0]}"),
        ("{drugs}\n{diagnoses}", "the answer's format is fixed"),
        ("{age!r}\n{diagnoses}", "{age} takes no format"),
        ("{age:>9}\n{diagnoses}", "{age} takes no format"),
        ("Age: {age}\nSex: {sex}", "{diagnoses} is missing: put it once"),
        ("{diagnoses}\n{diagnoses}", "{diagnoses} stands there 2 times"),
        ("Ill with {diagnoses}", "{diagnoses} shares its line"),
        ("{diagnoses}\n}", "a brace stands alone: write {{ and }}"),
        ("{diagnoses\n", "a brace stands alone"),
        ("prompts/mine.txt", "'prompts/mine.txt' is no template"),
        ("two\nlines", "{diagnoses} is missing"),
    ],
)
def test_what_cannot_be_filled_is_refused(template: str, said: str) -> None:
    fault = template_fault(template)
    assert said in fault
    assert fault.endswith(" (allowed: {sex}, {age}, {height}, {weight}, {bmi}, {diagnoses})")
    assert "\n" not in fault


@pytest.mark.parametrize(
    "template",
    [
        *("", OWN_TEMPLATE, "{diagnoses}", "{{}}\n{diagnoses}\n"),
        "A\r\n  {diagnoses}  \r\nB {age}{age}",
    ],
)
def test_others_are_filled(template: str) -> None:
    assert template_fault(template) == ""
    assert "<diagnoses>" in filled(template, VALUES)


def test_a_value_is_put_in_once_and_never_read_as_a_template() -> None:
    values = {**VALUES, "diagnoses": "- {sex} {0} {", "age": "9"}
    text = filled("{{age}} {age}\n{diagnoses}", values)
    assert text == "{age} 9\n- {sex} {0} {"


def test_the_manual_shows_fedrx_s_own() -> None:
    manual = Path(__file__).resolve().parents[2] / "sim" / "README.md"
    assert f"```text\n{OWN_TEMPLATE}\n```" in manual.read_text(encoding="utf-8")
