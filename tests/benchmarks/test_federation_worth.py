"""The script on what federation is worth: its rows, and that every experiment can be planned."""

import importlib.util
from pathlib import Path

import pytest

from common.records.summary import Summary
from sim.runs.sweep import plan_cells

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "federation_worth.py"
specification = importlib.util.spec_from_file_location("federation_worth", SCRIPT)
script = importlib.util.module_from_spec(specification)
specification.loader.exec_module(script)


def summary(common: float, personal: float) -> Summary:
    """Return a summary in which the worse of two hospitals has these F1."""
    metrics = {
        name: {
            "f1": 0.5,
            "by_hospital": {
                "hospital-1": {"f1": worst, "samples": 20},
                "hospital-2": {"f1": 0.9, "samples": 30},
            },
        }
        for name, worst in (("fedrx", common), ("personal", personal))
    }
    found = {"metrics": metrics, "wire": {"tensors": (), "bytes_up": 2e6, "bytes_down": 0}}
    return Summary.read(found, what="a test")


@pytest.mark.parametrize("experiment", script.EXPERIMENTS)
def test_every_experiment_can_be_planned(experiment, quick_calibration):
    told = script.EXPERIMENTS[experiment]
    config = script.configuration(experiment, "tiny", ["federation.rounds=2"])
    cells = plan_cells(config, arms=told["arms"], seeds=[0, 1], vary=told.get("vary", ()))
    assert len({cell.folder for cell in cells}) == len(cells) > 1
    assert all(cell.config.federation.rounds == 2 for cell in cells)


def test_personal_answers_are_compared_with_the_global_b_of_the_same_runs():
    """Differences seed by seed; by hand t(0.975, 1) = 12.7062."""
    config = script.configuration("personal", "tiny", [])
    cells = plan_cells(config, arms=["personal"], seeds=[0, 1])
    runs = {
        cell: summary(common, personal)
        for cell, (common, personal) in zip(cells, ((0.1, 0.3), (0.2, 0.5)), strict=True)
    }
    common, personal = script.table(runs)
    assert (common["arm"], personal["arm"]) == ("personal: its global B", "personal")
    assert common["worst_f1"]["seeds"] == [0.1, 0.2]
    beyond = personal["worst_f1_beyond_global"]
    assert beyond["mean"] == pytest.approx(0.25)
    assert beyond["half_width"] == pytest.approx(12.7062 * 0.0707107 / 2**0.5, rel=1e-4)
    assert personal["mb_up"]["mean"] == 2
    assert "loss" not in personal


@pytest.mark.parametrize(
    ("experiment", "best"),
    [
        ("methods", {"fa-lora": "3e-2"}),
        ("q-fedavg", {"q-fedavg": "30"}),
        ("private", {"fa-lora": "6e-2"}),
    ],
)
def test_a_value_is_chosen_by_f1_or_by_loss(experiment, best, monkeypatch):
    """Of runs in which the second value has the lowest loss and the last the highest F1."""

    def runs(cells, folder, processes):
        assert {cell.seed for cell in cells} == {script.TUNING_SEED}
        places = {}
        for cell in cells:
            arm = cell.arm.partition(" ")[0]
            place = places[arm] = places.get(arm, -1) + 1
            told = {"metrics": {"fedrx": {"f1": 0.1 * place}}, "validation_loss": (abs(place - 1),)}
            losses = ((0, 3.0), (4, 1.5 + abs(place - 1)))
            told["public_validation"] = {"samples": 4, "seed": 1, "unit": "round", "losses": losses}
            yield cell, Summary.read(told, what="a test")

    monkeypatch.setattr(script, "finished", runs)
    config = script.configuration(experiment, "tiny", [])
    found = script.tuned(experiment, config, Path("nowhere"), 1)
    for arm, value in best.items():
        assert [float(one) for one in found[arm].values()] == [float(value)]


def test_hospitals_that_train_alone_answer_for_their_own_admissions():
    """By hand: (30 x 0.2 + 10 x 0.6) / 40; what a B does elsewhere does not count."""
    config = script.configuration("methods", "tiny", ["federation.hospitals=2"])
    cells = plan_cells(config, arms=["local-only"], seeds=[0])
    samples = dict(zip((cell.part for cell in cells), (30, 10), strict=True))
    runs = {}
    for cell, own in zip(cells, (0.2, 0.6), strict=True):
        each = {
            name: {"f1": own if name == cell.part else 0.05, "samples": count}
            for name, count in samples.items()
        }
        told = {"metrics": {"fedrx": {"f1": 0.1, "by_hospital": each}}, "training_seconds": 2.0}
        runs[cell] = Summary.read(told, what="a test")
    (row,) = script.table(runs)
    assert (row["runs"], row["f1"]["seeds"]) == (1, [pytest.approx(0.3)])
    assert (row["worst_f1"]["seeds"], row["best_f1"]["seeds"]) == ([0.2], [0.6])
    assert row["seconds"]["seeds"] == [4.0]
    assert "mb_up" not in row
