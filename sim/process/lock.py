"""One process at a time on a run directory."""

import contextlib
from collections.abc import Iterator

from common.errors import UserError
from common.files import locked
from common.rundir import LOCK, RunDirectory


@contextlib.contextmanager
def exclusive(run: RunDirectory) -> Iterator[None]:
    """Keep other processes off a run; the system frees it, however this process ends.

    Raises:
        UserError: if another process is at work on it.
    """
    busy = UserError(f"another process is at work on {run.path}", fix="wait for it, or end it")
    with locked(run.path / LOCK, refusal=busy):
        yield
