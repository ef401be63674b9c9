"""A run of each protocol, from tables to report: federated and single, answered and told."""

import json

import pytest

from common.data.dataset import open_hospitals
from common.data.names import normalise_string
from common.evaluation.answers import choose_cases
from common.rundir import RunDirectory
from common.text import batches
from sim.answers.evaluate import evaluate_run
from sim.report.run_report import write_report
from sim.runs.federate import federate
from sim.runs.single import single

SIGNS = {"visits": "Last visit:", "first-24h": "Drugs ordered in the first 24 hours:"}


@pytest.fixture
def asked(monkeypatch):
    """All user messages that anything turns into tokens."""
    seen = set()
    render = batches.prompt_tokens

    def noted(tokenizer, system, user):
        seen.add(user)
        return render(tokenizer, system, user)

    monkeypatch.setattr(batches, "prompt_tokens", noted)
    return seen


@pytest.mark.parametrize("protocol", SIGNS)
def test_a_federation_trains_answers_and_tells_its_protocol(tiny_config, tmp_path, asked, protocol):
    config = tiny_config(
        data__protocol=protocol,
        data__synthetic_patients=60,
        train__max_length=512,
        evaluation__samples=6,
        evaluation__max_new_tokens=8,
        run__backend="in-process",
    )
    folder = tmp_path / "run"
    run = federate(config, command_line=["fedrx"], run_dir=folder).directory
    assert any(SIGNS[protocol] in user for user in asked)
    assert all("This visit:" in user for user in asked)
    evaluate_run(run, overrides=["evaluation.method=score"])
    summary = run.read_json("summary.json")
    assert {"fedrx", "popularity", "nearest_neighbours", "logistic_regression"} <= set(
        summary["metrics"]
    )
    # 512 tokens do not hold a patient's past, and what is left out is told.
    assert protocol != "visits" or summary["evaluation"]["left_out"]["visits"] > 0
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert rows
    assert all(bool(row["diagnoses"]) == (protocol == "visits") for row in rows)
    cases = choose_cases(open_hospitals(config).hospitals, samples=6, seed=0)
    ordered = {one.name: set(map(normalise_string, one.admission.ordered)) for one in cases}
    for row in rows:
        assert not ordered[row["case"]] & set(map(normalise_string, row["answer"] or ()))
    assert protocol == "visits" or all(ordered.values())
    write_report(run)
    for page in ("report.html", "report.md"):
        assert f"{protocol}: the drugs" in (folder / page).read_text()


def test_a_single_run_of_the_bedsides_task(tiny_config, tmp_path, asked):
    config = tiny_config(
        data__protocol="first-24h",
        data__synthetic_patients=60,
        federation__hospitals=1,
        train__steps=1,
        train__max_length=512,
        evaluation__samples=2,
        evaluation__max_new_tokens=8,
    )
    folder = tmp_path / "run"
    single(config, command_line=["fedrx"], run_dir=folder)
    assert any(SIGNS["first-24h"] in user for user in asked)
    facts = RunDirectory.open(folder).read_json("data.json")
    assert facts["counts"]["protocol"]["name"] == "first-24h"
