"""The single-node mode under privacy: the same plan, ledger and source as a hospital's."""

import io
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from privacy_fixtures import PRIVATE_TINY

from client.local_update import LocalRound
from client.private_update import private_update
from common.configio import from_flat
from common.model.adapter.layout import initial_tensors
from common.privacy.budget.guard import LEDGER, RECEIPT
from common.privacy.budget.ledger import BudgetExhausted, Ledger
from common.privacy.settings import plan_of
from common.records.summary import HospitalFacts
from common.rundir import RunDirectory
from common.training.hospital_data import HospitalData
from common.training.optimiser import TrainState
from common.training.worker import Worker
from sim.cli.terminal import Terminal
from sim.process.interrupt import Stopped
from sim.runs import single_training as stepwise
from sim.runs.single import one_node, summarise
from sim.runs.single_training import SingleTraining, scaling

KEYS: dict[str, Any] = {
    **PRIVATE_TINY,
    "adapter.rank": 4,
    "train.threads": 1,
    "train.optimizer": "adamw",
    "federation.hospitals": 1,
    "federation.rounds": 2,
    "federation.local-steps": 3,
    "train.checkpoint-steps": "3,6",
}


@pytest.fixture
def hospital(samples_of) -> HospitalData:
    samples = tuple(samples_of((17, 5, 33, 8, 9), (1, 2, 1, 3, 4)))
    return HospitalData(name="hospital-1", train=samples[:4], validation=samples[4:])


def begin(folder: Path, hospital: HospitalData, **keys: Any) -> SingleTraining:
    config = from_flat({**KEYS, **keys})
    run = RunDirectory(folder) if folder.exists() else RunDirectory.create(config, directory=folder)
    training = SingleTraining(
        run=run,
        config=config,
        session=Worker().session(config),
        hospital=hospital,
        console=Terminal(file=io.StringIO()),
    )
    training.restore()
    return training


def test_single_charges_releases_and_tells_no_loss(tmp_path, hospital) -> None:
    training = begin(tmp_path / "run", hospital)
    training.finish()
    run = training.run
    events = [line["event"] for line in run.lines(f"hospitals/hospital-1/{LEDGER}")]
    assert events == ["open", "charge", "release", "charge", "release"]
    lines = run.lines("privacy.jsonl")
    assert [(line["round"], line["steps"]) for line in lines] == [(3, 3), (6, 6)]
    paper = run.read_json(f"hospitals/hospital-1/{RECEIPT}")
    assert paper["epsilon"] == lines[-1]["epsilon"] > lines[0]["epsilon"]
    assert run.metrics("validation-loss") == []
    assert {event.value for event in run.metrics("train-loss")} == {None}
    assert max(np.abs(value).max() for value in run.load_checkpoint().b.values()) > 0


@pytest.mark.parametrize("mode", ["fa-lora", "rolora"])
def test_single_equals_a_federation_of_one(tmp_path, hospital, mode) -> None:
    """With reproducible noise: two checkpoints of three steps against two rounds of three."""
    fixed = {"privacy.deterministic-noise": True, "adapter.mode": mode}
    training = begin(tmp_path / "single", hospital, **fixed)
    training.finish()
    config, session = training.config, training.session
    b = initial_tensors(session.adapter.shapes, session.adapter.spec)
    state = TrainState()
    for number in (1, 2):
        task = LocalRound(session, hospital, b, state, config, number)
        b |= private_update(task, tmp_path / "hospital").b
    for key, value in training.run.load_checkpoint().b.items():
        np.testing.assert_allclose(value, b[key], atol=1e-6, rtol=0)


@pytest.mark.parametrize("moment", [1, 2, 3, 4, 5])
def test_an_interrupted_run_goes_on_within_its_budget(
    tmp_path, hospital, monkeypatch, moment
) -> None:
    training = begin(tmp_path / "run", hospital)
    honest = SingleTraining._log

    def stop_at(self: SingleTraining, report: Any) -> None:
        honest(self, report)
        if report.step == moment:
            raise Stopped(2)

    with monkeypatch.context() as patch:
        patch.setattr(SingleTraining, "_log", stop_at)
        with pytest.raises(Stopped):
            training.finish()
    charged = training.guard.ledger.steps
    assert charged >= moment
    resumed = begin(tmp_path / "run", hospital)
    assert resumed.state.step == moment
    resumed.finish()
    assert resumed.guard.ledger.steps == 6
    with pytest.raises(BudgetExhausted):
        resumed.guard.charge(7, 1)


@pytest.mark.parametrize("written", [False, True])
def test_killed_around_a_checkpoint_the_ledger_covers_it(
    tmp_path, hospital, monkeypatch, written
) -> None:
    """A kill just before, and just after, a checkpoint is written, but before it is settled."""

    class Killed(BaseException):
        pass

    def kill(*args: Any, **kwargs: Any) -> None:
        raise Killed

    training = begin(tmp_path / "run", hospital)
    with monkeypatch.context() as patch:
        if written:
            patch.setattr(stepwise, "ledger_line", kill)
            patch.setattr(type(training.guard), "record_release", kill)
        else:
            patch.setattr(RunDirectory, "save_checkpoint", kill)
        with pytest.raises(Killed):
            training.finish()
    path, plan = tmp_path / "run" / "hospitals" / "hospital-1" / LEDGER, plan_of(training.config)
    assert Ledger(path, plan).steps == 3
    resumed = begin(tmp_path / "run", hospital)
    assert resumed.state.step == (3 if written else 0)
    assert Ledger(path, plan).taken == resumed.state.step
    resumed.finish()
    assert Ledger(path, plan).steps == 6


@pytest.mark.slow
@pytest.mark.slow
def test_one_node_calibrates() -> None:
    keys = {**KEYS, "privacy.noise-multiplier": 0.0, "privacy.target-epsilon": 5.0}
    config = one_node(from_flat(keys))
    assert config.federation.hospitals == 1
    assert config.privacy.noise_multiplier == plan_of(config).sigma > 0


def test_epsilon_is_shown_at_each_checkpoint_and_no_loss(tmp_path, hospital):
    training = begin(tmp_path / "run", hospital)
    training.finish()
    shown = training.console.file.getvalue()
    assert re.findall(r"step (\d)/6: epsilon \d+\.\d{3} spent", shown) == ["3", "6"]
    assert "loss" not in shown


@pytest.mark.parametrize(("noise", "told"), [(1.2, False), (0.0, True)])
def test_a_private_summary_tells_no_size(tmp_path, hospital, noise, told):
    training = begin(tmp_path / "run", hospital, **{"privacy.noise-multiplier": noise})
    sizes = [HospitalFacts(name="hospital-1", patients=4711, samples=4712)]
    opened = SimpleNamespace(backbone=training.session.spec, data=SimpleNamespace(hospitals=sizes))
    shown = summarise(training, opened).model_dump_json() + str(scaling(training).notes)
    assert ("4711" in shown, "4712" in shown) == (told, told)
    assert ("4 training samples" in shown, '"train_samples":4' in shown) == (told, told)
    assert "6 steps from federation.rounds x federation.local-steps" in shown
