"""Rounds replayed with some hospitals: against numpy, the run itself, and runs of those alone."""

import logging
import shutil
import sys

import numpy as np
import pytest

from common.errors import UserError
from common.provenance import tensors_sha256
from common.tensor_files import Altered
from common.wire.undocumented_flower import TaskIdentity
from server.kept_updates import read
from server.replay import Replay

KEEP = {"federation__keep_updates": True}
NAMES = ["hospital-1", "hospital-2", "hospital-3"]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"federation__weighting": "uniform", "federation__fraction": 0.5},
        {"adapter__mode": "rolora", "federation__rounds": 3},
        {"federation__codec": "int8"},
    ],
)
def test_the_replay_of_all_hospitals_is_the_run_to_the_last_bit(settings, tiny_config, in_process):
    done = in_process(tiny_config(**KEEP, **settings))
    replay = Replay.open(done.run)
    assert replay.hospitals == NAMES
    assert tensors_sha256(replay.of(NAMES)) == done.sha
    begun = done.run.load_checkpoint("round-00000").b
    assert tensors_sha256(replay.of([])) == tensors_sha256(begun)


def test_a_replay_needs_no_task_of_flowers(tiny_config, in_process, monkeypatch):
    """The command line is none, and Flower's messages ask who makes them."""
    run = in_process(tiny_config(**KEEP, federation__rounds=1)).run
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, None)
    assert Replay.open(run).hospitals == NAMES


def test_a_replay_prints_nothing_and_leaves_flowers_log_as_it_was(
    tiny_config, in_process, monkeypatch, capfd
):
    run = in_process(tiny_config(**KEEP, federation__rounds=1)).run
    (printing,) = logging.getLogger("flwr").handlers
    monkeypatch.setattr(printing, "stream", sys.stderr)
    capfd.readouterr()
    Replay.open(run).of(["hospital-1"])
    assert tuple(capfd.readouterr()) == ("", "")
    logging.getLogger("flwr").info("a line")
    assert "a line" in capfd.readouterr().err


def test_a_replay_without_one_is_the_sum_of_the_others_mean_changes(tiny_config, in_process):
    """By numpy, from the files alone."""
    run = in_process(tiny_config(**KEEP)).run
    wanted = {key: value.astype(np.float64) for key, value in run.load_checkpoint().b.items()}
    wanted = dict.fromkeys(wanted, 0.0)
    for number in (1, 2):
        begun = run.load_checkpoint(f"round-{number - 1:05d}").b
        kept = [one for one in read(run, number) if one.hospital != "hospital-2"]
        weights = [one.weight for one in kept]
        for key in wanted:
            changes = [one.b[key].astype(np.float64) - begun[key] for one in kept]
            wanted[key] = wanted[key] + np.average(changes, axis=0, weights=weights)
    found = Replay.open(run).of(["hospital-1", "hospital-3"])
    for key, value in found.items():
        np.testing.assert_allclose(value, wanted[key], rtol=1e-5, atol=1e-9)


def test_of_one_round_the_replay_is_the_run_that_never_had_it(tiny_config, in_process):
    """Both begin at the same B, so nothing of the hospital is left; over two rounds some is."""
    others = "hospital-1,hospital-3"
    for rounds, equal in ((1, True), (2, False)):
        config = {**KEEP, "federation__rounds": rounds}
        run = in_process(tiny_config(**config)).run
        never = in_process(tiny_config(**config, federation__only=others))
        assert {one.hospital for one in never.run.metrics("steps")} == {*others.split(",")}
        found = tensors_sha256(Replay.open(run).of(others.split(",")))
        assert (found == never.sha) is equal


def test_what_cannot_be_replayed_is_said(tiny_config, in_process, tmp_path):
    with pytest.raises(UserError, match=r"has not kept .* federation.keep-updates=true"):
        Replay.open(in_process(tiny_config()).run)
    momentum = in_process(tiny_config(**KEEP, federation__strategy="fedavgm"))
    with pytest.raises(UserError, match="aggregated by fedavgm"):
        Replay.open(momentum.run)
    run = in_process(tiny_config(**KEEP)).run
    other = in_process(tiny_config(**KEEP, train__seed=1)).run
    name = "updates/round-00002.safetensors"
    shutil.copy(other.path / name, run.path / name)
    with pytest.raises(Altered, match="do not make the run's B"):
        Replay.open(run)
    (run.path / name).unlink()
    with pytest.raises(UserError, match="no updates of round 2 of 2"):
        Replay.open(run)
