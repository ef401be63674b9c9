"""Progress lines: the time left is judged from the first piece on."""

import io

import pytest
from rich.console import Console

from sim import progress
from sim.progress import Meter


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_time_left_ignores_start_up_and_earlier_processes(clock):
    shown = io.StringIO()
    meter = Meter(Console(file=shown), "local steps", 100)
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
