"""What a Flower node is to the server: a hospital, or left out and why, so far or for good."""

from dataclasses import dataclass

from common.wire.handshake import Handshake


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node that was asked for its handshake."""

    name: str
    """The hospital, or ``node N`` where it has not said."""

    def due(self, server_round: int, now: float) -> bool:
        """Return whether it is asked (again) in this round, at this moment of the clock."""
        return False


@dataclass(frozen=True, kw_only=True)
class Admitted(Node):
    """A hospital: its handshake was accepted."""

    handshake: Handshake


@dataclass(frozen=True, kw_only=True)
class LeftOut(Node):
    """A node that is no hospital of the run; as it is here for good."""

    reason: str
    impostor: bool = False
    """It is no hospital of this deployment, and counts as none."""


@dataclass(frozen=True, kw_only=True)
class Retried(LeftOut):
    """A node that is left out so far; asked anew when it reconnects, and else ever more rarely."""

    tries: int
    """How often it was asked since it connected."""


@dataclass(frozen=True, kw_only=True)
class Silent(Retried):
    """A connected node that has let the whole wait for its handshake pass.

    The n-th try after that comes ``2**n`` rounds later and waits a ``2**n``-th of the limit, so
    that a node that never answers costs less than twice the limit in all.
    """

    asked_in: int
    """Round in which it was asked last."""

    def due(self, server_round: int, now: float) -> bool:
        """Return whether it is asked again in this round.

        >>> silent = Silent(name="node 1", reason="", tries=2, asked_in=1)
        >>> [n for n in range(8) if silent.due(n, 0.0)]
        [5, 6, 7]
        """
        return not self.tries or server_round >= self.asked_in + 2**self.tries


@dataclass(frozen=True, kw_only=True)
class Erring(Retried):
    """A connected node that answers with an error: asked again after 1, 2, 4, ... seconds."""

    asked_at: float
    """When it was asked last, by the clock's ``monotonic``."""

    def due(self, server_round: int, now: float) -> bool:
        """Return whether it is asked again.

        >>> erring = Erring(name="node 1", reason="", tries=3, asked_at=1)
        >>> [n for n in range(8) if erring.due(0, n)]
        [5, 6, 7]
        """
        return not self.tries or now >= self.asked_at + 2 ** (self.tries - 1)
