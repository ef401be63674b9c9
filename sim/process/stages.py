"""How far a run has come when something fails, in one line that says how to go on.

What was trained is never lost in words: a failure after training says that training is done, where
B is, what failed and the command that goes on. What is nobody's input (a newer library, a full
disk) leaves its traceback in a file that the line names.
"""

import contextlib
import datetime
import os
import shlex
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from common.data.handling import CREDENTIALED, handling_of
from common.errors import DiskFull, FedrxError, RunFailed, UserError
from common.evaluation.judge.gate import source_of_run
from common.rundir import TRAINED, RunDirectory

TRAINING, EVALUATION, REPORT = "training", "evaluation", "report"
AFTER_TRAINING = {TRAINED: "the answers", EVALUATION: "the answers", REPORT: "the report"}
"""Stages of status.json in which training is done, and what they are about."""
ERROR_LOG = "error.log"
LONGEST_TEXT = 300


class StageFailed(RunFailed):
    """A run's work failed after a stage that is worth keeping.

    Args:
        what: What is done, where it is, what failed and why.
        command: What goes on from there.
    """

    def __init__(self, what: str, *, command: str) -> None:
        self.what, self.command = what, command
        super().__init__(f"{what}; go on with: {command}")

    def going_on(self, command: str) -> "StageFailed":
        """Return the same failure for the run around this one, which has a command of its own."""
        return StageFailed(self.what, command=command)


def resume_command(run: RunDirectory) -> str:
    """Return the command that goes on with a run."""
    return f"fedrx resume {shlex.quote(str(run.path))}"


def is_trained(run: RunDirectory) -> bool:
    """Tell whether a run's training is done and summed up, whatever came after it."""
    status = run.status()
    done = status["state"] == "finished" or status.get("stage") in AFTER_TRAINING
    return done and "b_sha256" in run.read_json("summary.json")


@contextlib.contextmanager
def reported(
    run: RunDirectory, console: Console, where: Callable[[], dict[str, Any]] = dict
) -> Iterator[None]:
    """Work on a run that is held alone; where that fails or is interrupted, status.json says so.

    Args:
        run: The run's directory.
        console: Where a person is told how to go on after an interruption.
        where: How far the run has come, for status.json.

    Raises:
        StageFailed: for what fails after training, and for what is nobody's input.
    """
    try:
        yield
    except KeyboardInterrupt:
        with contextlib.suppress(OSError, ValueError, FedrxError):
            run.write_status("interrupted", stage=_stage(run), **_facts(where))
        console.print(f"go on with: {resume_command(run)}", markup=False, highlight=False)
        raise
    except Exception as error:
        failure = _failure(run, error)
        # On a full disk the old status stays; the line is what counts.
        with contextlib.suppress(OSError, ValueError, FedrxError):
            if run.status()["state"] != "finished":
                told = failure.what if isinstance(failure, StageFailed) else str(failure)
                run.write_status("failed", stage=_stage(run), **_facts(where), error=told)
        if failure is error:
            raise
        raise failure from error


@contextlib.contextmanager
def after_training(run: RunDirectory, what: str, command: str) -> Iterator[None]:
    """Work on a trained run by a command of its own; input that a person can mend passes as it is.

    Args:
        run: The run's directory.
        what: What is done, such as ``the judge``.
        command: The command, without the run.

    Raises:
        StageFailed: for everything else.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        text = f"{_kept(run)}; {what} failed: {_described(run, error, _source(run))}"
        raise StageFailed(text, command=f"{command} {shlex.quote(str(run.path))}") from error


def unexpected(error: Exception) -> str:
    """Return the line about an error outside of any run; its traceback goes to a file.

    The data's terms are not known here, so the text that may quote it stays in the file.
    """
    return _described(None, error, CREDENTIALED)


def _failure(run: RunDirectory, error: Exception) -> FedrxError:
    if isinstance(error, StageFailed):
        return error.going_on(resume_command(run))
    stage = _stage(run)
    if stage in AFTER_TRAINING:
        what = f"{_kept(run)}; {AFTER_TRAINING[stage]} failed"
    elif isinstance(error, FedrxError) and not isinstance(error, DiskFull):
        return error
    else:
        what = "training failed"
    text = f"{what}: {_described(run, error, _source(run))}"
    return StageFailed(text, command=resume_command(run))


def _facts(where: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return how far a run has come, if that can still be read."""
    with contextlib.suppress(OSError, ValueError, FedrxError):
        return where()
    return {}


def _stage(run: RunDirectory) -> str:
    """Return the stage that a run is in; of a finished one the report was the last."""
    with contextlib.suppress(OSError, ValueError, FedrxError):
        status = run.status()
        return REPORT if status["state"] == "finished" else str(status.get("stage", TRAINING))
    return TRAINING


def _kept(run: RunDirectory) -> str:
    names = run.checkpoint_names()
    place = run.path / "checkpoints" / names[-1] / "b.safetensors" if names else f"below {run.path}"
    return f"training is done, B is {'in ' if names else ''}{place}"


def _source(run: RunDirectory) -> str:
    with contextlib.suppress(OSError, ValueError, FedrxError):
        return source_of_run(run.read_json("summary.json"), run.read_json("data.json"))
    return CREDENTIALED


def _described(run: RunDirectory | None, error: Exception, source: str) -> str:
    """Say what went wrong without anything of credentialed data, and where the traceback is."""
    if isinstance(error, FedrxError):
        return str(error)
    kind = type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        text = f"{kind}: {error.strerror}" + (f": {error.filename}" if error.filename else "")
    elif not handling_of(source).is_open:
        frames = traceback.extract_tb(error.__traceback__)
        where = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
        text = f"{kind}{where}"
    else:
        text = " ".join(f"{kind}: {error}".split())[:LONGEST_TEXT]
    log = _write_log(run, error)
    return f"{text}; traceback in {log}" if log else f"{text}; its traceback could not be written"


def _write_log(run: RunDirectory | None, error: Exception) -> Path | None:
    """Append the traceback to the run's log, else to a temporary file; only its owner may read."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    text = f"{now}\n{''.join(traceback.format_exception(error))}\n"
    places = [run.path / ERROR_LOG] if run is not None else []
    for file in (*places, None):
        with contextlib.suppress(OSError):
            if file is None:
                handle, name = tempfile.mkstemp(prefix="fedrx-error-", suffix=".log")
                os.close(handle)
                file = Path(name)
            file.touch(mode=0o600)
            with file.open("a", encoding="utf-8", errors="backslashreplace") as stream:
                stream.write(text)
            return file
    return None
