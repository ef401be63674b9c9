"""A federation's SuperLink comes up while data is read, and is gone before the answers."""

import contextlib
import io

import pytest
from rich.console import Console

from common.errors import FedrxError, UserError
from common.rundir import RunDirectory
from sim.runs import federate, lifecycle
from sim.runs.federate import Federation

QUIET = Console(file=io.StringIO())


@pytest.fixture
def told(monkeypatch):
    """What begins and ends, in order; nothing of Flower is started."""
    events = []

    @contextlib.contextmanager
    def link(place, port):
        events.append(f"SuperLink of {place.name}")
        try:
            yield "link"
        finally:
            events.append("no SuperLink")

    def answers(*_args, **_keys):
        events.append("answers")
        raise UserError("enough")

    def rounds(link, config, run, *, on_phase, **_keys):
        events.append(f"rounds by the {link}")
        on_phase("")
        run.write_json("summary.json", {"b_sha256": "0"})
        run.write_status("running", stage="trained", round=2)

    prepare = Federation.prepare

    def prepared(*args):
        events.append("preparation")
        return prepare(*args)

    monkeypatch.setattr(federate, "superlink", link)
    monkeypatch.setattr(federate, "run_flower", rounds)
    monkeypatch.setattr(lifecycle, "evaluate_run", answers)
    monkeypatch.setattr(Federation, "prepare", prepared)
    return events


def begin(config, folder):
    with pytest.raises(FedrxError):
        federate.federate(config, console=QUIET, command_line=["fedrx"], run_dir=folder)


def test_the_superlink_is_there_for_preparation_and_rounds_alone(told, tiny_config, tmp_path):
    begin(tiny_config(run__backend="ray"), tmp_path / "run")
    assert told == [
        *("SuperLink of run", "preparation", "rounds by the link", "no SuperLink", "answers")
    ]
    start = RunDirectory.open(tmp_path / "run").summary().start_seconds
    assert list(start) == ["preparation"]
    assert start["preparation"] > 0


def test_it_ends_with_what_the_preparation_refuses(told, tiny_config, tmp_path):
    begin(tiny_config(run__backend="ray", data__path=str(tmp_path)), tmp_path / "run")
    assert told == ["SuperLink of run", "preparation", "no SuperLink"]
    assert not (tmp_path / "run").exists()


def test_answers_of_a_trained_run_start_none(told, tiny_config, tmp_path):
    begin(tiny_config(run__backend="ray"), tmp_path / "run")
    told.clear()
    with pytest.raises(FedrxError):
        lifecycle.resume(
            tmp_path / "run", kinds=[Federation], console=QUIET, command_line=["fedrx"]
        )
    assert told == ["preparation", "answers"]
