"""One process at a time on a run directory."""

import contextlib
import fcntl
from collections.abc import Iterator

from common.errors import UserError
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
