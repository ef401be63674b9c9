"""Who takes part: nodes become hospitals by a handshake that compares fingerprints."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from common.config import FederationConfig
from common.errors import RunFailed
from common.exchange import (
    CONFIG,
    HELLO_REPLY,
    PRIVATE_HELLO_REPLY,
    ContractError,
    Fingerprints,
    check_scalars,
    only_record,
)
from common.privacy.plan import PrivacyPlan
from common.seeds import stream

POLL_SECONDS = 0.1
OnMessage = Callable[[str, str, Message], None]
"""Called with direction (``down`` or ``up``), hospital and message."""


def exchange(
    grid: Grid,
    contents: dict[int, RecordDict],
    *,
    kind: str,
    timeout_seconds: float,
    names: dict[int, str],
    on_message: OnMessage,
) -> dict[int, Message]:
    """Send one message per node and collect the replies that arrive in time.

    Args:
        grid: Flower's grid.
        contents: Node id -> content.
        kind: ``query``, ``train`` or ``evaluate``.
        timeout_seconds: Longest wait; also the messages' time to live.
        names: Node id -> hospital, for the record of messages.
        on_message: Told of every message in both directions.

    Returns:
        Node id -> reply; nodes that did not answer are absent.
    """
    node_of: dict[str, int] = {}
    for node, content in contents.items():
        message = Message(
            content=content, dst_node_id=node, message_type=kind, ttl=timeout_seconds + 60
        )
        on_message("down", names.get(node, "new"), message)
        for message_id in grid.push_messages([message]):
            node_of[message_id] = node
    waiting, replies = set(node_of), {}
    deadline = time.monotonic() + timeout_seconds
    while waiting and time.monotonic() < deadline:
        for reply in grid.pull_messages(sorted(waiting)):
            message_id = reply.metadata.reply_to_message_id
            waiting.discard(message_id)
            node = node_of[message_id]
            replies[node] = reply
            if not reply.has_error():
                on_message("up", names.get(node, "new"), reply)
        if waiting:
            time.sleep(POLL_SECONDS)
    return replies


@dataclass
class Roster:
    """Hospitals that passed the handshake, by Flower node id."""

    ours: Fingerprints
    plan: PrivacyPlan | None = None
    """With privacy on: what every hospital must have too, and no count may come with it."""
    names: dict[int, str] = field(default_factory=dict)
    hellos: dict[str, dict[str, Any]] = field(default_factory=dict)

    def admit(
        self, grid: Grid, nodes: Iterable[int], *, timeout_seconds: float, on_message: OnMessage
    ) -> None:
        """Query the nodes that are not known yet.

        Raises:
            RunFailed: if a node does not answer, fails, breaks the contract, carries another
                fingerprint, or claims the name of a hospital that is there already.
        """
        new = [node for node in nodes if node not in self.names]
        replies = exchange(
            grid,
            {node: RecordDict({CONFIG: ConfigRecord({"round": 0})}) for node in new},
            kind="query",
            timeout_seconds=timeout_seconds,
            names=self.names,
            on_message=on_message,
        )
        for node in new:
            hello = self._checked_hello(replies.get(node), timeout_seconds)
            hospital = str(hello["hospital"])
            if hospital in self.hellos:
                raise RunFailed(f"two nodes call themselves {hospital}; fix: one node per hospital")
            theirs = Fingerprints(
                a=str(hello["a-sha256"]),
                backbone=str(hello["backbone-sha256"]),
                source=str(hello["source-sha256"]),
            )
            self.ours.check(hospital, theirs)
            if self.plan and hello["privacy-plan-sha256"] != self.plan.fingerprint:
                raise RunFailed(
                    f"{hospital}: its privacy plan differs from the server's; "
                    "fix: give both sides the same [privacy] section"
                )
            self.names[node] = hospital
            self.hellos[hospital] = hello

    def _checked_hello(self, reply: Message | None, timeout_seconds: float) -> dict[str, Any]:
        if reply is None:
            raise RunFailed(f"a hospital did not answer the handshake in {timeout_seconds:.0f} s")
        if reply.has_error():
            raise RunFailed(f"a hospital failed in the handshake: {reply.error.reason}")
        try:
            allowed = PRIVATE_HELLO_REPLY if self.plan else HELLO_REPLY
            return check_scalars(only_record(reply.content, "config"), allowed)
        except ContractError as error:
            raise RunFailed(f"a hospital's handshake breaks the contract: {error}") from None

    def choose(self, config: FederationConfig, server_round: int) -> list[int]:
        """Return the nodes asked in a round, sampled by hospital name with a named seed."""
        by_name = {name: node for node, name in self.names.items()}
        hospitals = sorted(by_name)
        count = max(1, math.ceil(config.fraction * len(hospitals) - 1e-9))
        generator = stream(config.seed, "hospital-sampling", server_round)
        chosen = sorted(generator.choice(hospitals, size=count, replace=False).tolist())
        return [by_name[name] for name in chosen]
