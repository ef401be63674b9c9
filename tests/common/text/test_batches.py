"""Token batches: what carries loss, what is dropped, and where segments lie."""

from dataclasses import replace

import pytest

from common.config import OWN_TEXT, TextConfig
from common.data.samples import Admission
from common.errors import UserError
from common.model.backbone.tiny import END, START, tiny_tokenizer
from common.text.batches import Encoded, encode, encode_prompt, pack
from common.text.prompts import messages, parse_answer, render_answer

TOKENIZER = tiny_tokenizer()
END_ID = TOKENIZER.convert_tokens_to_ids(END)


def admission(drugs=("Aspirin", "Heparin, porcine"), diagnoses=("Sepsis", "Anemia, other")):
    return Admission(
        patient=17,
        admission=4,
        sex="F",
        age=60,
        height_cm=170.0,
        weight_kg=None,
        bmi=None,
        diagnoses=tuple(diagnoses),
        diagnosis_codes=tuple("10:A00" for _ in diagnoses),
        drugs=tuple(drugs),
        service="MED",
        admission_type="URGENT",
        insurance="Other",
        anchor_year_group="2011 - 2013",
        careunit="unknown",
    )


def test_pad_is_the_end_token_here_as_in_smollm2():
    assert TOKENIZER.pad_token_id == TOKENIZER.eos_token_id == END_ID


def test_labels_are_the_answer_and_its_end_token():
    case = admission()
    encoded = encode(case, TOKENIZER, text=OWN_TEXT, max_length_tokens=1024)
    batch = pack([encoded])
    labels = batch.labels_N.tolist()
    assert TOKENIZER.decode(labels[:-1]) == render_answer(case.drugs)
    assert labels[-1] == END_ID
    # The hidden state before each label predicts it: ids shifted by one.
    ids = batch.input_ids[0].tolist()
    assert [ids[place + 1] for place in batch.label_positions_N.tolist()] == labels
    # The prompt holds end tokens too (after each message), and none of them carries loss.
    prompt_ends = [place for place, t in enumerate(ids[: encoded.answer_start]) if t == END_ID]
    assert prompt_ends
    assert not {place - 1 for place in prompt_ends} & set(batch.label_positions_N.tolist())


def test_the_text_is_the_chat_template_of_the_messages():
    case = admission()
    encoded = encode(case, TOKENIZER, text=OWN_TEXT, max_length_tokens=1024)
    system, user = (message["content"] for message in messages(case))
    expected = (
        f"{START}system\n{system}{END}\n{START}user\n{user}{END}\n{START}assistant\n"
        f"{render_answer(case.drugs)}{END}"
    )
    assert TOKENIZER.decode(encoded.input_ids) == expected


def test_generation_starts_from_the_training_prompt():
    case = admission()
    prompt, dropped = encode_prompt(case, TOKENIZER, text=OWN_TEXT, max_length_tokens=1024)
    encoded = encode(case, TOKENIZER, text=OWN_TEXT, max_length_tokens=1024)
    assert not any(dropped)
    assert list(encoded.input_ids[: encoded.answer_start]) == prompt


@pytest.mark.parametrize("length", [256, 300, 512])
def test_whole_items_are_dropped_from_the_end_and_counted(length):
    drugs = [f"Drug number {n}, 5 mg" for n in range(60)]
    diagnoses = [f"Disorder {n}, unspecified" for n in range(60)]
    case = admission(drugs, diagnoses)
    encoded = encode(case, TOKENIZER, text=OWN_TEXT, max_length_tokens=length)
    assert len(encoded.input_ids) <= length
    kept = 60 - encoded.dropped_drugs
    assert 0 < kept < 60
    answer = TOKENIZER.decode(encoded.input_ids[encoded.answer_start : -1])
    assert parse_answer(answer) == drugs[:kept]
    prompt = TOKENIZER.decode(encoded.input_ids[: encoded.answer_start])
    shown = 60 - encoded.left_out.diagnoses
    assert (
        f"- {diagnoses[shown - 1]}\n" in prompt + "\n" or f"- {diagnoses[shown - 1]}{END}" in prompt
    )
    assert diagnoses[shown] not in prompt
    # One more item would not have fitted.
    longer = replace(case, drugs=case.drugs[: kept + 1])
    text = TOKENIZER(render_answer(longer.drugs), add_special_tokens=False)["input_ids"]
    assert encoded.answer_start + len(text) + 1 > length


def test_diagnoses_are_dropped_from_within_a_template():
    text = TextConfig(system_prompt="Say it.", template="{diagnoses}\nWhat was ordered?")
    case = admission(diagnoses=[f"Disorder {n}, unspecified" for n in range(60)])
    encoded = encode(case, TOKENIZER, text=text, max_length_tokens=300)
    prompt = TOKENIZER.decode(encoded.input_ids[: encoded.answer_start])
    shown = 60 - encoded.left_out.diagnoses
    assert 0 < shown < 60
    assert f"- {case.diagnoses[shown - 1]}\nWhat was ordered?{END}" in prompt
    assert prompt.startswith(f"{START}system\nSay it.{END}")
    assert encoded.answer_start <= 150


def test_the_prompt_does_not_depend_on_the_answer():
    diagnoses = [f"Disorder {n}, unspecified" for n in range(60)]
    prompts = set()
    for drugs in (["A"], [f"Drug number {n}" for n in range(60)]):
        encoded = encode(
            admission(drugs, diagnoses), TOKENIZER, text=OWN_TEXT, max_length_tokens=300
        )
        prompts.add(encoded.input_ids[: encoded.answer_start])
    assert len(prompts) == 1


def test_nothing_secret_reaches_the_tokens():
    plain = encode(admission(), TOKENIZER, text=OWN_TEXT, max_length_tokens=1024)
    other = replace(admission(), patient=99, admission=98, service="X", insurance="Y", careunit="Z")
    assert (
        encode(other, TOKENIZER, text=OWN_TEXT, max_length_tokens=1024).input_ids == plain.input_ids
    )


def test_a_length_that_holds_no_frame_is_refused():
    with pytest.raises(UserError, match="max-length"):
        encode(admission(), TOKENIZER, text=OWN_TEXT, max_length_tokens=40)


def test_packing_needs_samples_with_prompts():
    with pytest.raises(ValueError, match="at least one"):
        pack([])
    with pytest.raises(ValueError, match="prompt"):
        pack([Encoded(input_ids=(1, 2), answer_start=0, unit=0)])
