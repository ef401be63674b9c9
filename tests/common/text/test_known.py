"""What goes first from a prompt that is too long, and what the prompts of protocols show."""

from dataclasses import replace

import pytest

from common.config import OWN_TEXT
from common.data.samples import Admission, Visit
from common.model.backbone.tiny import tiny_tokenizer
from common.text.batches import encode
from common.text.known import items, with_items
from common.text.prompts import messages

TOKENIZER = tiny_tokenizer()
VISITS = Admission(
    patient=90001,
    admission=80001,
    sex="M",
    age=93,
    diagnoses=("Sepsis", "Anemia"),
    diagnosis_codes=("10:A41", "10:D64"),
    procedures=("Dialysis",),
    drugs=("Insulin",),
    earlier=tuple(
        Visit(
            diagnoses=(f"Disorder {n}",),
            diagnosis_codes=(f"10:{n}",),
            procedures=(f"Surgery {n}",) * (n % 2),
            drugs=(f"Drug {n}", f"Other drug {n}"),
        )
        for n in range(12)
    ),
    protocol="visits",
)
EARLY = Admission(
    patient=90001,
    admission=80001,
    sex="F",
    age=50,
    drugs=("Insulin",),
    admission_type="URGENT",
    services=("MED",),
    labs=tuple(f"Result {n}: {n}" for n in range(12)),
    ordered=tuple(f"Drug {n}" for n in range(12)),
    earlier=(Visit(diagnoses=("Old",), diagnosis_codes=("10:OLD",)),),
    protocol="first-24h",
)


def user_text(admission):
    return messages(admission)[1]["content"]


def test_the_prompt_of_visits_line_by_line():
    assert user_text(replace(VISITS, earlier=VISITS.earlier[:2])) == (
        "Sex: M\nAge: > 89\nHeight: unknown\nWeight: unknown\nBMI: unknown\n"
        "2 visits ago:\nDiagnoses:\n- Disorder 0\nDrugs:\n- Drug 0\n- Other drug 0\n"
        "Last visit:\nDiagnoses:\n- Disorder 1\nProcedures:\n- Surgery 1\n"
        "Drugs:\n- Drug 1\n- Other drug 1\n"
        "This visit:\nDiagnoses:\n- Sepsis\n- Anemia\nProcedures:\n- Dialysis"
    )


@pytest.mark.parametrize("case", [VISITS, EARLY])
def test_no_number_of_the_patient_and_no_answer_is_shown(case):
    system, user = messages(case)
    for hidden in ("90001", "80001", "Insulin"):
        assert hidden not in system["content"] + user["content"]


def test_the_task_is_told():
    assert "after the first 24 hours" in messages(EARLY)[0]["content"]
    assert messages(VISITS)[0] == messages(replace(VISITS, protocol="admission"))[0]


def test_the_usual_prompt_shows_nothing_of_other_protocols():
    bare = Admission(patient=1, admission=1, sex="M", age=93, diagnoses=("Sepsis", "Anemia"))
    assert messages(replace(VISITS, protocol="admission")) == messages(bare)


@pytest.mark.parametrize("length", [2048, 900, 640, 512, 400])
def test_the_oldest_visits_go_first_and_are_counted(length):
    encoded = encode(VISITS, TOKENIZER, text=OWN_TEXT, max_length_tokens=length)
    text = TOKENIZER.decode(encoded.input_ids[: encoded.answer_start])
    gone = encoded.left_out.visits
    for n in range(12):
        assert (f"Disorder {n}\n" in text) == (n >= gone)
    assert encoded.answer_start <= length // 2
    if gone < 12:
        assert encoded.left_out == (0, 0, 0, 0, gone)
    if gone:
        more, _ = with_items(VISITS, items(VISITS) - gone + 1)
        longer = encode(more, TOKENIZER, text=OWN_TEXT, max_length_tokens=1 << 20)
        assert longer.answer_start > length // 2
    assert (gone == 0) == (length == 2048)


@pytest.mark.parametrize("case", [VISITS, EARLY])
def test_items_go_in_one_order_and_none_is_lost_from_the_count(case):
    before = with_items(case, items(case))
    assert before == (case, (0, 0, 0, 0, 0))
    for number in range(items(case), -1, -1):
        shown, left_out = with_items(case, number)
        assert items(shown) == number
        assert sum(left_out) == items(case) - number
        # Visits go first, then procedures, results, orders, and diagnoses last.
        order = [left_out.visits, left_out.procedures, left_out.labs, left_out.ordered]
        full = [len(case.earlier), len(case.procedures), len(case.labs), len(case.ordered)]
        for place, gone in enumerate(order):
            if gone:
                assert order[:place] == full[:place]
