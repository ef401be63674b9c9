"""Flower's log shows where a run is, its losses by round, and what to do next."""

import logging

import pytest

from common.config import Config
from common.configio import completed_for_flwr
from common.records.run import RunRecord
from common.rundir import RunDirectory


@pytest.fixture
def shown(caplog):
    """What Flower's own logger shows, by our own name below it."""
    caplog.set_level(logging.INFO, logger="flwr")
    return lambda: [r.getMessage() for r in caplog.records if r.name == "flwr.fedrx"]


def test_each_round_shows_the_losses_that_the_metrics_hold(tiny_config, in_process, shown):
    run = in_process(tiny_config()).run
    expected = []
    for number in range(3):
        at = [event for event in run.metrics() if event.round == number]
        (loss,) = (e.value for e in at if e.name == "validation-loss" and e.hospital is None)
        line = f"validation loss {loss:.4f}"
        if number:
            losses = {e.hospital: e.value for e in at if e.name == "train-loss"}
            weights = {e.hospital: e.value for e in at if e.name == "weight"}
            mean = sum(losses[h] * weights[h] for h in losses) / sum(weights.values())
            line = f"3 hospitals, training loss {mean:.4f}, {line}"
        expected.append(f"round {number} of 2: {line}")
    assert shown()[:-1] == expected


def test_a_private_run_shows_no_loss(tiny_config, in_process, shown, quick_accounting):
    config = tiny_config(privacy__noise_multiplier=1.0, privacy__delta=1e-4)
    in_process(config)
    assert shown()[:-1] == [
        "round 0 of 2",
        "round 1 of 2: 3 hospitals",
        "round 2 of 2: 3 hospitals",
    ]


def test_flwr_run_shows_its_directory_first_and_what_to_do_last(
    tiny_config, run_main, shown, tmp_path, monkeypatch
):
    monkeypatch.setenv("FEDRX_RUNS", str(tmp_path))
    run_main(tiny_config(federation__rounds=1))
    folder = tmp_path / "flwr-7"  # the run id of ``run_main``
    assert RunDirectory.open(folder).status().state == "finished"
    first, *rounds, last = shown()
    assert first == f"run directory: {folder}"
    assert len(rounds) == 2
    assert last == f"trained; for answers and a report: fedrx evaluate {folder}"


def test_a_run_that_the_launcher_goes_on_with_is_told_nothing_more(
    tiny_config, run_main, shown, tmp_path
):
    config = tiny_config(federation__rounds=1, run__directory=str(tmp_path / "run"))
    RunDirectory.create(config).write_json("run.json", RunRecord(mode="federation", resumable=True))
    run_main(config)
    assert not any("fedrx evaluate" in line for line in shown())


def test_the_directory_has_the_run_id_as_flower_prints_it(monkeypatch):
    """Flower prints it as an unsigned number of 64 bits."""
    monkeypatch.setenv("FEDRX_RUNS", "/runs")
    ids = {17: "17", 2**64 - 1: "18446744073709551615", -1: "18446744073709551615"}
    for run_id, printed in ids.items():
        assert completed_for_flwr(Config(), run_id=run_id).run.directory == f"/runs/flwr-{printed}"
