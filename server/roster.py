"""Who takes part: nodes become hospitals by a handshake that compares fingerprints."""

import logging
import math
import time
from collections.abc import Callable, Collection, Iterable
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
PRESENCE_SECONDS = 2.0
"""How often a waiting server looks whether the asked nodes are still connected."""
OnMessage = Callable[[str, str, Message], None]
"""Called with direction (``down`` or ``up``), hospital and message."""
_log = logging.getLogger(__name__)


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

    A node that disconnects is not waited for.

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
    started = last_look = time.monotonic()
    while waiting:
        for reply in grid.pull_messages(sorted(waiting)):
            message_id = reply.metadata.reply_to_message_id
            if message_id not in waiting:
                continue
            waiting.discard(message_id)
            node = node_of[message_id]
            replies[node] = reply
            if not reply.has_error():
                on_message("up", names.get(node, "new"), reply)
        now = time.monotonic()
        if now - started > timeout_seconds:
            break
        if now - last_look > PRESENCE_SECONDS:
            connected, last_look = set(grid.get_node_ids()), now
            waiting = {one for one in waiting if node_of[one] in connected}
        if waiting:
            time.sleep(POLL_SECONDS)
    return replies


@dataclass
class Roster:
    """Hospitals that passed the handshake, by Flower node id, and those that were refused."""

    ours: Fingerprints
    plan: PrivacyPlan | None = None
    """With privacy on: what every hospital must have too, and no count may come with it."""
    names: dict[int, str] = field(default_factory=dict)
    hellos: dict[str, dict[str, Any]] = field(default_factory=dict)
    refused: dict[int, tuple[str, str]] = field(default_factory=dict)
    """Node id -> hospital (or ``node N``) and reason; a refused node is never asked again."""

    @property
    def known(self) -> int:
        """Number of hospitals that have shown up, refused ones included."""
        return len(self.hellos) + len(self.refused)

    def admit(
        self,
        grid: Grid,
        nodes: Collection[int],
        *,
        strict: bool,
        timeout_seconds: float,
        on_message: OnMessage,
    ) -> dict[str, str]:
        """Query the connected nodes that are not known yet.

        Args:
            grid: Flower's grid.
            nodes: Connected nodes.
            strict: Any problem ends the run; otherwise the node is left out.
            timeout_seconds: Longest wait for an answer.
            on_message: Told of every message in both directions.

        Returns:
            Hospital (or ``node N``) -> reason, of those left out.

        Raises:
            RunFailed: if ``strict`` and a node does not answer, fails, breaks the contract,
                carries another fingerprint, or claims the name of a connected hospital.
        """
        new = [node for node in nodes if node not in self.names and node not in self.refused]
        if not new:
            return {}
        replies = exchange(
            grid,
            {node: RecordDict({CONFIG: ConfigRecord({"round": 0})}) for node in new},
            kind="query",
            timeout_seconds=timeout_seconds,
            names=self.names,
            on_message=on_message,
        )
        left_out: dict[str, str] = {}
        for node in new:
            name = f"node {node}"
            try:
                hello = self._checked_hello(replies.get(node), timeout_seconds)
                name = str(hello["hospital"])
                self._enter(node, name, hello, nodes)
            except RunFailed as error:
                if strict:
                    raise
                left_out[name] = str(error)
                reply = replies.get(node)
                if reply is not None and not reply.has_error():
                    self.refused[node] = (name, str(error))
                _log.warning("%s is left out: %s", name, error)
        return left_out

    def _enter(
        self, node: int, hospital: str, hello: dict[str, Any], connected: Collection[int]
    ) -> None:
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
        before = next((old for old, name in self.names.items() if name == hospital), None)
        if before is not None and before in connected:
            raise RunFailed(f"two nodes call themselves {hospital}; fix: one node per hospital")
        if before is not None:
            del self.names[before]
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

    def connected(self, nodes: Iterable[int]) -> dict[str, int]:
        """Return hospital -> node of the admitted hospitals among the connected nodes."""
        return {self.names[node]: node for node in nodes if node in self.names}

    def choose(
        self, config: FederationConfig, server_round: int, connected: dict[str, int]
    ) -> tuple[list[int], int]:
        """Choose the hospitals of a round by name, from a stream of the federation's seed.

        All known hospitals are put in a seeded order; the first connected ones are asked, so a
        hospital that is away is replaced by the next. ``federation.only`` names the one to ask.

        Returns:
            The nodes to ask, in the order of their hospitals' names, and how many should be asked.

        Raises:
            RunFailed: if ``federation.only`` names no hospital.
        """
        if config.only:
            if config.only not in self.hellos:
                raise RunFailed(
                    f"federation.only={config.only}: the hospitals are {', '.join(self.hellos)}"
                )
            return [connected[name] for name in (config.only,) if name in connected], 1
        wanted = max(1, math.ceil(config.fraction * self.known - 1e-9))
        generator = stream(config.seed, "hospital-sampling", server_round)
        order = generator.permutation(sorted(self.hellos)).tolist()
        chosen = sorted([name for name in order if name in connected][:wanted])
        return [connected[name] for name in chosen], wanted
