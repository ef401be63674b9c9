"""kill -9 of the whole process group, and ``fedrx resume``, until the run is through."""

import io
import os
import signal
import subprocess

import pytest
from waiting import until

from common.errors import UserError
from sim.cli.terminal import Terminal
from sim.runs.resume import resume

pytestmark = pytest.mark.ray
GONE_SECONDS = 60
"""At the most, on a machine that is shared; 0.3 were measured."""


def handshake_begun(run):
    return (run.path / "wire.jsonl").exists()


def in_the_first_round(run):
    return any(run.path.glob("hospitals/*/steps.jsonl"))


def in_the_second_round(run):
    done = run.checkpoint_names()[-1:] == ["round-00001"]
    return done and any(run.path.glob("hospitals/*/state-00002.safetensors"))


def trained(run):
    return run.checkpoint_names()[-1:] == ["round-00002"]


MOMENTS = (handshake_begun, in_the_first_round, in_the_second_round, trained)


def test_killed_at_four_moments_the_run_ends_in_the_same_b(base, laboratory):
    """Each resumption is killed at the next moment; the last one ends as if nothing had been."""
    started = laboratory.start("killed", federation__workers=1)
    for moment in MOMENTS:
        started.wait_until(moment)
        os.killpg(started.process.pid, signal.SIGKILL)
        started.wait()
        assert started.code == -signal.SIGKILL
        # SuperLink and Ray go along: an actor that trained on would hold its GPU.
        until(lambda one=started: not one.left(), "nothing is left", GONE_SECONDS)
        assert started.run.status().state != "finished"
        started = laboratory.resume(started.run)
    started.wait()
    assert started.code == 0, started.error
    summary = started.summary
    assert started.run.status().state == "finished"
    assert summary["b_sha256"] == base.summary["b_sha256"]
    assert summary["validation_loss"] == base.summary["validation_loss"]
    assert summary["workers"] == summary["backbone_loads"] == 1
    assert started.left() == []
    # What earlier processes spent on the rounds counts too.
    spent = sum(event.value for event in started.run.metrics("round-seconds"))
    assert spent <= summary["training_seconds"] <= summary["seconds"]
    for name in ("train-loss", "weight", "steps"):
        assert events(started, name) == events(base, name)


def events(started, name):
    return [(e.round, e.hospital, e.value) for e in started.run.metrics(name)]


def test_changed_configuration_is_refused_with_the_difference(base):
    before = base.summary
    with pytest.raises(UserError, match=r"train\.learning-rate: 0\.02 -> 0\.5"):
        resume(base.run.path, ["train.learning-rate=0.5"], command_line=[])
    assert base.summary == before


def test_finished_run_is_left_alone(base, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: 1 / 0)
    shown = io.StringIO()
    again = resume(base.run.path, console=Terminal(file=shown), command_line=[])
    assert again == base.summary
    assert "nothing to do" in shown.getvalue()
