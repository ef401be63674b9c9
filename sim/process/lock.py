"""One process at a time on a run directory, and how its work ended."""

import contextlib
import fcntl
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console

from common.errors import FedrxError, UserError
from common.rundir import RunDirectory


@contextlib.contextmanager
def exclusive(run: RunDirectory) -> Iterator[None]:
    """Keep other processes off a run; the system frees it, however this process ends.

    Raises:
        UserError: if another process is at work on it.
    """
    with (run.path / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"another process is at work on {run.path}", fix="wait for it, or end it"
            ) from None
        yield


@contextlib.contextmanager
def reported(
    run: RunDirectory, console: Console, where: Callable[[], dict[str, Any]] = dict
) -> Iterator[None]:
    """Work on a run that is held alone; where that fails or is interrupted, status.json says so.

    Args:
        run: The run's directory.
        console: Where a person is told how to go on after an interruption.
        where: How far the run has come, for status.json.
    """
    try:
        yield
    except KeyboardInterrupt:
        run.write_status("interrupted", **where())
        console.print(f"go on with: fedrx resume {run.path}", markup=False, highlight=False)
        raise
    except Exception as error:
        text = str(error) if isinstance(error, FedrxError) else type(error).__name__
        run.write_status("failed", **where(), error=text)
        raise
