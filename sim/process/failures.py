"""A failure in one line; what is nobody's input leaves its traceback in a file that the line names.

Nothing of credentialed data is in the line.
"""

import contextlib
import datetime
import os
import tempfile
import traceback
from pathlib import Path

from common.data.handling import CREDENTIALED, handling_of
from common.errors import FedrxError, RunFailed
from common.evaluation.judge.gate import source_of_run
from common.rundir import RunDirectory

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


def described(error: Exception, run: RunDirectory | None) -> str:
    """Say what went wrong without anything of credentialed data, and where the traceback is.

    Outside of any run the data's terms are not known: the text that may quote it stays in the file.
    """
    if isinstance(error, FedrxError):
        return str(error)
    kind = type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        text = f"{kind}: {error.strerror}" + (f": {error.filename}" if error.filename else "")
    elif not handling_of(_source(run)).is_open:
        frames = traceback.extract_tb(error.__traceback__)
        where = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
        text = f"{kind}{where}"
    else:
        text = " ".join(f"{kind}: {error}".split())[:LONGEST_TEXT]
    log = _write_log(error, run)
    return f"{text}; traceback in {log}" if log else f"{text}; its traceback could not be written"


def _source(run: RunDirectory | None) -> str:
    with contextlib.suppress(OSError, ValueError, FedrxError):
        if run is not None:
            return source_of_run(run)
    return CREDENTIALED


def _write_log(error: Exception, run: RunDirectory | None) -> Path | None:
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
