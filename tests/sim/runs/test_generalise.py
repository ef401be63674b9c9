"""``fedrx generalise``: which models it trains, what it says of them, and how it goes on."""

import json
import re

import numpy as np
import pytest
from typer.testing import CliRunner

import sim.runs.cells
import sim.runs.generalise
import sim.runs.lifecycle
from common.data.dataset import open_hospitals
from common.errors import UserError
from common.evaluation.baselines import BASELINES
from common.privacy.membership import patient_losses
from common.rundir import RunDirectory
from common.text.batches import encode
from common.training.worker import Worker
from sim.cli.main import app
from sim.process.failures import StageFailed
from sim.runs.generalise import GENERALISE, PAGE, generalise, plan_models

SMALL = {
    "federation__rounds": 1,
    "federation__local_steps": 1,
    "data__synthetic_patients": 36,
    "evaluation__max_new_tokens": 8,
    "evaluation__samples": 9,
    "evaluation__bootstrap": 100,
}


@pytest.fixture(scope="module")
def done(tiny_config, tmp_path_factory):
    """Everything once, interrupted within the third model and gone on with.

    Each run's own page and its dear baseline, which nothing here reads, are left out.
    """
    config, folder = tiny_config(**SMALL), tmp_path_factory.mktemp("generalise")
    begun, opened, federate = [], [], sim.runs.cells.federate

    def start(*arguments, run_dir, **options):
        begun.append(run_dir.name)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return federate(*arguments, run_dir=run_dir, **options)

    def opens(config, **keys):
        opened.append(len(begun))
        return open_hospitals(config, **keys)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sim.runs.cells, "federate", start)
        patch.setattr("common.training.worker.open_hospitals", opens)
        patch.setattr(sim.runs.lifecycle, "write_report", lambda run: None)
        patch.delitem(BASELINES, "logistic_regression")
        with pytest.raises(KeyboardInterrupt):
            generalise(config, folder, seeds=1, command_line=[])
        result = generalise(config, folder, seeds=1, command_line=[])
    return config, folder, begun, result, opened


def test_every_model_is_trained_once_by_the_right_hospitals(done):
    config, folder, begun, _, _ = done
    cells = plan_models(config, 1)
    assert begun == [cell.folder for cell in cells[:3]] + [cell.folder for cell in cells[2:]]
    for cell in cells:
        trained = {one.hospital for one in RunDirectory(folder / cell.folder).metrics("steps")}
        names = {"hospital-1", "hospital-2", "hospital-3"}
        wanted = {"alone": {cell.part}, "without": names - {cell.part}, "all": names}
        assert trained == wanted[cell.arm]


def test_data_is_opened_once_by_each_call(done):
    """For its first model, which had begun then; nothing is read for the others or the page."""
    *_, opened = done
    assert opened == [1, 4]


def test_figures_are_those_of_the_runs(done):
    """F1 against each run's own summary by hospital; loss against one forward pass by hand."""
    config, folder, _, result, _ = done
    data = open_hospitals(config)
    for cell in plan_models(config, 1):
        run = RunDirectory(folder / cell.folder)
        by_hospital = run.summary().metrics["fedrx"].model_dump()["by_hospital"]
        session = Worker().session(cell.config)
        for hospital in data.hospitals:
            at = next(one for one in result.f1.hospitals if one.hospital == hospital.name)
            lost = next(one for one in result.loss.hospitals if one.hospital == hospital.name)
            records = [
                encode(
                    one,
                    session.tokenizer,
                    text=config.text,
                    max_length_tokens=config.train.max_length,
                )
                for one in hospital.test
            ]
            loss = patient_losses(session, records, [run.load_checkpoint().b])[0].mean()
            f1 = by_hospital[hospital.name]["f1"]
            if cell.arm == "without" and cell.part == hospital.name:
                told, by_loss = at.absent, lost.absent
            elif cell.arm == "without":
                continue
            else:
                row = cell.part or "all"
                told, by_loss = (one.matrix[row][hospital.name] for one in (result.f1, result.loss))
            assert told.value == pytest.approx(f1)
            assert by_loss.value == pytest.approx(loss, rel=1e-4)
    assert json.loads((folder / GENERALISE).read_text()) == result.as_json()


def test_the_page_has_maps_and_curves_and_no_patient(done):
    config, folder, _, _, _ = done
    page = (folder / PAGE).read_text()
    assert page.count("<svg") == 4
    assert "What a hospital gains: F1" in page
    text = (folder / PAGE).with_suffix(".md").read_text() + (folder / GENERALISE).read_text()
    data = open_hospitals(config)
    patients = {str(one.patient) for each in data.hospitals for one in each.admissions}
    assert not patients & set(text.replace(",", " ").replace(".", " ").split())


def test_a_finished_run_is_the_first_model_of_all(done, tmp_path):
    _, folder, _, _, _ = done
    run = RunDirectory.open(folder / "all-seed-0")
    listed = CliRunner().invoke(app, ["generalise", str(run.path), "--seeds", "1", "--dry-run"])
    assert listed.exit_code == 0, listed.output
    assert "7 runs" in listed.output
    started = []

    def start(*_, run_dir, **__):
        started.append(run_dir.name)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sim.runs.cells, "federate", start)
        generalise(run.config(), tmp_path, seeds=1, command_line=[], run=run)
    assert started == ["alone-seed-0-hospital-1"]


def test_seeds_change_the_training_and_not_the_hospitals(tiny_config):
    config = tiny_config(federation__hospitals=5, train__seed=4, partition__seed=7)
    cells = plan_models(config, 2)
    assert len(cells) == len({cell.folder for cell in cells}) == 2 * (1 + 5 + 5 + 2)
    assert {cell.config.partition.seed for cell in cells} == {7}
    assert {cell.config.train.seed for cell in cells} == {4, 5}
    sizes = [len(c.config.federation.only.split(",")) for c in cells if c.arm.startswith("of-")]
    assert sizes == [2, 3, 2, 3]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"federation__hospitals": 1}, "federation.hospitals=1; allowed: two hospitals"),
        ({"federation__only": "hospital-1"}, "federation.only=hospital-1; allowed: two hospitals"),
        ({"federation__strategy": "krum", "federation__hospitals": 5}, "krum"),
    ],
)
def test_what_has_no_models_of_fewer_is_refused(settings, words, tiny_config):
    with pytest.raises(UserError, match=words):
        plan_models(tiny_config(**settings), 1)


def test_a_failure_after_all_training_says_so_and_where_b_is(done, monkeypatch):
    config, folder, _, _, _ = done

    def fails(results, names):
        raise ValueError("no room for matrices")

    with monkeypatch.context() as broken:
        broken.setattr(sim.runs.generalise, "measured", fails)
        line = f"training is done, B is below {folder}; the comparison failed: ValueError"
        with pytest.raises(StageFailed, match=re.escape(line)) as failed:
            generalise(config, folder, seeds=1, command_line=[])
    assert "--set" not in str(failed.value)
    status = RunDirectory(folder).status()
    assert (status.state, status.stage) == ("failed", "comparison")
    for cell in plan_models(config, 1):
        last = RunDirectory(folder / cell.folder).checkpoint_names()[-1]
        assert (folder / cell.folder / "checkpoints" / last / "b.safetensors").exists()
    generalise(config, folder, seeds=1, command_line=[])
    assert RunDirectory(folder).status().state == "finished"


def test_a_run_of_another_kind_is_refused(done, tmp_path):
    config, _, _, _, _ = done
    run = RunDirectory.create(config, directory=tmp_path / "run")
    with pytest.raises(UserError, match="is no finished federation"):
        generalise(config, tmp_path, seeds=1, command_line=[], run=run)
    assert np.all([cell.config.run.backend == "in-process" for cell in plan_models(config, 1)])
