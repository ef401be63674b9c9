"""When the launcher takes a run as ended, and what it asks Flower for."""

import socket
from types import SimpleNamespace

import pytest

from common.config import Config
from common.rundir import RunDirectory
from sim.flower import superlink


@pytest.fixture
def run(tmp_path):
    return RunDirectory.create(Config(), directory=tmp_path / "run")


class Link:
    """A SuperLink that runs, and a Flower that answers in turn."""

    def __init__(self, *states: str, ended: int | None = None) -> None:
        self.states = list(states)
        self.process = SimpleNamespace(poll=lambda: ended)

    def state(self) -> tuple[str, str]:
        return self.states.pop(0), "why"


def test_our_server_s_sum_is_the_end_and_flower_is_not_asked(run):
    run.write_status("running", stage="trained", round=2)
    assert superlink._watch(Link(), run, lambda: None) == ("finished:completed", "")


def test_a_server_that_failed_ends_when_flower_says_so(run, monkeypatch):
    monkeypatch.setattr(superlink.time, "sleep", lambda seconds: None)
    run.write_status("failed", error="no quorum")
    link = Link("running", "finished:failed")
    assert superlink._watch(link, run, lambda: None) == ("finished:failed", "why")
    assert link.states == []


def test_a_simulation_that_is_gone_is_asked_about(run, monkeypatch):
    """The server has said nothing: it was killed, say."""
    monkeypatch.setattr(superlink, "CHECK_SECONDS", -1)
    monkeypatch.setattr(superlink.time, "sleep", lambda seconds: None)
    simulating = iter([True, True, False, False])
    monkeypatch.setattr(superlink, "_is_simulating", lambda: next(simulating))
    link = Link("running", "finished:stopped")
    run.write_status("running", round=1)
    assert superlink._watch(link, run, lambda: None)[0] == "finished:stopped"
    assert list(simulating) == []


def test_a_superlink_that_ended_is_the_end(run):
    run.write_status("running", round=1)
    link = Link(ended=1)
    assert superlink._watch(link, run, lambda: None) == ("stopped", "the SuperLink ended")


def test_a_free_port_is_kept_for_whom_it_is_named():
    """The system refuses it to others; servers, which ask for it with SO_REUSEADDR, have it."""
    port = superlink.free_port()
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))
    assert superlink.free_port() != port
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", port))
        server.listen()
