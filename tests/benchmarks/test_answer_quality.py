"""The trials' script at the smallest size: what a row tells, and what it does not."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from common.data.dataset import open_hospitals
from common.training.worker import Worker

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "answer_quality.py"
spec = importlib.util.spec_from_file_location("answer_quality", FILE)
answer_quality = importlib.util.module_from_spec(spec)
spec.loader.exec_module(answer_quality)
TINY = (
    *("model.backbone=tiny", "data.synthetic-patients=40", "federation.rounds=1"),
    *("federation.local-steps=1", "train.batch-size=1", "train.max-length=512"),
    *("train.dtype=fp32", "train.device=cpu", "train.threads=1", "evaluation.bootstrap=100"),
    *("evaluation.max-new-tokens=40", "federation.hospitals=2"),
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    out = tmp_path_factory.mktemp("trials") / "trials.json"
    with pytest.MonkeyPatch.context() as patch:
        extra = [part for one in (*TINY, "data.path=synthetic") for part in ("--set", one)]
        asked = ["--only", "demo-set-1e-2", "--methods", "scored,frequencies", *extra]
        patch.setattr(sys, "argv", ["answer_quality.py", "--out", str(out), *asked])
        answer_quality.main()
        answer_quality.main()
    return json.loads(out.read_text())["trials"]


def test_a_trial_is_one_row_with_both_kinds_of_ranking(rows):
    (row,) = rows  # the second call finds it there
    assert (row["name"], row["steps_per_hospital"]) == ("demo-set-1e-2", 1)
    assert set(row["validation"]) == {"scored", "frequencies"}
    for told in row["validation"].values():
        assert told["output_rate"] == 1
        assert 0 < told["prauc"] <= 1
        assert told["samples"] > 0
        assert set(told["baselines_f1"]) == {
            *("popularity", "nearest_neighbours", "logistic_regression")
        }


def test_no_place_on_the_machine_is_told(rows):
    assert not any(one.startswith("data.path") for one in rows[0]["changes"])


def test_the_cost_is_of_the_same_admissions():
    config = answer_quality.configured("demo-set-1e-2", TINY)
    hospitals, session = open_hospitals(config).hospitals, Worker().session(config)
    told = answer_quality.cost(session, hospitals, config, session.adapter.state(), 3)
    assert told["admissions"] == min(4, sum(len(one.test[:2]) for one in hospitals))
    each = told["cpu_seconds_each"]
    assert set(each) == {"scored", "greedy", "formulary"}
    assert all(value > 0 for value in each.values())
