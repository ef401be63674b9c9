"""``--backend in-process``: the same run without SuperLink and Ray; the guard of marks holds it."""

import json
import logging
import sys
from dataclasses import replace

import pytest

import sim.runs.federate
from common.data.dataset import open_hospitals
from common.errors import RunFailed
from common.rundir import RunDirectory
from common.training.worker import Worker
from sim.cli.options import with_backend
from sim.runs.federate import federate
from sim.runs.resume import resume


def started(config, folder):
    config = replace(config, run=replace(config.run, backend="in-process"))
    return federate(config, command_line=["fedrx"], run_dir=folder).result.as_json()


@pytest.fixture
def short(tiny_config):
    return tiny_config(evaluation__samples=2, evaluation__max_new_tokens=8)


def test_a_whole_run_to_its_report(short, tmp_path, monkeypatch, capfd):
    """No process is started: none of this test's marks allows one, so the guard would fail it.

    The data is opened once: the nodes have the hospitals of the launcher, and read nothing. It
    prints nothing, and Flower's log prints again afterwards.
    """
    (printing,) = logging.getLogger("flwr").handlers
    monkeypatch.setattr(printing, "stream", sys.stderr)
    worker, opened = Worker(), []

    def opens(config, **keys):
        opened.append(config)
        return open_hospitals(config, **keys)

    monkeypatch.setattr("client.app.worker", lambda: worker)
    monkeypatch.setattr("common.training.worker.open_hospitals", opens)
    summary = started(short, tmp_path / "run")
    assert tuple(capfd.readouterr()) == ("", "")
    logging.getLogger("flwr").info("a line")
    assert "a line" in capfd.readouterr().err
    assert len(opened) == 1
    assert summary["workers"] == 1
    assert summary["validation_loss"][-1] < summary["validation_loss"][0]
    assert "fedrx" in summary["metrics"]
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "finished"
    assert (tmp_path / "run" / "report.html").exists()
    wire = [json.loads(line) for line in (tmp_path / "run" / "wire.jsonl").open()]
    assert {line["kind"] for line in wire} == {"query", "train", "evaluate"}


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_b(short, tmp_path, monkeypatch):
    whole = started(short, tmp_path / "whole")
    from client import handlers

    def fails(config, message, context, worker):
        if message.content["config"]["round"] == 2:
            raise KeyboardInterrupt
        return handlers.train_round(config, message, context, worker)

    monkeypatch.setitem(handlers.HANDLERS, "train", fails)
    with pytest.raises(KeyboardInterrupt):
        started(short, tmp_path / "cut")
    monkeypatch.undo()
    again = resume(tmp_path / "cut", command_line=["fedrx"])
    assert again["b_sha256"] == whole["b_sha256"]


def test_a_run_that_ends_between_server_and_launcher_is_summed_up(short, tmp_path, monkeypatch):
    """The server has told what it knows; seconds and source are the launcher's to tell."""
    train_rounds = sim.runs.federate.train_rounds

    def cut(run):
        train_rounds(run)
        raise KeyboardInterrupt

    monkeypatch.setattr(sim.runs.federate, "train_rounds", cut)
    with pytest.raises(KeyboardInterrupt):
        started(short, tmp_path / "run")
    told = RunDirectory.open(tmp_path / "run").summary()
    assert told.training_seconds is None
    # A second training would be cut again.
    again = resume(tmp_path / "run", command_line=["fedrx"])
    assert again["source"] == "synthetic"
    spent = [e.value for e in RunDirectory(tmp_path / "run").metrics("round-seconds")]
    assert sum(spent) <= again["training_seconds"] <= again["seconds"]
    assert again["b_sha256"] == told.b_sha256


def test_a_failing_federation_is_a_failed_run(short, tmp_path, monkeypatch):
    from client import handlers

    monkeypatch.setitem(handlers.HANDLERS, "train", lambda *_: 1 / 0)
    with pytest.raises(RunFailed, match="0 of 3 hospitals answered"):
        started(short, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"


@pytest.mark.ray
def test_b_is_that_of_ray(base, laboratory, tmp_path):
    assert started(laboratory.config, tmp_path / "run")["b_sha256"] == base.summary["b_sha256"]


def test_the_option_is_a_key():
    assert with_backend(None, "in-process") == ["run.backend=in-process"]
    assert with_backend(["train.seed=1"], None) == ["train.seed=1"]
