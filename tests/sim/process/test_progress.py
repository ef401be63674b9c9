"""Progress lines: the time left is judged from the first piece on."""

import io
import math

import numpy as np
import pytest
from line_fixtures import privacy_line

from client.kept_state import STEPS, forget_steps
from common.config import Config
from common.files import append_json_line
from common.records.run import SavedFacts
from common.rundir import RunDirectory
from sim.cli.terminal import Terminal
from sim.process import progress
from sim.process.progress import SILENT, Console, Meter, RunProgress


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_time_left_ignores_start_up_and_earlier_processes(clock):
    shown = io.StringIO()
    meter = Meter(Terminal(file=shown), "local steps", 100)
    for seconds, done in ((50, 0), (100, 40), (120, 50)):
        clock[0] = seconds
        meter.update(done)
    lines = shown.getvalue().splitlines()
    # Nothing yet; forty steps of an earlier process; then ten steps took twenty seconds.
    assert lines == [
        "local steps 0/100",
        "local steps 40/100",
        "local steps 50/100, about 100 s left",
    ]


def test_a_private_round_shows_epsilon_and_no_loss(tmp_path):
    run = RunDirectory.create(Config(), directory=tmp_path / "run")
    shown = io.StringIO()
    with RunProgress(Terminal(file=shown, width=200), run, steps=4, rounds=2) as shows:
        for place, epsilon in ((1, 1.5), (2, math.inf)):
            for hospital, spent in (("hospital-1", epsilon), ("hospital-2", 0.5)):
                run.append("privacy.jsonl", privacy_line(place, hospital, spent))
            run.metric("round-seconds", 2.0, round=place)
            shows.tick()
    lines = shown.getvalue().splitlines()
    assert lines == ["round 1/2: epsilon 1.500 spent", "round 2/2: epsilon inf spent"]


def test_what_a_resumed_run_has_from_before_is_called_that(tmp_path):
    run = RunDirectory.create(Config(), directory=tmp_path / "run")
    run.metric("validation-loss", 3.0, round=0)
    run.metric("validation-loss", 2.0, round=1)
    run.save_checkpoint("round-0001", {"b": np.zeros(1, np.float32)}, facts=SavedFacts(round=1))
    run.metric("validation-loss", 9.0, round=2)
    shown = io.StringIO()
    with RunProgress(Terminal(file=shown, width=200), run, steps=4, rounds=2) as shows:
        shows.tick()
        run.forget_metrics(after=1)
        run.metric("validation-loss", 1.0, round=2)
        shows.tick()
    assert shown.getvalue().splitlines() == [
        "untrained: validation loss 3.0000 (from before)",
        "round 1/2: validation loss 2.0000 (from before)",
        "round 2/2: validation loss 1.0000",
    ]


def test_steps_of_earlier_attempts_count_as_done_and_not_for_the_pace(clock, tmp_path):
    run = RunDirectory.create(Config(), directory=tmp_path / "run")
    # Round 1 stays; round 2 was broken off after six steps, and comes again.
    run.save_checkpoint("round-0001", {"b": np.zeros(1, np.float32)}, facts=SavedFacts(round=1))
    folder = run.hospital("hospital-1")

    def take(server_round, first, steps):
        for step in range(first, first + steps):
            line = {"round": server_round, "step": step, "loss": 1.0, "seconds": 1.0}
            append_json_line(folder / STEPS, line)

    take(1, 1, 40)
    take(2, 41, 6)
    shown = io.StringIO()
    with RunProgress(Terminal(file=shown, width=200), run, steps=100, rounds=2) as shows:
        for moment, steps in ((100, 0), (200, 1), (220, 10)):
            clock[0] = moment
            if moment == 200:
                forget_steps(folder, from_round=2)
            take(2, 41, steps)
            shows.tick()
    # By hand: ten steps in the twenty seconds since the first of this attempt, and 49 are left.
    assert shown.getvalue().splitlines() == [
        "local steps 40/100",
        "local steps 41/100",
        "local steps 51/100, about 98 s left",
    ]


def test_a_start_names_its_phases_with_their_seconds_and_says_nothing_twice(clock, tmp_path):
    run = RunDirectory.create(Config(), directory=tmp_path / "run")
    shown = io.StringIO()
    with RunProgress(Terminal(file=shown, width=200), run, steps=4, rounds=2) as shows:
        for now, phase in ((0, "SuperLink"), (20, "SuperLink"), (40, "SuperLink"), (42, "Ray")):
            clock[0] = now
            shows.phase(phase)
            shows.tick()
        clock[0] = 50
        shows.phase("")
        shows.phase("")
        for clock[0] in (60, 80, 100):
            shows.tick()
    assert shown.getvalue().splitlines() == [
        "local steps 0/4, starting: SuperLink",
        "start: SuperLink 42.0 s",
        "start: Ray 8.0 s",
        "local steps 0/4",
    ]
    assert shows.start_seconds == {"SuperLink": 42.0, "Ray": 8.0}


@pytest.mark.parametrize("ends", [True, False])
def test_what_a_phase_leads_to_is_told_after_it_or_when_the_start_breaks_off(ends, clock, tmp_path):
    run = RunDirectory.create(Config(), directory=tmp_path / "run")
    shown = io.StringIO()
    with RunProgress(Terminal(file=shown, width=200), run, steps=4, rounds=2) as shows:
        shows.phase("first loss")
        run.metric("validation-loss", 3.0, round=0)
        shows.tick()
        if ends:
            shows.phase("")
            shows.tick()
    over = ["start: first loss 0.0 s"] if ends else []
    assert shown.getvalue().splitlines() == [*over, "untrained: validation loss 3.0000"]


def test_work_tells_whoever_it_is_handed_or_nobody(clock, capsys):
    class Heard(Console):
        lines: tuple[object, ...] = ()

        def say(self, *parts: object, style: str = "", error: bool = False) -> None:
            self.lines += parts

    heard = Heard()
    for console in (SILENT, heard):
        with Meter(console, "steps", 4) as meter:
            clock[0] += 60
            meter.update(2)
    assert heard.lines == ("steps 2/4",)
    assert capsys.readouterr() == ("", "")
