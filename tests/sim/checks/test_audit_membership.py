"""``fedrx audit RUN --membership`` on run directories as a training leaves them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from client.local_update import LocalRound, update
from common.configio import from_flat
from common.data.partition import assign_hospitals
from common.data.prepare import load_samples
from common.errors import UserError
from common.model.adapter.layout import initial_tensors
from common.records.run import RunRecord, SavedFacts
from common.rundir import RunDirectory
from common.training.optimiser import TrainState
from common.training.worker import Worker
from sim.checks.audit_membership import MEMBERSHIP, audit_membership
from sim.cli.main import app

KEYS: dict[str, Any] = {
    "data.path": "synthetic",
    "data.synthetic-patients": 60,
    "data.test-fraction": 0.4,
    "model.backbone": "tiny",
    "adapter.rank": 4,
    "train.dtype": "fp32",
    "train.device": "cpu",
    "train.threads": 1,
    "train.max-length": 512,
    "train.optimizer": "adamw",
    "train.learning-rate": 0.02,
    "federation.hospitals": 1,
    "federation.rounds": 1,
    "federation.local-steps": 12,
}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A cache of its own, so that tests neither read nor fill the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDRX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def finished(folder: Path, **keys: Any) -> RunDirectory:
    config = from_flat({**KEYS, **keys})
    run, worker = RunDirectory.create(config, directory=folder), Worker()
    session = worker.session(config)
    table = load_samples(config.data)
    (node,) = assign_hospitals(table.admissions, config.partition, hospitals=1, data=config.data)
    adapter, hospital = session.adapter, worker.tokens(config, node)
    start = initial_tensors(adapter.shapes, adapter.spec)
    b = update(LocalRound(session, hospital, start, TrainState(), config, 1)).b
    fingerprints = {"backbone": session.spec.fingerprint, "a": adapter.a_fingerprint}
    inputs = {"samples": table.digest, **fingerprints}
    run.write_json("run.json", RunRecord(mode="federation", resumable=True, inputs=inputs))
    run.save_checkpoint("round-00001", b, facts=SavedFacts(round=1))
    run.write_json("summary.json", {"source": table.source})
    run.write_status("finished")
    return run


@pytest.fixture(scope="module")
def run(cache, tmp_path_factory) -> RunDirectory:
    return finished(tmp_path_factory.mktemp("runs") / "run")


def attack(run: RunDirectory, **choices: Any) -> dict[str, Any]:
    return audit_membership(run, **choices).as_json()


def test_figures_nulls_intervals_and_words_and_no_patient(run) -> None:
    found = attack(run)
    area, first, second = found["findings"]
    assert area["interval"][0] <= area["figure"] <= area["interval"][1]
    assert (area["null"], first["null"], second["null"]) == (0.5, 0.01, 0.001)
    assert all(one["verdict"] for one in found["findings"])
    assert "trained on" in area["meaning"]
    assert found["passed"] is True
    assert found["references"] == 1
    assert json.loads((run.path / MEMBERSHIP).read_text()) == found
    text = (run.path / "audit.md").read_text() + json.dumps(found)
    assert "Nothing was claimed" in text
    patients = {str(one.patient) for one in load_samples(run.config().data).admissions}
    assert not patients & set(text.replace(",", " ").replace(".", " ").split())


@pytest.mark.slow
def test_another_run_is_a_reference_if_a_and_backbone_are_the_same(run, tmp_path) -> None:
    other = finished(tmp_path / "other", **{"train.seed": 1})
    assert attack(run, references=[other.path])["references"] == 2
    record = other.read_json("run.json")
    record["inputs"]["a"] = "0" * 64
    other.write_json("run.json", record)
    with pytest.raises(UserError, match="with another A than the run"):
        attack(run, references=[other.path])


@pytest.mark.slow
def test_what_cannot_be_attacked_is_said(run, tmp_path) -> None:
    few = finished(tmp_path / "few", **{"data.synthetic-patients": 30, "data.test-fraction": 0.1})
    with pytest.raises(UserError, match="patients were held out"):
        attack(few)
    few.write_status("running")
    with pytest.raises(UserError, match="is running"):
        attack(few)


def test_a_private_run_is_held_to_its_epsilon(run) -> None:
    summary = run.read_json("summary.json")
    privacy = {"unit": "patient", "epsilon": 3.0, "delta": 1e-4, "planned_steps": 12}
    run.write_json("summary.json", {**summary, "privacy": privacy})
    try:
        found = attack(run)
    finally:
        run.write_json("summary.json", summary)
    assert found["findings"][0]["limit"] == pytest.approx(1 / (1 + np.exp(-3)) + 1e-4)
    assert "epsilon 3" in found["claim"]


@pytest.mark.slow
def test_a_local_only_run_is_attacked_on_its_own_hospital(tmp_path) -> None:
    keys = {"federation.hospitals": 1, "data.synthetic-patients": 120}
    whole = finished(tmp_path / "whole", **keys)
    everyone = attack(whole)["findings"][0]["meaning"]
    config = from_flat({**KEYS, **keys, "federation.hospitals": 2, "federation.only": "hospital-1"})
    whole.write_config(config)
    assert counts(attack(whole)["findings"][0]["meaning"])[0] < counts(everyone)[0]


def counts(meaning: str) -> list[int]:
    """The numbers of patients that a finding names."""
    return [int(word) for word in meaning.split() if word.isdigit()][1:3]


def test_options_that_mean_nothing_are_refused(run) -> None:
    verb = [str(run.path), "--membership"]
    for extra in (["--set", "adapter.rank=2"], ["--canaries", "7"]):
        result = CliRunner().invoke(app, ["audit", *verb, *extra])
        assert isinstance(result.exception, UserError)
    result = CliRunner().invoke(app, ["audit", "demo.toml", "--reference", str(run.path)])
    assert "without --membership" in str(result.exception)
    result = CliRunner().invoke(app, ["audit", *verb, "--json"])
    assert json.loads(result.stdout)["passed"] is True
