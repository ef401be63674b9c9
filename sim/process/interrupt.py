"""Ctrl-C and SIGTERM that wait for a safe moment."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """The person or the system asked for an end, and the work is in a state worth saving."""


class Stop:
    """Whether an end was asked for."""

    def __init__(self) -> None:
        self.asked = False

    def check(self) -> None:
        """End here if an end was asked for.

        Raises:
            Stopped: at a moment that the caller has chosen as safe.
        """
        if self.asked:
            raise Stopped


@contextlib.contextmanager
def deferred_stop() -> Iterator[Stop]:
    """Turn the first Ctrl-C or SIGTERM into a flag; a second one ends at once.

    Outside the main thread signals cannot be caught, and nothing changes.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(_number: int, _frame: FrameType | None) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
