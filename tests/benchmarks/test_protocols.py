"""The protocols' table at a small size: folds by patient, the same admissions, figures by hand."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import f1_score
from sklearn.preprocessing import MultiLabelBinarizer

from common.config import DataConfig
from common.data.prepare import load_samples
from common.evaluation.baselines import Ranked, popularity

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "protocols.py"
spec = importlib.util.spec_from_file_location("protocols_table", FILE)
protocols = importlib.util.module_from_spec(spec)
spec.loader.exec_module(protocols)


@pytest.fixture
def small(monkeypatch):
    """The synthetic source with few patients, wherever the script asks for it."""

    def load(data):
        return load_samples(replace(data, synthetic_patients=20))

    monkeypatch.setattr(protocols, "load_samples", load)
    return load


def test_a_patient_is_held_out_once():
    patients = [number // 3 for number in range(40)]
    asked = []
    for train, test in protocols.folds(patients):
        assert not {patients[place] for place in train} & {patients[place] for place in test}
        asked += test
    assert sorted(asked) == list(range(40))


def test_each_task_stands_beside_the_whole_stay_on_the_same_admissions(small):
    lines = protocols.table("synthetic")
    assert [(line["protocol"], line["admissions_of"]) for line in lines] == [
        ("admission", "admission"),
        ("visits", "visits"),
        ("admission", "visits"),
        ("first-24h", "first-24h"),
        ("admission", "first-24h"),
    ]
    for task, whole in (lines[1:3], lines[3:5]):
        assert (task["samples"], task["patients"]) == (whole["samples"], whole["patients"])
    # Without features that differ, popularity is the same of the same lists.
    assert lines[1]["baselines"]["popularity"] == lines[2]["baselines"]["popularity"]
    assert lines[3]["drugs_true"] < lines[4]["drugs_true"]


def test_figures_agree_with_scikit_learn(small):
    admissions = small(DataConfig(protocol="first-24h")).admissions
    ranked = popularity(admissions, admissions)
    found = protocols.figures(admissions, ranked)
    names = MultiLabelBinarizer().fit([one.drugs for one in admissions])
    true = names.transform([one.drugs for one in admissions])
    listed = names.transform([one.listed for one in ranked])
    expected = np.mean([f1_score(a, b) for a, b in zip(true, listed, strict=True)])
    assert found["f1"]["value"] == pytest.approx(expected, abs=6e-4)
    assert found["prauc"]["low"] <= found["prauc"]["value"] <= found["prauc"]["high"]
    perfect = [Ranked(one.drugs, len(one.drugs)) for one in admissions]
    assert protocols.figures(admissions, perfect)["prauc"]["value"] == 1.0
