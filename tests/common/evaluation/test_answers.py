"""Answers on held-out admissions: what is asked, what is written, what stays inside."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from common.config import OWN_TEXT, AdapterConfig, Config, EvaluationConfig, TrainConfig
from common.data.partition import Hospital
from common.data.samples import Admission
from common.errors import UserError
from common.evaluation.answers import choose_cases, evaluate_answers
from common.evaluation.lists import read_answer
from common.model.adapter.layout import adapter_spec
from common.model.backbone.load import resolve_backbone
from common.model.session import open_session
from common.text.batches import encode
from common.text.prompts import parse_answer
from common.training.loop import TrainState, train

FIRST_PATIENT, FIRST_ADMISSION = 10_000_032, 22_595_853


def admission(patient: int, number: int, *, group: int, drugs: tuple[str, ...]) -> Admission:
    return Admission(
        patient=FIRST_PATIENT + patient,
        admission=FIRST_ADMISSION + number,
        sex="F" if patient % 2 else "M",
        age=60 + 40 * (patient % 2),
        weight_kg=70.0,
        diagnoses=(("Hypertension", "Anemia")[group],),
        diagnosis_codes=(("10:I10", "10:D64")[group],),
        drugs=drugs,
    )


def hospital(name: str, offset: int, drugs: tuple[str, ...]) -> Hospital:
    """Six training patients with the hospital's own drugs, three held out with two stays each."""
    train_split = tuple(
        admission(offset + i, 100 * offset + i, group=i % 2, drugs=drugs) for i in range(6)
    )
    test_split = tuple(
        admission(offset + 6 + i // 2, 100 * offset + 50 + i, group=i % 2, drugs=drugs[:2])
        for i in range(6)
    )
    return Hospital(name=name, train=train_split, validation=(), test=test_split)


HOSPITALS = (
    hospital("hospital-1", 0, ("Aspirin", "Insulin", "Senna")),
    hospital("hospital-2", 20, ("Heparin", "Morphine")),
)
CONFIG = Config(
    adapter=AdapterConfig(rank=32, alpha=32.0, targets="o_proj,down_proj"),
    train=TrainConfig(optimizer="adamw", learning_rate=0.03, max_length=512),
    evaluation=EvaluationConfig(max_new_tokens=24, batch_size=4, bootstrap=100),
)


@pytest.fixture(scope="module")
def session():
    return open_session(
        resolve_backbone("tiny"), adapter_spec(CONFIG.adapter), device="cpu", dtype="fp32"
    )


@pytest.fixture(scope="module")
def trained(session):
    """B after learning the first hospital's list by heart."""
    samples = [
        encode(one, session.tokenizer, text=OWN_TEXT, max_length_tokens=512)
        for one in HOSPITALS[0].train
    ]
    state = TrainState()
    train(session, samples, CONFIG.train, state, steps=60, schedule_steps=60, stream="x")
    b = session.adapter.state()
    session.adapter.flat.zero_()
    return b


@pytest.fixture(scope="module")
def evaluation(session, trained):
    return evaluate_answers(session, HOSPITALS, CONFIG, {"fedrx": trained, "untrained": None})


def test_every_case_is_answered_by_every_model(evaluation):
    models = ["fedrx", "untrained", "popularity", "nearest_neighbours", "logistic_regression"]
    assert list(evaluation.metrics) == models
    assert [row.model for row in evaluation.predictions] == models * 12
    assert len({row.case for row in evaluation.predictions}) == 12
    assert {row.cluster for row in evaluation.predictions} == set(range(1, 7))


def test_answers_are_the_texts_parsed(evaluation):
    for row in evaluation.predictions:
        if row.model in ("fedrx", "untrained"):
            assert row.text is not None
        else:
            assert row.text is None
            assert row.answer
    finished = [row for row in evaluation.predictions if row.model == "fedrx"]
    assert all(list(row.answer) == parse_answer(row.text) for row in finished)


def test_the_trained_adapter_speaks_and_the_untrained_does_not(evaluation):
    """The adapter learned one hospital's list: right there, wrong elsewhere."""
    by_hospital = {True: [], False: []}
    for row in evaluation.predictions:
        if row.model == "fedrx":
            by_hospital["Aspirin" in row.truth].append(row.answer)
    assert all(answer == ("Aspirin", "Insulin", "Senna") for answer in by_hospital[True])
    fedrx, untrained = evaluation.metrics["fedrx"], evaluation.metrics["untrained"]
    assert fedrx["output_rate"] == 1.0
    # A list of 3 holds the 2 true drugs at one hospital, none at the other.
    assert fedrx["recall"] == pytest.approx(0.5)
    assert fedrx["precision"] == pytest.approx(1 / 3)
    assert untrained["output_rate"] == 0.0
    assert untrained["f1"] == 0.0


def test_baselines_know_their_own_hospital_only(evaluation):
    for row in evaluation.predictions:
        if row.model == "popularity":
            home = "Aspirin" in row.truth
            assert set(row.answer) <= set(HOSPITALS[0 if home else 1].train[0].drugs)
    assert evaluation.metrics["popularity"]["recall"] == 1.0


def test_nothing_identifies_a_patient(evaluation):
    rows = json.dumps([row.as_json() for row in evaluation.predictions])
    text = rows + json.dumps(
        [
            evaluation.metrics,
            evaluation.facts.as_json(),
        ]
    )
    for one in HOSPITALS:
        for sample in one.test:
            assert str(sample.patient) not in text
            assert str(sample.admission) not in text
        # Figures are told for each hospital, a patient's row is not.
        assert one.name not in rows
    ages = {row.patient.age for row in evaluation.predictions}
    assert ages == {"60", "> 89"}


def test_the_session_keeps_its_adapter(session, trained):
    session.adapter.load(trained)
    evaluate_answers(session, HOSPITALS, replace_samples(2), {"untrained": None})
    after = session.adapter.state()
    assert all(np.array_equal(after[key], trained[key]) for key in trained)
    session.adapter.flat.zero_()


def replace_samples(samples: int) -> Config:
    return replace(CONFIG, evaluation=replace(CONFIG.evaluation, samples=samples))


def test_the_choice_is_seeded_and_blind_to_hospitals():
    merged = Hospital(
        name="hospital-1",
        train=HOSPITALS[0].train + HOSPITALS[1].train,
        validation=(),
        test=HOSPITALS[1].test + HOSPITALS[0].test,
    )

    def chosen(hospitals, seed):
        return [c.admission.admission for c in choose_cases(hospitals, samples=5, seed=seed)]

    assert chosen(HOSPITALS, 0) == chosen((merged,), 0)
    assert len(set(chosen(HOSPITALS, 0))) == 5
    assert chosen(HOSPITALS, 0) != chosen(HOSPITALS, 1)


def test_nothing_held_out_is_the_users_to_mend():
    empty = [replace(one, test=()) for one in HOSPITALS]
    with pytest.raises(UserError, match="test-fraction"):
        choose_cases(empty, samples=0, seed=0)


def test_a_cut_answer_loses_its_last_line_only():
    assert read_answer("Drugs:\n- A\n- B\n-", finished=False) == ["A", "B"]
    assert read_answer("Drugs:\n- A b", finished=False) == ["A b"]
    assert read_answer("Sure! Here", finished=False) is None


def test_a_name_that_utf8_cannot_hold_is_kept_escaped_and_counted(session, monkeypatch):
    text = "Drugs:\n- half \\u{d83d}\n- Insulin\n- cut"
    monkeypatch.setattr(session.tokenizer, "decode", lambda *args, **keys: text)
    found = evaluate_answers(session, HOSPITALS, CONFIG, {"fedrx": None})
    answers = [row.answer for row in found.predictions if row.model == "fedrx"]
    assert [answer[:2] for answer in answers] == [(r"half \ud83d", "Insulin")] * len(answers)
    assert found.facts.generation["fedrx"].escaped_names == len(answers) > 0
    json.dumps([row.as_json() for row in found.predictions], ensure_ascii=False).encode()


def test_constrained_answers_are_always_in_the_format(session):
    config = replace(CONFIG, evaluation=replace(CONFIG.evaluation, decoding="grammar"))
    generator = torch.Generator().manual_seed(4)
    b = {
        key: torch.randn(shape, generator=generator).numpy()
        for key, shape in session.adapter.shapes.items()
    }
    found = evaluate_answers(session, HOSPITALS, config, {"fedrx": b, "untrained": None})
    assert found.metrics["fedrx"]["output_rate"] == 1.0
    assert found.metrics["untrained"]["output_rate"] == 1.0
    assert found.facts.constrained is True
