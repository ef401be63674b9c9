"""A file that is only appended to, held by one process, each line on the disk when it counts.

What was spent must be known before anything is released: a line is one write and one fsync.
"""

import os
from pathlib import Path

from common.errors import RunFailed
from common.files import needing_room


def read(handle: int) -> str:
    """Return the whole text; bytes that are none are replaced."""
    return os.pread(handle, os.fstat(handle).st_size, 0).decode("utf-8", errors="replace")


def append(handle: int, line: str, path: Path, doubt: type[RunFailed], what: str) -> None:
    """Write one line with its end and wait until it is on the disk.

    Raises:
        RunFailed: of kind ``doubt``, if not all of it was written; ``what`` names the file.
    """
    with needing_room(path.name):
        if os.write(handle, line.encode()) != len(line.encode()):
            raise doubt(f"{what}: short write; nothing is released")
        os.fsync(handle)
