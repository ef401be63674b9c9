"""The metrics against hand counts, and their intervals against a plain loop."""

import json
import random
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.evaluation.metrics import METRICS, Metrics, score


class Prediction(NamedTuple):
    """What is scored of a line of predictions.jsonl."""

    case: str
    cluster: int
    truth: tuple[str, ...]
    answer: tuple[str, ...] | None


MEANS = ("precision", "recall", "jaccard", "f1")


def predictions(*pairs: tuple[list[str], list[str] | None], patients: list[int] | None = None):
    return [
        Prediction(
            case=f"case-{n}",
            cluster=n if patients is None else patients[n],
            truth=tuple(truth),
            answer=None if answer is None else tuple(answer),
        )
        for n, (truth, answer) in enumerate(pairs)
    ]


def scored(*pairs: tuple[list[str], list[str] | None], **options) -> Metrics:
    options = {"level": "string", "vocabulary": ["a", "b", "c", "d", "e"], **options}
    return score(predictions(*pairs), **options)


@pytest.mark.parametrize(
    ("name", "truth", "answer", "expected"),
    [
        # precision, recall, jaccard, f1, counted by hand
        ("equal", ["a", "b"], ["a", "b"], (1, 1, 1, 1)),
        ("order", ["a", "b"], ["b", "a"], (1, 1, 1, 1)),
        ("disjoint", ["a", "b"], ["c"], (0, 0, 0, 0)),
        ("superset", ["a", "b"], ["a", "b", "c", "d"], (1 / 2, 1, 1 / 2, 2 / 3)),
        ("subset", ["a", "b", "c", "d"], ["a"], (1, 1 / 4, 1 / 4, 2 / 5)),
        ("overlap", ["a", "b", "c"], ["b", "c", "d", "e"], (1 / 2, 2 / 3, 2 / 5, 4 / 7)),
        ("duplicates", ["a", "a", "b"], ["a", "a", "a"], (1, 1 / 2, 1 / 2, 2 / 3)),
        ("case and blanks", ["Vitamin  D"], [" vitamin d", "VITAMIN D"], (1, 1, 1, 1)),
        ("empty answer", ["a"], [], (0, 0, 0, 0)),
        ("empty truth", [], ["a"], (0, 0, 0, 0)),
        ("both empty", [], [], (1, 1, 1, 1)),
        ("blank name", ["a"], ["a", "  "], (1, 1, 1, 1)),
        ("unparseable", ["a"], None, (0, 0, 0, 0)),
        ("unparseable, empty truth", [], None, (0, 0, 0, 0)),
    ],
)
def test_one_admission_by_hand(name, truth, answer, expected) -> None:
    metrics = scored((truth, answer))
    assert [metrics.value(mean) for mean in MEANS] == pytest.approx(expected), name


def test_means_are_over_admissions_and_unparseable_counts_zero() -> None:
    # By hand: P = (1/2 + 1 + 0)/3, R = (1 + 1/4 + 0)/3, J = (1/2 + 1/4 + 0)/3,
    # F1 = (2/3 + 2/5 + 0)/3; F1 of the means would be 6/11.
    metrics = scored((["a", "b"], ["a", "b", "c", "x"]), (list("abcd"), ["a"]), (["a"], None))
    assert metrics.value("precision") == pytest.approx(1 / 2)
    assert metrics.value("recall") == pytest.approx(5 / 12)
    assert metrics.value("jaccard") == pytest.approx(1 / 4)
    assert metrics.value("f1") == pytest.approx(16 / 45)
    assert metrics.value("output_rate") == pytest.approx(2 / 3)
    assert (metrics.samples, metrics.parsed, metrics.patients) == (3, 2, 3)
    only = metrics.parsed_only
    assert [only[mean].value for mean in MEANS] == pytest.approx([3 / 4, 5 / 8, 3 / 8, 8 / 15])


def test_both_readings_of_the_papers_accuracy() -> None:
    metrics = scored((["a", "b"], ["a", "b", "c", "d"]), (["a"], None))
    assert metrics.value("accuracy_over_predicted") == pytest.approx((2 / 4 + 0) / 2)
    assert metrics.value("accuracy_over_true") == pytest.approx((2 / 2 + 0) / 2)


def test_a_game_with_one_safe_drug_shows_in_recall_jaccard_and_length() -> None:
    truth = ["flush", *"bcdefghij"]
    metrics = scored((truth, ["flush"]), (truth, ["flush"]))
    assert metrics.value("precision") == 1
    assert metrics.value("jaccard") == metrics.value("recall") == pytest.approx(0.1)
    assert metrics.value("length_ratio") == pytest.approx(0.1)


def test_length_ratio_and_oov_rate_are_of_totals() -> None:
    # Predicted 3 + 1 + 0 distinct, true 2 + 4 + 1; x and y are unknown.
    metrics = scored((["a", "b"], ["a", "x", "Y", "y"]), (list("abcd"), ["E"]), (["a"], None))
    assert metrics.value("length_ratio") == pytest.approx(4 / 7)
    assert metrics.value("oov_rate") == pytest.approx(2 / 4)
    assert metrics.parsed_only["length_ratio"].value == pytest.approx(4 / 6)


def test_what_has_no_denominator_is_none() -> None:
    metrics = scored((["a"], None), (["b"], None))
    assert metrics.value("oov_rate") is None
    assert metrics.value("precision") == 0
    assert all(metrics.parsed_only[name].value is None for name in METRICS)
    assert "NaN" not in json.dumps(metrics.to_dict(), allow_nan=False)


def test_levels_are_applied_to_both_sides() -> None:
    pair = (["Carbidopa-Levodopa (25-100)"], ["levodopa", "carbidopa"])
    assert scored(pair).value("jaccard") == 0
    assert scored(pair, level="ingredient").value("jaccard") == 1
    codes = {"aspirin": ("B01AC06",), "aspirin ec": ("B01AC06",)}
    pair = (["Aspirin EC"], ["ASPIRIN"])
    assert scored(pair, level="map", drug_map=codes).value("jaccard") == 1
    assert scored(pair, level="map", drug_map={}).value("jaccard") == 0


def test_no_predictions_are_an_error() -> None:
    with pytest.raises(ValueError, match="no predictions"):
        scored()


@given(
    st.lists(
        st.tuples(
            st.lists(st.sampled_from("abcdefg"), max_size=6),
            st.none() | st.lists(st.sampled_from("abcdefg"), max_size=6),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_metrics_equal_a_plain_loop(pairs) -> None:
    metrics = scored(*pairs, resamples=0)
    jaccards, f1s = [], []
    for truth, answer in pairs:
        true, guess = set(truth), set(answer or [])
        if answer is None:
            jaccards.append(0.0)
            f1s.append(0.0)
            continue
        tp, fp, fn = len(true & guess), len(guess - true), len(true - guess)
        jaccards.append(tp / (tp + fp + fn) if tp + fp + fn else 1.0)
        f1s.append(2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 1.0)
    assert metrics.value("jaccard") == pytest.approx(np.mean(jaccards))
    assert metrics.value("f1") == pytest.approx(np.mean(f1s))
    assert metrics.value("jaccard") <= metrics.value("f1") + 1e-12
    assert all(metrics.estimates[name].low is None for name in METRICS)


def _mixed_patients() -> tuple[list[Prediction], dict[int, list[float]]]:
    """Patients with 1 to 6 admissions that go alike: recall r for all of one patient's."""
    draw = random.Random(5)
    pairs, patients, recalls = [], [], {}
    for patient in range(40):
        hits = draw.randint(0, 10)
        for _ in range(draw.randint(1, 6)):
            pairs.append(([f"d{n}" for n in range(10)], [f"d{n}" for n in range(hits)] or ["x"]))
            patients.append(patient)
            recalls.setdefault(patient, []).append(hits / 10)
    return predictions(*pairs, patients=patients), recalls


def test_interval_is_the_bootstrap_over_patients() -> None:
    rows, recalls = _mixed_patients()
    estimate = score(rows, level="string", vocabulary=[], resamples=4000).estimates["recall"]
    draw = random.Random(11)
    means = []
    for _ in range(4000):
        chosen = [x for patient in draw.choices(list(recalls), k=40) for x in recalls[patient]]
        means.append(sum(chosen) / len(chosen))
    low, high = np.quantile(means, [0.025, 0.975])
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=0.012)
    # Admissions as if they were independent give an interval far too narrow: not what is reported.
    alone = [
        Prediction(case=r.case, cluster=n, truth=r.truth, answer=r.answer)
        for n, r in enumerate(rows)
    ]
    naive = score(alone, level="string", vocabulary=[], resamples=4000).estimates["recall"]
    assert estimate.high - estimate.low > 1.4 * (naive.high - naive.low)


def test_intervals_follow_the_seed_alone_and_not_the_order_of_patients() -> None:
    rows, _ = _mixed_patients()
    first = score(rows, level="string", vocabulary=[], seed=3).to_dict()
    renamed = [
        Prediction(case=r.case, cluster=10**8 + 7 * r.cluster, truth=r.truth, answer=r.answer)
        for r in rows
    ]
    assert score(renamed, level="string", vocabulary=[], seed=3).to_dict() == first
    assert score(rows, level="string", vocabulary=[], seed=4).to_dict() != first


def test_one_patient_has_no_interval() -> None:
    rows = predictions((["a"], ["a"]), (["a"], ["b"]), patients=[7, 7])
    metrics = score(rows, level="string", vocabulary=[])
    assert metrics.patients == 1
    assert metrics.estimates["recall"] == (0.5, None, None)


def test_the_dictionary_is_flat_json_with_every_metric() -> None:
    found = json.loads(json.dumps(scored((["a"], ["a"]), (["b"], ["a"])).to_dict()))
    assert set(METRICS) <= set(found)
    assert set(found["parsed_only"]) == set(found["intervals"]) == set(METRICS)
    assert found["intervals"]["recall"] == [0.0, 1.0]
