"""The script on what federation is worth: its rows, and that every experiment can be planned."""

import importlib.util
from pathlib import Path

import pytest

from common.records import Summary
from common.rundir import RunDirectory
from sim.runs.sweep import plan_cells

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "federation_worth.py"
specification = importlib.util.spec_from_file_location("federation_worth", SCRIPT)
script = importlib.util.module_from_spec(specification)
specification.loader.exec_module(script)


def write(run: RunDirectory, common: float, personal: float) -> RunDirectory:
    """Write a summary in which the worse of two hospitals has these F1."""
    run.path.mkdir()
    metrics = {
        name: {
            "f1": 0.5,
            "by_hospital": {"hospital-1": {"f1": worst}, "hospital-2": {"f1": 0.9}},
        }
        for name, worst in (("fedrx", common), ("personal", personal))
    }
    found = {"metrics": metrics, "wire": {"tensors": (), "bytes_up": 2e6, "bytes_down": 0}}
    run.write_json("summary.json", Summary.read(found, what="a test"))
    return run


@pytest.mark.parametrize("experiment", script.EXPERIMENTS)
def test_every_experiment_can_be_planned(experiment):
    told = script.EXPERIMENTS[experiment]
    config = script.configuration(experiment, "tiny", ["federation.rounds=2"])
    cells = plan_cells(config, arms=told["arms"], seeds=[0, 1], vary=told.get("vary", ()))
    assert len({cell.folder for cell in cells}) == len(cells) > 1
    assert all(cell.config.federation.rounds == 2 for cell in cells)


def test_personal_answers_are_compared_with_the_global_b_of_the_same_runs(tmp_path):
    """Differences seed by seed; by hand t(0.975, 1) = 12.7062."""
    config = script.configuration("personal", "tiny", [])
    cells = plan_cells(config, arms=["personal"], seeds=[0, 1])
    runs = {
        cell.folder: write(RunDirectory(tmp_path / cell.folder), common, personal)
        for cell, (common, personal) in zip(cells, ((0.1, 0.3), (0.2, 0.5)), strict=True)
    }
    common, personal = script.table(cells, runs)
    assert (common["arm"], personal["arm"]) == ("personal: its global B", "personal")
    assert common["worst_f1"]["seeds"] == [0.1, 0.2]
    beyond = personal["worst_f1_beyond_global"]
    assert beyond["mean"] == pytest.approx(0.25)
    assert beyond["half_width"] == pytest.approx(12.7062 * 0.0707107 / 2**0.5, rel=1e-4)
    assert personal["mb_up"]["mean"] == 2
    assert "loss" not in personal
