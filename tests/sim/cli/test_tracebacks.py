"""Which tracebacks of its hospitals a failed attempt shows."""

from io import StringIO
from types import SimpleNamespace

import pytest
from rich.console import Console

import sim.runs.federate
from common.config import Config
from common.errors import RunFailed
from common.rundir import RunDirectory
from sim.runs.federate import go_on


@pytest.mark.parametrize("source", ["synthetic", "credentialed"])
def test_an_attempt_shows_its_own_tracebacks_alone(tmp_path, monkeypatch, capsys, source):
    run = RunDirectory.create(Config(), directory=tmp_path / "run")
    errors = run.path / "hospitals" / "errors.txt"
    errors.parent.mkdir()

    for attempt in ("first attempt\n", "second attempt\n"):

        def fail(*args, attempt=attempt, **keys) -> None:
            with errors.open("a") as file:
                file.write(attempt)
            raise RunFailed("a hospital failed")

        monkeypatch.setattr(sim.runs.federate, "train_and_answer", fail)
        preparation = SimpleNamespace(table=SimpleNamespace(source=source))
        with pytest.raises(RunFailed):
            go_on(run, Config(), preparation, Console(file=StringIO()), started=0.0)
        shown = attempt if source == "synthetic" else ""
        assert capsys.readouterr().err == shown
