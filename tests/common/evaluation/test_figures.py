"""What stands beside the metrics, counted from the rows by hand."""

from dataclasses import replace

import numpy as np
import pytest

from common.config import Config, DataConfig, EvaluationConfig
from common.evaluation.answers_file import Patient, Prediction
from common.evaluation.figures import Compared, figures
from common.evaluation.lists import Answer
from common.evaluation.metrics import f1_by_admission, interval_of_mean, score
from common.evaluation.ranking import RankedDrug, Ranking

PATIENT = Patient(sex="F", age="60")
TRUTHS = (("A1", "B1"), ("A1",), ("C1", "D1", "A1"), ("B1",))
LISTS = (("A1", "B1"), ("B1",), ("C1", "A1"), None)
POPULAR = (("A1",),) * 4
HOSPITALS = ("north", "south", "north", "south")


def rows(model, lists):
    return [
        Prediction(
            case=f"case-{place}",
            cluster=1 + place // 2,
            model=model,
            patient=PATIENT,
            diagnoses=("x",),
            truth=truth,
            text=None,
            answer=answer,
        )
        for place, (truth, answer) in enumerate(zip(TRUTHS, lists, strict=True))
    ]


def compared(**settings):
    return Compared(
        config=Config(evaluation=EvaluationConfig(bootstrap=200, **settings)),
        hospitals=HOSPITALS,
        vocabulary=frozenset("ABCD"),
    )


def found(rankings=(), **settings):
    both = {"fedrx": rows("fedrx", LISTS), "popularity": rows("popularity", POPULAR)}
    answers = [
        Answer(None, (), order=one and tuple(drug.name for drug in one.drugs), ranking=one)
        for one in rankings
    ]
    return figures(both, {"fedrx": answers}, compared(**settings))


def test_lengths_are_means_and_no_list_has_none():
    assert found()["fedrx"]["drugs_per_list"] == {"predicted": 5 / 4, "true": 7 / 4}


def test_each_hospital_is_scored_alone_and_the_worst_is_named():
    part = found()["fedrx"]
    assert part["by_hospital"]["north"]["f1"] == pytest.approx((1 + 4 / 5) / 2)
    assert part["by_hospital"]["south"] == {
        "samples": 2,
        "precision": 0,
        "recall": 0,
        "jaccard": 0,
        "f1": 0,
    }
    assert part["worst_hospital"] == "south"
    assert part["hospital_gap"] == pytest.approx((1 + 4 / 5) / 2 - 0)
    whole = score(rows("fedrx", LISTS), level="string", vocabulary=(), resamples=0)
    assert np.mean([one["f1"] for one in part["by_hospital"].values()]) == whole.value("f1")


def test_one_hospital_is_not_compared_with_itself():
    alone = replace(compared(), hospitals=("only",) * 4)
    part = figures({"fedrx": rows("fedrx", LISTS)}, {}, alone)["fedrx"]
    assert "by_hospital" not in part


def test_the_difference_is_paired_by_admission_and_resampled_by_patient():
    ours, theirs = np.array([1, 0, 4 / 5, 0]), np.array([2 / 3, 1, 1 / 2, 0])
    part = found()["fedrx"]["f1_beyond"]
    assert list(part) == ["popularity"]
    assert part["popularity"]["value"] == pytest.approx((ours - theirs).mean())
    # Two patients of two admissions each: a resample is one of three means.
    ends = [(ours - theirs)[:2].mean(), (ours - theirs)[2:].mean()]
    assert part["popularity"]["low"] == pytest.approx(min(ends))
    assert part["popularity"]["high"] == pytest.approx(max(ends))
    assert "f1_beyond" not in found()["popularity"]


def test_f1_by_admission_averages_to_the_metric():
    level = DataConfig().normalisation
    each = f1_by_admission(rows("fedrx", LISTS), level=level)
    whole = score(rows("fedrx", LISTS), level=level, vocabulary=(), resamples=300, seed=5)
    clusters = [1, 1, 2, 2]
    again = interval_of_mean(each, clusters, resamples=300, seed=5)
    assert again == pytest.approx(whole.estimates["f1"])


def ranking(confidences):
    drugs = tuple(RankedDrug(name=n, confidence=c) for n, c in confidences.items())
    return Ranking(drugs=drugs, length=1, threshold=0.5, admissions=3)


RANKED = ranking({"b1": 0.9, "A1": 0.8, "C1": 0.1})


def test_rankings_have_average_precision_and_calibration():
    one = RANKED
    part = found([one] * 4)["fedrx"]
    # B1, A1, C1 against {A1 B1}, {A1}, {A1 C1 D1}, {B1}; D1 is not ranked.
    expected = (1 + 1 / 2 + (1 / 2 + 2 / 3) / 3 + 1) / 4
    assert part["prauc"]["value"] == pytest.approx(expected)
    north, south = (1 + (1 / 2 + 2 / 3) / 3) / 2, (1 / 2 + 1) / 2
    assert part["prauc_by_hospital"] == pytest.approx({"north": north, "south": south})
    assert sum(band["pairs"] for band in part["calibration"]["bins"]) == 12
    told = np.tile([0.9, 0.8, 0.1], 4)
    true = np.array([1, 1, 0, 0, 1, 0, 0, 1, 1, 1, 0, 0])
    assert part["calibration"]["brier"] == pytest.approx(np.square(told - true).mean())
    assert "prauc" not in found([one, None, one, one])["fedrx"]
    # Of three ranked drugs 2, 1, 2 and 1 were ordered; of 2, 1, 3 and 1.
    assert part["at"]["5"]["precision"] == pytest.approx((2 + 1 + 2 + 1) / 4 / 5)
    assert part["at"]["10"]["recall"] == pytest.approx((1 + 1 + 2 / 3 + 1) / 4)


def test_a_ranking_without_confidences_has_no_calibration():
    answers = [Answer(None, (), order=("B1", "A1", "C1"))] * 4
    part = figures({"popularity": rows("popularity", POPULAR)}, {"popularity": answers}, compared())
    assert part["popularity"]["prauc"]["value"] == found([RANKED] * 4)["fedrx"]["prauc"]["value"]
    assert "calibration" not in part["popularity"]


def test_interactions_are_those_of_the_users_file(tmp_path):
    file = tmp_path / "pairs.csv"
    file.write_text("drug_a,drug_b\nA1,B1\nA1,C1\n")
    part = found(interactions=str(file))
    assert part["fedrx"]["interactions"]["predicted"]["rate"] == 1
    assert part["fedrx"]["interactions"]["true"] == {
        "rate": 2 / 4,
        "pairs": 4,
        "interacting": 2,
        "unknown": 1 / 7,
        "known": 6,
        "lists": 2,
    }
    assert part["popularity"]["interactions"]["predicted"]["rate"] is None
    assert "interactions" not in found()["fedrx"]


def test_names_that_the_map_does_not_hold_are_told_as_a_share(tmp_path):
    file = tmp_path / "atc.csv"
    file.write_text("name,code\na1,A01AA01\nB1,B01AA01\nnobody,C01AA01\n")
    both = {"fedrx": rows("fedrx", LISTS)}
    data = DataConfig(normalisation="atc-4", drug_map=str(file))
    asked = compared()
    part = figures(both, {}, replace(asked, config=replace(asked.config, data=data)))["fedrx"]
    # Listed A1 B1 B1 C1 A1; ordered A1 B1 A1 C1 D1 A1 B1.
    assert part["unmapped"] == {"predicted": 1 / 5, "true": 2 / 7}
    assert "unmapped" not in figures(both, {}, asked)["fedrx"]


def test_high_priority_interactions_need_no_file():
    """Of the lists one pair of three is of high priority; of the true ones none of one."""
    lists = [("Haloperidol", "Methadone", "Senna"), (), None, ()]
    true = [("Senna", "Docusate"), ("Methadone",), (), ()]
    ours = [
        row.model_copy(update={"truth": truth})
        for row, truth in zip(rows("fedrx", lists), true, strict=True)
    ]
    part = figures({"fedrx": ours}, {}, compared())["fedrx"]["ddi_high_priority"]
    assert part["predicted"]["rate"] == 1 / 3
    assert part["predicted"]["known"] == 2
    assert part["predicted"]["lists"] == 1
    assert part["true"]["rate"] == 0
    assert part["true"]["known"] == 1
