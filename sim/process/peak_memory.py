"""Peak memory of a run: this process and everything it started, sampled."""

import contextlib
import time

import psutil

SAMPLE_SECONDS = 1.0
LARGEST_SHARE = 0.01
"""Of the time may be spent on sampling: the kernel walks a process's pages and holds up its own
allocations meanwhile."""


class PeakMemory:
    """Largest sum of proportional set sizes seen, in bytes.

    Shared pages are counted once (PSS) where the system tells, else resident sizes are added up.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._next = 0.0

    def tick(self) -> None:
        """Take a sample, at most one a second, and rarer where samples take long."""
        started = time.monotonic()
        if started < self._next:
            return
        own = psutil.Process()
        total = 0
        for process in [own, *own.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                total += _size(process)
        self.bytes = max(self.bytes, total)
        ended = time.monotonic()
        self._next = ended + max(SAMPLE_SECONDS, (ended - started) / LARGEST_SHARE)


def _size(process: psutil.Process) -> int:
    """Return a process's proportional set size, or its resident size."""
    sizes = process.memory_full_info()
    return int(getattr(sizes, "pss", sizes.rss))
