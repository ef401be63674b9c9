"""The clock that the server waits by."""

from typing import Protocol


class Clock(Protocol):
    """What the server needs of ``time``, which is the clock unless another is handed in."""

    def monotonic(self) -> float:
        """Return seconds since some moment that stays the same."""

    def sleep(self, seconds: float, /) -> None:
        """Wait."""
