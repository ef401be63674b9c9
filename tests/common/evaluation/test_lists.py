"""Lists of two hospitals: whose names, whose threshold, and what a file of names changes."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from common.config import OWN_TEXT, AdapterConfig, Config, EvaluationConfig, TrainConfig
from common.data.partition import Hospital
from common.data.samples import Admission
from common.errors import UserError
from common.evaluation.answers import evaluate_answers
from common.evaluation.answers_file import Facts
from common.evaluation.cutoff import fit_cutoff
from common.evaluation.drug_scores import drug_scores
from common.evaluation.formulary import (
    MOST_NAMES,
    formulary_of,
    frequencies_of,
    read_formulary,
)
from common.evaluation.ranking import Ranker
from common.model.adapter.layout import adapter_spec
from common.model.backbone.load import resolve_backbone
from common.model.session import open_session
from common.text.batches import encode_prompt

NORTH = ("Aspirin", "Insulin", "Insulin Lispro", "Senna")
SOUTH = ("Heparin", "Morphine", "Insulin")


def admissions(start, drugs, count):
    return tuple(
        Admission(
            patient=start + number,
            admission=start + number,
            sex="FM"[number % 2],
            age=50 + number,
            diagnoses=("Hypertension", "Anemia")[: 1 + number % 2],
            diagnosis_codes=("10:I10", "10:D64")[: 1 + number % 2],
            drugs=drugs[: 1 + number % len(drugs)],
        )
        for number in range(count)
    )


def hospital(name, start, drugs, extra=()):
    held_out = admissions(start + 40, (*drugs, *extra), 4)
    return Hospital(
        name=name,
        train=admissions(start, drugs, 8),
        validation=admissions(start + 20, drugs, 6),
        test=held_out,
    )


HOSPITALS = (hospital("north", 0, NORTH), hospital("south", 100, SOUTH, ("Only Held Out",)))
CONFIG = Config(
    adapter=AdapterConfig(rank=4),
    train=TrainConfig(max_length=512),
    evaluation=EvaluationConfig(max_new_tokens=80, batch_size=3, bootstrap=100),
)


@pytest.fixture(scope="module")
def session():
    return open_session(
        resolve_backbone("tiny"), adapter_spec(CONFIG.adapter), device="cpu", dtype="fp32"
    )


@pytest.fixture(scope="module")
def b(session):
    generator = torch.Generator().manual_seed(4)
    return {
        key: 0.3 * torch.randn(shape, generator=generator).numpy()
        for key, shape in session.adapter.shapes.items()
    }


def evaluated(session, b, hospitals=HOSPITALS, **settings):
    config = replace(CONFIG, evaluation=replace(CONFIG.evaluation, **settings))
    return evaluate_answers(session, hospitals, config, {"fedrx": b, "untrained": None})


def own(row):
    """The formulary of the hospital that a case is of, by its patient's age and drugs."""
    return NORTH if set(row.truth) <= set(NORTH) and row.truth[0] == "Aspirin" else SOUTH


def models(found):
    return [row for row in found.predictions if row.model in ("fedrx", "untrained")]


def test_formulary_answers_hold_each_hospitals_own_names_once(session, b):
    found = evaluated(session, b, decoding="formulary")
    for model in ("fedrx", "untrained"):
        assert found.metrics[model]["output_rate"] == 1.0
    rows = models(found)
    assert {own(row) for row in rows} == {NORTH, SOUTH}
    for row in rows:
        assert row.answer
        assert len(set(row.answer)) == len(row.answer)
        assert set(row.answer) <= set(own(row))
    assert found.facts.constrained
    free = evaluated(session, b, decoding="greedy")
    assert free.metrics["fedrx"]["output_rate"] < 1


def test_scored_lists_are_cut_where_each_hospitals_validation_says(session, b):
    """Against scores, threshold and list put together by hand."""
    found = evaluated(session, b, method="score")
    told = found.facts.generation["fedrx"].cutoffs
    assert {name: one.names for name, one in told.items()} == {"north": 4, "south": 3}
    session.adapter.load(b)
    expected = {}
    for one in HOSPITALS:
        ranker = Ranker(session, formulary_of(one.train), text=OWN_TEXT, max_length_tokens=512)
        names = ranker.formulary

        def scored(split, ranker=ranker):
            prompts = [
                encode_prompt(a, session.tokenizer, text=OWN_TEXT, max_length_tokens=512)[0]
                for a in split
            ]
            return drug_scores(session, prompts, lambda _: ranker.plan)

        truths = [[name in a.drugs for name in names] for a in one.validation]
        cut = fit_cutoff(scored(one.validation), truths, [0] * len(truths))
        assert told[one.name].threshold == pytest.approx(cut.threshold)
        for admission, scores in zip(one.test, scored(one.test), strict=True):
            listed = [names[i] for i in np.argsort(-scores) if scores[i] >= cut.threshold]
            confidence = cut.confidence(np.sort(scores)[::-1])
            listed = listed or [names[int(scores.argmax())]]
            expected[admission.drugs, admission.sex, admission.age] = (listed, confidence)
    session.adapter.flat.zero_()
    for row in found.predictions:
        if row.model == "fedrx":
            listed, confidence = expected[row.truth, row.patient.sex, int(row.patient.age)]
            assert list(row.answer) == listed
            assert row.confidence == pytest.approx(confidence[: len(listed)], abs=1e-3)
        elif row.model == "popularity":
            assert "confidence" not in row.as_json()


def test_frequencies_rank_beside_the_scores_and_fix_the_length(session, b):
    """Against scores, counts and lists put together by hand, for each hospital its own."""
    found = evaluated(session, b, method="score", frequencies=True)
    told = found.facts.generation["fedrx"].cutoffs
    session.adapter.load(b)
    expected = {}
    for one in HOSPITALS:
        ranker = Ranker(session, formulary_of(one.train), text=OWN_TEXT, max_length_tokens=512)
        names, cut = ranker.formulary, told[one.name]
        counts = np.array([sum(name in a.drugs for a in one.train) for name in names])
        odds = np.log((counts + 0.5) / (len(one.train) - counts + 0.5))
        assert cut.length == round(np.mean([len(a.drugs) for a in one.train]))
        assert cut.threshold is None
        for admission in one.test:
            prompt, _ = encode_prompt(
                admission, session.tokenizer, text=OWN_TEXT, max_length_tokens=512
            )
            (scores,) = ranker.scores([prompt])
            logit = cut.slope * np.log(scores) + cut.weight * odds + cut.intercept
            order = np.argsort(-logit, kind="stable")[: cut.length]
            listed = [names[i] for i in order], (1 / (1 + np.exp(-logit[order]))).tolist()
            expected[admission.drugs, admission.sex, admission.age] = listed
    # What is written is read again as it was.
    assert Facts.model_validate(found.facts.as_json()) == found.facts
    session.adapter.flat.zero_()
    for row in (one for one in models(found) if one.model == "fedrx"):
        listed, confidence = expected[row.truth, row.patient.sex, int(row.patient.age)]
        assert list(row.answer) == listed
        assert row.confidence == pytest.approx(confidence, abs=1e-3)


def test_what_is_ordered_already_has_no_say_in_the_threshold(session):
    one = HOSPITALS[0]
    ranker = Ranker(session, formulary_of(one.train), text=OWN_TEXT, max_length_tokens=512)
    names = ranker.formulary
    # Two of three of the names, so that what is left decides.
    ordered = tuple(name for place, name in enumerate(names) if place % 3)
    told = [
        replace(a, ordered=ordered, drugs=tuple(d for d in a.drugs if d not in ordered))
        for a in one.validation
    ]
    text = {"text": OWN_TEXT, "max_length_tokens": 512}
    prompts = [encode_prompt(a, session.tokenizer, **text)[0] for a in told]
    by_hand = fit_cutoff(
        [scores[::3] for scores in ranker.scores(prompts)],
        [[name in a.drugs for name in names[::3]] for a in told],
        [0] * len(told),
    )
    found = ranker.fit(told, samples=0, seed=0)
    assert found.threshold == by_hand.threshold
    assert (found.f1, found.slope) == pytest.approx((by_hand.f1, by_hand.slope))


def test_held_out_admissions_choose_nothing(session, b):
    """Other held-out drugs change the figures, but no list and no threshold."""
    before = evaluated(session, b, method="score")
    changed = tuple(
        replace(one, test=tuple(replace(a, drugs=("Something Else",)) for a in one.test))
        for one in HOSPITALS
    )
    after = evaluated(session, b, changed, method="score")
    assert [row.answer for row in models(before)] == [row.answer for row in models(after)]
    assert [one.cutoffs for one in before.facts.generation.values()] == [
        one.cutoffs for one in after.facts.generation.values()
    ]


def test_a_file_of_names_replaces_the_training_splits(session, b, tmp_path):
    file = tmp_path / "names.txt"
    file.write_text("Warfarin\n\n  Only  Held Out \nwarfarin\nHeparin\n", encoding="utf-8-sig")
    found = read_formulary(file)
    assert found == ("Heparin", "Only Held Out", "Warfarin")
    rows = models(evaluated(session, b, decoding="formulary", formulary=str(file)))
    assert {name for row in rows for name in row.answer} <= set(found)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "holds 0 names"),
        (b"\n \n", "holds 0 names"),
        (b"Aspirin\n\xff\n", "is not UTF-8 \\(byte 8\\)"),
        ("Aspirin\n".encode("utf-16"), "is not UTF-8 \\(byte 0\\)"),
        (b"Aspirin\n" + b"x" * 301, "line 2 is no drug name"),
        (b"Aspirin\nHep\x07arin\n", "line 2 is no drug name"),
        ("".join(f"name {n}\n" for n in range(100_000)).encode(), f"100,000 names.*{MOST_NAMES:,}"),
    ],
)
def test_a_file_that_is_no_formulary_is_one_line(tmp_path, content, says):
    file = tmp_path / "names.txt"
    file.write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        read_formulary(file)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(UserError, match="evaluation.formulary=.*No such file"):
        read_formulary(tmp_path / "none.txt")


def test_without_validation_patients_a_scored_list_has_no_threshold(session, b):
    bare = tuple(replace(one, validation=()) for one in HOSPITALS)
    with pytest.raises(UserError, match="validation-fraction"):
        evaluated(session, b, bare, method="score")
    assert evaluated(session, b, bare, decoding="formulary").metrics["fedrx"]["output_rate"] == 1


def test_why_a_list_ends_is_told(session):
    ranker = Ranker(session, formulary_of(HOSPITALS[0].train), text=OWN_TEXT, max_length_tokens=512)
    truths = [[True, False, False, False], [True, True, False, False]]
    cut = fit_cutoff([np.array([0.6, 0.3, 0.09, 0.01])] * 2, truths, [0, 0])
    one = ranker.ranking(np.array([0.7, 0.25, 0.04, 0.01]), cut)
    assert [drug.name for drug in one.listed] == list(NORTH[: one.length])
    assert one.ends.startswith(f"the next drug, {NORTH[one.length]}, has ")
    assert "2 validation admissions" in one.ends
    assert ranker.ranking(np.full(4, 0.9), cut).ends.startswith("every drug of the formulary")
    assert ranker.ranking(np.full(4, 1e-9), cut).ends.startswith("no drug reaches")
    counted = frequencies_of(ranker.formulary, HOSPITALS[0].train)
    cut = fit_cutoff([np.array([0.6, 0.3, 0.09, 0.01])] * 2, truths, [0, 0], counted)
    assert ranker.ranking(np.array([0.7, 0.25, 0.04, 0.01]), cut).ends == (
        f"it is as long as training lists are on average, {counted.length} drugs"
    )
