"""Runs compared: no ranking over other test cases, paired differences over the same ones."""

import html
import re

import numpy as np
import pytest
from line_fixtures import prediction_line

from common.configio import from_flat
from common.records.summary import Figures
from common.rundir import RunDirectory
from sim.report.comparison import write_comparison, write_sweep_page
from sim.report.html import Block

TRUTHS = (["a", "b"], ["c"], ["d", "e"], ["f"])


def metrics(f1):
    names = ("output_rate", "precision", "recall", "jaccard", "f1", "length_ratio", "oov_rate")
    return {**dict.fromkeys(names, f1), "intervals": {"f1": [f1 - 0.1, f1 + 0.1]}}


def make(path, *, answers, f1, truths=TRUTHS, **changed):
    config = from_flat({k.replace("__", ".").replace("_", "-"): v for k, v in changed.items()})
    run = RunDirectory.create(config, directory=path)
    summary = {
        "source": "demo",
        "b_sha256": "b" * 64,
        "backbone": {"name": "tiny", "fingerprint": "f" * 64},
        "hospitals": [],
        "rounds": 2,
        "validation_loss": [3.0, 2.0],
        "metrics": {"fedrx": metrics(f1), "popularity": metrics(0.9)},
    }
    run.write_json("summary.json", summary)
    # A round of which no hospital told its loss has none.
    for number, loss in enumerate((3.0, 2.0, None)):
        run.metric("validation-loss", loss and loss - f1, round=number)
    for number, (truth, answer) in enumerate(zip(truths, answers, strict=True)):
        for model in ("fedrx", "popularity"):
            told = {"cluster": number // 2, "diagnoses": ["Secret, diagnosis"], "truth": truth}
            given = answer if model == "fedrx" else ["x"]
            run.append("predictions.jsonl", prediction_line(f"case-{number}", model, given, **told))
    return run


@pytest.fixture
def weak(tmp_path):
    return make(tmp_path / "weak", answers=(["a"], ["x"], None, ["f"]), f1=0.3)


@pytest.fixture
def strong(tmp_path):
    answers = (["a", "b"], ["x"], ["d"], ["f"])
    return make(tmp_path / "strong", answers=answers, f1=0.5, adapter__rank=8, partition__seed=4)


def texts(page):
    return html.unescape(page.read_text()), (page.parent / "report.md").read_text()


def test_the_same_cases_are_ranked_and_their_differences_are_paired(weak, strong, tmp_path):
    page, twin = texts(write_comparison([weak, strong], tmp_path / "both"))
    assert re.findall(r'class="bar"><span>(\w+)<', page) == ["strong", "weak"]
    # By hand: F1 by case 2/3, 0, 0, 1 against 1, 0, 2/3, 1.
    difference = np.mean([1 / 3, 0, 2 / 3, 0])
    assert f"| strong | {difference:+.3f} |" in twin
    # Two patients: their mean differences are 1/6 and 1/3, the interval's ends.
    assert "| +0.167 to +0.333 | yes |" in twin
    assert "not scored on the same" not in page
    assert "Secret, diagnosis" not in page + twin


def test_other_cases_are_said_and_nothing_is_ranked(weak, tmp_path):
    truths = (*TRUTHS[:3], ["g"])
    other = make(tmp_path / "other", truths=truths, answers=(["a"],) * 4, f1=0.9)
    page, twin = texts(write_comparison([weak, other], tmp_path / "both"))
    assert "not scored on the same test cases" in page
    assert page.index("not scored on the same") < page.index("Runs compared")
    assert 'class="bar"' not in page
    assert "Paired differences" not in twin
    # In the order in which they were named, not by F1.
    assert twin.index("| weak | 2.000") < twin.index("| other | 2.000")
    assert "| test cases | 4 cases, set 1 | 4 cases, set 2 |" in twin


def test_what_differs_stands_in_columns_and_nothing_else(weak, strong, tmp_path):
    _, twin = texts(write_comparison([weak, strong], tmp_path / "both"))
    table = twin[twin.index("## What differs") :].splitlines()[2:]
    rows = [line for line in table if line.startswith("|")]
    assert rows == [
        "| key | weak | strong |",
        "|---|---|---|",
        "| partition.seed | 0 | 4 |",
        "| adapter.rank | 16 | 8 |",
    ]


def test_settings_are_written_as_set_takes_them_and_those_without_effect_left_out(tmp_path):
    """Of runs on tables the size of the synthetic source differs in nothing."""
    answers = (["a"],) * 4
    one = make(tmp_path / "one", answers=answers, f1=0.3, data__synthetic_patients=50)
    kept = {"federation__keep_updates": True, "data__synthetic_patients": 70}
    other = make(tmp_path / "other", answers=answers, f1=0.3, **kept)
    _, twin = texts(write_comparison([one, other], tmp_path / "both"))
    assert "| federation.keep-updates | false | true |" in twin
    assert "synthetic-patients" not in twin
    other.write_json("summary.json", other.summary().having(source="synthetic"))
    _, twin = texts(write_comparison([one, other], tmp_path / "both"))
    assert "| data.synthetic-patients | – | 70 |" in twin


def test_curves_speak_of_arms_only_where_there_are_some(weak, strong, tmp_path):
    _, twin = texts(write_comparison([weak, strong], tmp_path / "both"))
    assert "Means over hospitals.\n" in twin
    table = Block(title="Arms")
    page = write_sweep_page({"both": [weak, strong], "one": [strong]}, table, tmp_path / "s.html")
    assert "Means over hospitals, and over the runs of an arm." in page.read_text()


def test_a_private_run_without_losses_is_named_below_the_curves(weak, strong, tmp_path):
    text = dict.fromkeys(("unit", "relation", "accountant", "noise"), "x")
    privacy = {**text, "epsilon": 2.0, "delta": 1e-5}
    summary = strong.read_json("summary.json")
    strong.write_json("summary.json", {**summary, "privacy": privacy})
    said = "Without a curve, for with privacy no loss is told: strong."
    _, twin = texts(write_comparison([weak, strong], tmp_path / "both"))
    assert "Without a curve" not in twin
    (strong.path / "metrics.jsonl").unlink()
    page, twin = texts(write_comparison([weak, strong], tmp_path / "both"))
    assert f"Means over hospitals. {said}" in twin
    assert page.count("<svg") == 1
    (weak.path / "metrics.jsonl").unlink()
    _, twin = texts(write_comparison([weak, strong], tmp_path / "both"))
    assert said in twin
    assert "Means over" not in twin


def test_no_report_is_pasted_below_and_curves_lie_over_each_other(weak, strong, tmp_path):
    page, _ = texts(write_comparison([weak, strong], tmp_path / "both"))
    assert page.count("<svg") == 1
    assert "What ran" not in page
    assert not re.findall(r'(?:src|href)="(?!#)[^"]*"', page.replace("xlink:", ""))


def test_runs_of_one_name_are_told_apart(weak, tmp_path):
    twin = make(tmp_path / "again" / "weak", answers=(["a"], ["x"], None, ["f"]), f1=0.3)
    _, text = texts(write_comparison([weak, twin], tmp_path / "both"))
    assert "| weak (2) | +0.000 | +0.000 to +0.000 | no |" in text
    assert "equal settings" in text


def test_personal_answers_stand_for_a_run_that_has_them(weak, strong, tmp_path):
    """In both tables alike, and with the sentence that no epsilon covers them."""
    page, twin = texts(write_comparison([weak, strong], tmp_path / "without"))
    assert "no epsilon covers" not in page
    summary = strong.summary()
    strong.write_json(
        "summary.json",
        summary.having(
            metrics={**summary.metrics, "personal": Figures.model_validate(metrics(0.1))}
        ).as_json(),
    )
    for number, truth in enumerate(TRUTHS):
        told = {"cluster": number // 2, "diagnoses": ["Secret, diagnosis"], "truth": truth}
        strong.append(
            "predictions.jsonl", prediction_line(f"case-{number}", "personal", ["x"], **told)
        )
    page, twin = texts(write_comparison([weak, strong], tmp_path / "with"))
    assert re.findall(r'class="bar"><span>(\w+)<', page) == ["weak", "strong"]
    # None of the lists is right; the others' F1 by case is 2/3, 0, 0, 1.
    assert f"| strong | {-np.mean([2 / 3, 0, 0, 1]):+.3f} |" in twin
    assert "no epsilon covers them" in page
    assert "no epsilon covers them" in twin


def test_a_sweep_s_arms_are_compared_by_the_mean_of_their_runs(weak, strong, tmp_path):
    table = Block(title="Arms", headers=("arm", "F1"), rows=(("both", "0.4 ± 0.1"),))
    page = write_sweep_page({"both": [weak, strong], "one": [strong]}, table, tmp_path / "s.html")
    text = html.unescape(page.read_text())
    assert "0.4 ± 0.1" in text
    # The arm's cases: 5/6, 0, 1/3, 1 against 1, 0, 2/3, 1.
    assert f"<td>{np.mean([1 / 6, 0, 1 / 3, 0]):+.3f}</td>" in text
    assert "<td>16, 8</td><td>8</td>" in text
