"""Baselines under each protocol: what they may see, what they may list, and that it helps."""

from dataclasses import replace

import numpy as np
import pytest

from common.data.protocols import known_items
from common.data.samples import Admission, Visit
from common.evaluation.baselines import BASELINES, popularity
from common.evaluation.lists import Answer
from common.evaluation.ranking import RankedDrug, Ranking


def early(number, sign, drugs, **more):
    return Admission(
        patient=number,
        admission=number,
        sex="F",
        age=60,
        protocol="first-24h",
        labs=(f"Potassium: {sign}, abnormal",) if sign == "K" else (f"Sodium: {sign}",),
        ordered=("Heparin",),
        drugs=drugs,
        **more,
    )


TRAIN = [early(n, "K", ("Potassium Chloride", "Senna")) for n in range(20)]
TRAIN += [early(n, "Na", ("Salt", "Senna")) for n in range(20, 34)]
TRAIN += [replace(one, ordered=(), drugs=(*one.drugs, "Heparin")) for one in TRAIN]


@pytest.mark.parametrize("name", BASELINES)
def test_this_stays_diagnoses_do_not_reach_a_first_24h_baseline(name):
    leaky = [
        replace(one, diagnoses=one.drugs, diagnosis_codes=tuple(f"10:{d}" for d in one.drugs))
        for one in TRAIN
    ]
    asked = [early(90, "K", ()), early(91, "Na", ())]
    told = [replace(one, diagnosis_codes=("10:Salt",), diagnoses=("Salt",)) for one in asked]
    assert BASELINES[name](leaky, told) == BASELINES[name](TRAIN, asked)


@pytest.mark.parametrize("name", BASELINES)
def test_no_baseline_reads_the_answer(name):
    asked = [early(90, "K", ("Salt",)), early(91, "Na", ())]
    assert BASELINES[name](TRAIN, asked) == BASELINES[name](
        TRAIN, [replace(one, drugs=("Potassium Chloride",)) for one in asked]
    )


@pytest.mark.parametrize("name", ["nearest_neighbours", "logistic_regression"])
def test_results_and_orders_are_features(name):
    first, second = BASELINES[name](TRAIN, [early(90, "K", ()), early(91, "Na", ())])
    assert "Potassium Chloride" in first.listed
    assert "Potassium Chloride" not in second.listed


@pytest.mark.parametrize("name", BASELINES)
def test_what_is_ordered_already_is_in_no_list(name):
    (found,) = BASELINES[name](TRAIN, [early(90, "K", ())])
    assert "Heparin" not in found.drugs
    (open_case,) = BASELINES[name](TRAIN, [replace(early(90, "K", ()), ordered=())])
    assert "Heparin" in open_case.drugs


def test_the_popular_list_is_as_long_as_serves_best_without_what_is_ordered():
    (found,) = popularity(TRAIN, [early(90, "K", ())])
    names = ("Senna", "Heparin", "Potassium Chloride", "Salt")
    means = []
    for length in range(1, 5):
        lists = [set(names[:length]) - set(one.ordered) for one in TRAIN]
        shares = [
            len(offered & set(one.drugs)) / len(offered | set(one.drugs))
            for offered, one in zip(lists, TRAIN, strict=True)
        ]
        means.append(np.mean(shares))
    best = names[: 1 + int(np.argmax(means))]
    assert "Heparin" in best
    assert set(found.listed) == set(best) - {"Heparin"}


def test_earlier_visits_are_features_of_visits_alone():
    past = Visit(diagnosis_codes=("10:I10",), procedures=("Stent",), drugs=("Aspirin",))
    one = Admission(
        patient=1,
        admission=2,
        sex="F",
        age=60,
        diagnosis_codes=("10:J18",),
        procedures=("Dialysis",),
        earlier=(past,),
        protocol="visits",
    )
    assert set(known_items(one)) == {
        "10:J18",
        "procedure Dialysis",
        "earlier 10:I10",
        "earlier procedure Stent",
        "earlier drug aspirin",
    }
    assert list(known_items(replace(one, protocol="admission"))) == ["10:J18"]


def test_a_models_answer_is_held_to_new_orders_too():
    drugs = tuple(RankedDrug(name=n, confidence=0.9 - 0.2 * i) for i, n in enumerate("abcd"))
    answer = Answer(
        "Drugs:\n- a\n- b",
        ("a", "b"),
        order=("a", "b", "c", "d"),
        ranking=Ranking(drugs=drugs, length=2, threshold=0.6, admissions=3),
    )
    case = replace(early(1, "K", ()), ordered=("A", "d"))
    beyond = answer.beyond(case)
    assert (beyond.drugs, beyond.order) == (("b",), ("b", "c"))
    assert [drug.name for drug in beyond.ranking.listed] == ["b"]
    assert answer.beyond(replace(case, ordered=())) is answer
    by_length = replace(answer.ranking, threshold=None).beyond(case)
    assert [drug.name for drug in by_length.listed] == ["b", "c"]
