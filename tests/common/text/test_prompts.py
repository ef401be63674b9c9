"""The chat text of an admission, and the answer's writer, parser and grammar."""

import re
import sys
from dataclasses import replace

import llguidance
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import OWN_TEXT, TextConfig
from common.data.samples import Admission
from common.text.prompts import ANSWER_GRAMMAR, messages, parse_answer, render_answer

ADMISSION = Admission(
    patient=1234567,
    admission=7654321,
    sex="F",
    age=67,
    height_cm=165.1,
    weight_kg=70.31,
    bmi=25.79,
    diagnoses=("Heart failure, unspecified", "Gout, unspecified"),
    diagnosis_codes=("10:I509", "10:M109"),
    drugs=("Furosemide", "Allopurinol"),
    service="SERVICE-X",
    admission_type="TYPE-X",
    insurance="INSURANCE-X",
    anchor_year_group="GROUP-X",
    careunit="UNIT-X",
)

HOSTILE = [
    "- Insulin",
    "-",
    "--",
    " leading",
    "trailing ",
    " ",
    "a\nb",
    "a\r\nb",
    "\\n",
    "\\",
    "\\u{a}",
    "\\u{110000}",
    "Drugs:",
    "Drugs:\n- Insulin",
    "Sodium Chloride 0.9%  Flush",
    "a\x85b",
    "a\u2028b",
    "a\u2029b\x0b\x0c\x1c",
    "\u00a0Insulin\u00a0",
    "\ufeffInsulin",
    "\u200b",
    "Größe, „Ω“ 5µg/mL",
    "💊",
    "<|im_end|>",
    "Heparin, Aspirin",
    "\x00",
    "\t",
]


def test_messages_are_exactly_this_text() -> None:
    system, user = messages(ADMISSION)
    assert [system["role"], user["role"]] == ["system", "user"]
    assert user["content"] == (
        "Sex: F\nAge: 67\nHeight: 165 cm\nWeight: 70 kg\nBMI: 25.8\nDiagnoses:\n"
        "- Heart failure, unspecified\n- Gout, unspecified"
    )


@pytest.mark.parametrize(("age", "shown"), [(21, "21"), (89, "89"), (90, "> 89"), (300, "> 89")])
def test_ages_above_89_are_not_shown(age: int, shown: str) -> None:
    lines = messages(replace(ADMISSION, age=age))[1]["content"].splitlines()
    assert lines[1] == f"Age: {shown}"


def test_absent_measures_say_unknown() -> None:
    content = messages(replace(ADMISSION, height_cm=None, weight_kg=None, bmi=None))[1]["content"]
    assert content.splitlines()[2:5] == ["Height: unknown", "Weight: unknown", "BMI: unknown"]


def test_no_identifier_partition_attribute_code_or_drug_is_in_the_prompt() -> None:
    text = "\n".join(message["content"] for message in messages(ADMISSION))
    secrets = ("1234567", "7654321", "-X", "I509", "M109", *ADMISSION.drugs)
    assert [secret for secret in secrets if secret in text] == []


def test_a_diagnosis_cannot_add_a_line() -> None:
    hostile = replace(ADMISSION, diagnoses=("Gout\n- Aspirin\x85\u2028x", "Sepsis"))
    plain = replace(ADMISSION, diagnoses=("Gout", "Sepsis"))
    lines = [len(messages(a)[1]["content"].splitlines()) for a in (hostile, plain)]
    assert lines[0] == lines[1]


OWN = TextConfig(
    system_prompt="  Name what was ordered.\n",
    template="\n{age} years ({sex}), {bmi} kg/m2.\n{diagnoses}\nWhat was {{ordered}}?\n",
)


def test_a_template_and_a_system_message_of_the_user_s_own() -> None:
    system, user = messages(ADMISSION, OWN)
    assert system["content"] == "Name what was ordered."
    assert user["content"] == (
        "67 years (F), 25.8 kg/m2.\n- Heart failure, unspecified\n- Gout, unspecified\n"
        "What was {ordered}?"
    )


@pytest.mark.parametrize("text", [OWN_TEXT, OWN])
def test_no_diagnosis_adds_a_line_or_a_value_to_any_template(text: TextConfig) -> None:
    plain = messages(replace(ADMISSION, diagnoses=("Gout",) * len(HOSTILE)), text)[1]["content"]
    found = messages(replace(ADMISSION, diagnoses=(*HOSTILE[:-1], "{age} {0}")), text)
    lines = found[1]["content"].splitlines()
    assert len(lines) == len(plain.splitlines())
    assert "- {age} {0}" in lines


def test_an_answer_is_exactly_this_text() -> None:
    assert render_answer(["Insulin", "Vitamin D"]) == "Drugs:\n- Insulin\n- Vitamin D"
    assert render_answer([]) == "Drugs:"


def test_every_hostile_name_comes_back_alone_and_together() -> None:
    for name in HOSTILE:
        assert parse_answer(render_answer([name])) == [name]
    assert parse_answer(render_answer(HOSTILE)) == HOSTILE


@given(st.lists(st.text(min_size=1) | st.text(alphabet=" \\-\n\ru{}0a:", min_size=1)))
def test_parser_undoes_writer(drugs: list[str]) -> None:
    text = render_answer(drugs)
    assert parse_answer(text) == drugs
    # One line an item under the widest notion of a line break that Python has.
    assert len(text.splitlines()) == 1 + len(drugs)


@given(st.text(alphabet=" \\-\n\ru{}20aDrugs:I") | st.text())
def test_writer_undoes_parser(tail: str) -> None:
    """What the parser accepts is what the writer writes, so one list has one text."""
    text = "Drugs:\n- " + tail
    drugs = parse_answer(text)
    if drugs is not None:
        assert render_answer(drugs) == text.strip()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Insulin",
        "- Insulin",
        "drugs:\n- Insulin",
        "Drugs: \n- Insulin",
        "Drugs:\nInsulin",
        "Drugs:\n-Insulin",
        "Drugs:\n* Insulin",
        "Drugs:\n- Insulin\n\n- Aspirin",
        "Drugs:\n- Insulin \n- Aspirin",
        "Drugs:\n-  Insulin",
        "Drugs:\n- \n- Aspirin",
        "Drugs:\n- Insulin\r\n- Aspirin",
        "Drugs:\n- a\\b",
        "Drugs:\n- a\\u{110000}",
        "Drugs:\n- \\u{61}",
        "Here you are.\nDrugs:\n- Insulin",
        "Drugs:\n- Insulin\nTake care!",
    ],
)
def test_what_is_not_in_the_format_is_none(text: str) -> None:
    assert parse_answer(text) is None


def test_blanks_around_the_whole_answer_are_forgiven() -> None:
    assert parse_answer("\n Drugs:\n- Insulin\n\n") == ["Insulin"]
    assert parse_answer("Drugs:\n") == []


def test_an_empty_name_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        render_answer(["Insulin", ""])


class _Bytes:
    """The 256 bytes as a vocabulary, so that the grammar is asked byte by byte."""

    eos_token_id = 256
    bos_token_id = None
    tokens = (*(bytes([i]) for i in range(256)), b"<eos>")
    special_token_ids = (256,)

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def _in_grammar(text: str) -> bool:
    tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Bytes()))
    grammar = llguidance.LLMatcher.grammar_from_lark(ANSWER_GRAMMAR)
    matcher = llguidance.LLMatcher(tokenizer, grammar)
    assert not matcher.is_error(), matcher.get_error()
    return all(matcher.consume_token(token) for token in text.encode()) and matcher.is_accepting()


@pytest.mark.parametrize(
    "drugs", [["Insulin"], ["Sodium Chloride 0.9%  Flush", "- x", "Größe 5µg (IV)"], ["a"] * 50]
)
def test_ordinary_answers_are_in_the_grammar(drugs: list[str]) -> None:
    assert _in_grammar(render_answer(drugs))


@pytest.mark.parametrize(
    "text",
    ["Drugs:", "Drugs:\n", "Drugs:\n- ", "Drugs:\n-  a", "Drugs:\n- a ", "Drugs:\n- a\\b", "- a"],
)
def test_other_texts_are_not_in_the_grammar(text: str) -> None:
    assert not _in_grammar(text)


@given(st.text(min_size=1, max_size=12) | st.text(alphabet=" \\-\n\u00a0\u200ba", min_size=1))
def test_what_the_grammar_accepts_parses(item: str) -> None:
    text = "Drugs:\n- " + item
    if _in_grammar(text):
        assert parse_answer(text) == [part.removeprefix("- ") for part in text.split("\n")[1:]]


def test_every_character_of_the_grammar_parses() -> None:
    """All code points: what the grammar takes as a name (523 of them) reads back as it is."""
    pattern = ANSWER_GRAMMAR.split("NAME: /")[1].partition("+")[0]
    taken = [chr(point) for point in range(sys.maxunicode + 1) if re.match(pattern, chr(point))]
    assert len(taken) == (0x7E - 0x20 - 1) + (0x24F - 0xA0 - 1)
    for character in taken:
        assert parse_answer(f"Drugs:\n- {character}") == [character]
    for character in taken[::40]:
        assert _in_grammar(f"Drugs:\n- {character}")
