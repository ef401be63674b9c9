"""Messages over Flower's grid: sent, waited for, recorded."""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from common.errors import RunFailed
from common.records.run import Direction
from common.rundir import WIRE, RunDirectory
from common.wire.contract import LONGEST_REASON, ContractError, describe, shortened
from server.clock import Clock

POLL_SECONDS = 0.1
PRESENCE_SECONDS = 2.0
"""How often a waiting server looks whether the asked nodes are still connected."""
OnMessage = Callable[[str, Direction, str, Message], None]
"""Called with kind, direction (``down`` or ``up``), hospital and message."""


@dataclass(frozen=True, kw_only=True)
class Replies:
    """What came back of one exchange."""

    messages: dict[int, Message]
    """Node id -> reply; nodes that did not answer are absent."""
    seconds: dict[int, float]
    """Node id -> how long after the sending its reply came."""
    timed_out: bool
    """Whether somebody was waited for until the end."""


def exchange(
    grid: Grid,
    contents: dict[int, RecordDict],
    *,
    kind: str,
    timeout_seconds: float,
    names: dict[int, str],
    on_message: OnMessage,
    clock: Clock = time,
) -> Replies:
    """Send one message per node and collect the replies that arrive in time.

    A node that disconnects is not waited for.

    ``timeout_seconds`` is also the messages' time to live, a minute added.
    """
    node_of: dict[str, int] = {}
    for node, content in contents.items():
        message = Message(
            content=content, dst_node_id=node, message_type=kind, ttl=timeout_seconds + 60
        )
        on_message(kind, "down", names.get(node, "new"), message)
        node_of |= dict.fromkeys(grid.push_messages([message]), node)
    waiting = set(node_of)
    replies: dict[int, Message] = {}
    seconds: dict[int, float] = {}
    timed_out = False
    started = last_look = clock.monotonic()
    while waiting:
        connected = None
        if clock.monotonic() - last_look > PRESENCE_SECONDS:
            connected, last_look = set(grid.get_node_ids()), clock.monotonic()
        # After the look: who has gone by then may have answered before.
        for reply in grid.pull_messages(sorted(waiting)):
            message_id = reply.metadata.reply_to_message_id
            if message_id not in waiting:
                continue
            waiting.discard(message_id)
            node = node_of[message_id]
            replies[node], seconds[node] = reply, clock.monotonic() - started
            if not reply.has_error():
                on_message(kind, "up", names.get(node, "new"), reply)
        if connected is not None:
            waiting = {one for one in waiting if node_of[one] in connected}
        if waiting and clock.monotonic() - started > timeout_seconds:
            timed_out = True
            break
        if waiting:
            clock.sleep(POLL_SECONDS)
    return Replies(messages=replies, seconds=seconds, timed_out=timed_out)


@dataclass(frozen=True)
class Recorder:
    """Writes one line per message: direction, hospital, round, kind, tensors, scalars, bytes."""

    run: RunDirectory
    server_round: int
    tensors: Collection[str]
    """Names that tensors may have."""

    def __call__(self, kind: str, direction: Direction, hospital: str, message: Message) -> None:
        """Record one message."""
        line = describe(
            *(message, self.tensors),
            direction=direction,
            hospital=hospital,
            server_round=self.server_round,
            kind=kind,
        )
        self.run.append(WIRE, line)


def answered(reply: Message | None) -> Message:
    """Return the reply if there is one with content.

    Raises:
        ContractError: if the hospital did not answer in time or failed.
    """
    if reply is None:
        raise ContractError("no answer in time")
    if reply.has_error():
        raise ContractError(f"failed: {shortened(reply.error.reason, LONGEST_REASON)}")
    return reply


def require(
    good: int, needed: int, wanted: int, server_round: int, failures: dict[str, str]
) -> None:
    """Raise RunFailed with every failed hospital's reason if too few have answered."""
    if good < needed:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in sorted(failures.items()))
        raise RunFailed(
            f"round {server_round}: {good} of {wanted} hospitals answered, "
            f"the quorum is {needed}; {reasons or 'the others are not connected'}"
        )
