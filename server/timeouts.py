"""How long to wait for hospitals: sized from what was measured."""

from typing import Optional

from common.records import Record

LONGEST_SECONDS = 43_200.0 - 60.0
"""Flower ends a message after 12 hours."""
SHORTEST_SECONDS = 60.0
HANDSHAKE_SECONDS = 1_800.0
"""A handshake loads the backbone, nothing more."""
RECONNECT_SECONDS = 60.0
"""How long a resumed run waits for hospitals that an earlier process knew; then it goes on."""
SLACK = 5.0
"""A wait is this many times what was measured."""


class Pace(Record):
    """One measured exchange with the hospitals."""

    seconds: float
    """Until the last answer that was accepted."""
    steps: int
    """Most optimizer steps that one hospital took."""
    hospitals: int

    @staticmethod
    def slower(pace: Optional["Pace"], now: "Pace", *, timed_out: bool) -> "Pace":
        """Return what the next wait is sized from, after one more exchange.

        An exchange that hit its limit tells nothing of how long an answer takes: whoever hangs in
        every round must not make each wait a multiple of the one before.

        >>> slow, fast = (Pace(seconds=s, steps=1, hospitals=1) for s in (30.0, 10.0))
        >>> Pace.slower(fast, slow, timed_out=False).seconds
        30.0
        >>> Pace.slower(fast, slow, timed_out=True).seconds
        10.0
        """
        if pace is None or (now.seconds > pace.seconds and not timed_out):
            return now
        return pace

    @staticmethod
    def limit(pace: Optional["Pace"], *, steps: int, hospitals: int) -> float:
        """Return the longest wait for an exchange, in seconds.

        The measured time grows with a hospital's steps, and with the number of hospitals, which
        may share workers. Before anything was measured Flower's own limit holds.

        >>> Pace.limit(None, steps=10, hospitals=3)
        43140.0
        >>> Pace.limit(Pace(seconds=30.0, steps=10, hospitals=2), steps=20, hospitals=4)
        600.0
        """
        if pace is None:
            return LONGEST_SECONDS
        more = max(1.0, steps / pace.steps) * max(1.0, hospitals / pace.hospitals)
        return min(LONGEST_SECONDS, max(SHORTEST_SECONDS, SLACK * pace.seconds * more))
