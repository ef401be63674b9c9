"""Baselines under each protocol: what they may see, what they may list, and that it helps."""

from collections import Counter
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
    # The codes alone would give the answer away; nothing else tells two admissions apart.
    bare = [replace(one, labs=(), ordered=()) for one in TRAIN]
    leaky = [replace(one, diagnosis_codes=tuple(f"10:{d}" for d in one.drugs)) for one in bare]
    asked = [
        replace(early(90, "K", ()), labs=(), ordered=(), diagnosis_codes=(code,))
        for code in ("10:Salt", "10:Potassium Chloride")
    ]
    first, second = BASELINES[name](leaky, asked)
    assert first == second
    assert BASELINES[name](bare, asked) == [first, second]


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


@pytest.mark.parametrize("seed", range(12))
def test_the_popular_list_is_as_long_as_serves_best_without_what_is_ordered(seed):
    draw = np.random.default_rng(seed)
    train = []
    for number in range(15):
        taken = [name for name in "abcdefgh" if draw.random() < 0.6]
        cut = int(draw.integers(0, len(taken))) if taken else 0
        train.append(
            replace(early(number, "K", tuple(taken[cut:]) or ("z",)), ordered=tuple(taken[:cut]))
        )
    counts = Counter(drug for one in train for drug in one.drugs)
    names = sorted(counts, key=lambda name: (-counts[name], name))
    means = []
    for length in range(1, len(names) + 1):
        lists = [set(names[:length]) - set(one.ordered) for one in train]
        shares = [
            len(offered & set(one.drugs)) / len(offered | set(one.drugs))
            for offered, one in zip(lists, train, strict=True)
        ]
        means.append(np.mean(shares))
    best = names[: 1 + int(np.argmax(np.round(means, 12)))]
    for one, found in zip(train, popularity(train, train), strict=True):
        assert set(found.listed) == set(best) - set(one.ordered)


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
