"""Which tracebacks of its hospitals a failed attempt shows."""

from types import SimpleNamespace

import pytest

from common.config import Config
from common.errors import RunFailed
from common.records.run import RunRecord
from common.rundir import RunDirectory
from sim.cli.terminal import Terminal
from sim.runs import federate
from sim.runs.lifecycle import Run


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

        monkeypatch.setattr(federate, "train_rounds", fail)
        prepared = SimpleNamespace(data=SimpleNamespace(source=source))
        kind, console = federate.Federation(), Terminal(quiet=True)
        record = RunRecord(mode="federation", resumable=True)
        with pytest.raises(RunFailed):
            Run(kind, run, record, Config(), prepared, console, [], 0.0).live(inside=False)
        shown = attempt if source == "synthetic" else ""
        assert capsys.readouterr().err == shown
