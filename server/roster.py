"""Who takes part: nodes become hospitals by a handshake that compares fingerprints."""

import logging
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from common.config import FederationConfig
from common.errors import RunFailed
from common.privacy.plan import PrivacyPlan
from common.seeds import stream
from common.wire.cohort import sampled
from common.wire.contract import (
    CONFIG,
    LONGEST_REASON,
    ContractError,
    Fingerprints,
    only_record,
    shortened,
)
from common.wire.handshake import check_hello, claimed_name
from common.wire.identity import NONCE, Impostor, check_signature, new_nonce
from server.clock import Clock
from server.messages import OnMessage, exchange

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Mute:
    """A connected node that has let the whole wait for its handshake pass.

    The n-th try after that comes ``2**n`` rounds later and waits a ``2**n``-th of the limit, so
    that a node that never answers costs less than twice the limit in all.
    """

    tries: int
    """How often it was asked."""
    asked_in: int
    """Round in which it was asked last."""

    def due(self, server_round: int) -> bool:
        """Return whether it is asked again in this round.

        >>> [n for n in range(8) if Mute(tries=2, asked_in=1).due(n)]
        [5, 6, 7]
        """
        return bool(server_round >= self.asked_in + 2**self.tries)


@dataclass(frozen=True, kw_only=True)
class Failing:
    """A connected node whose handshake fails: asked again after 1, 2, 4, ... seconds."""

    tries: int
    """How often it was asked."""
    asked_at: float
    """When it was asked last, by the clock's ``monotonic``."""

    def due(self, now: float) -> bool:
        """Return whether it is asked again.

        >>> [n for n in range(8) if Failing(tries=3, asked_at=1).due(n)]
        [5, 6, 7]
        """
        return bool(now >= self.asked_at + 2 ** (self.tries - 1))


@dataclass
class Roster:
    """Hospitals that passed the handshake, by Flower node id, and those that were refused."""

    ours: Fingerprints
    plan: PrivacyPlan | None = None
    """With privacy on: what every hospital must have too, and no count may come with it."""
    keys: Mapping[str, EllipticCurvePublicKey] | None = None
    """In a deployment: hospital -> the key that its handshake must be signed with."""
    names: dict[int, str] = field(default_factory=dict)
    hellos: dict[str, dict[str, Any]] = field(default_factory=dict)
    refused: dict[int, tuple[str, str]] = field(default_factory=dict)
    """Node id -> hospital (or ``node N``) and reason; a refused node is never asked again."""
    impostors: set[int] = field(default_factory=set)
    """Refused nodes that are no hospital of this deployment, and count as none."""
    mute: dict[int, Mute] = field(default_factory=dict)
    """Nodes that are connected and have not answered."""
    failing: dict[int, Failing] = field(default_factory=dict)
    """Nodes that are connected and have answered with a failure."""
    problems: dict[int, tuple[str, str]] = field(default_factory=dict)
    """Node id -> hospital (or ``node N``) and reason, of those that are left out so far."""
    of: int = 0
    """How many hospitals there are, by their own account; 0: not settled yet."""
    remembered: frozenset[str] = frozenset()
    """After a resume: the hospitals that were admitted before it, some of which may be away."""
    known_before: int = 0
    """After a resume: ``known`` before it."""
    clock: Clock = time

    @property
    def admitted(self) -> list[str]:
        """The hospitals that were ever admitted, in the order of their names."""
        return sorted(self.remembered | set(self.hellos))

    @property
    def arrived(self) -> int:
        """Number of hospitals that have shown up in this process, refused ones included.

        A second node under an admitted hospital's name is none.
        """
        return len(self._names_here)

    @property
    def known(self) -> int:
        """Number of hospitals that have ever shown up, refused ones included; at most ``of``."""
        known = max(self.known_before, len(self.remembered | self._names_here))
        return min(known, self.of) if self.of else known

    @property
    def _names_here(self) -> set[str]:
        refused = {name for node, (name, _) in self.refused.items() if node not in self.impostors}
        return {*self.hellos, *refused}

    def can_go_on(self, needed: int) -> bool:
        """Return whether somebody is here and enough were known before a resume."""
        return bool(self.hellos) and self.known >= needed

    def facts(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: who was admitted, and how many had shown up."""
        return {"hospitals": self.admitted, "known": self.known, "of": self.of}

    def remember(self, facts: Mapping[str, Any]) -> None:
        """Take over what ``facts`` returned before a resume."""
        self.remembered = frozenset(facts["hospitals"])
        self.known_before, self.of = int(facts["known"]), int(facts["of"])

    def admit(
        self,
        grid: Grid,
        nodes: Collection[int],
        *,
        server_round: int,
        strict: bool,
        timeout_seconds: float,
        on_message: OnMessage,
    ) -> dict[str, str]:
        """Query the connected nodes that are not known yet.

        One that did not answer, or failed, is asked anew when it reconnects, and else ever more
        rarely.

        Args:
            grid: Flower's grid.
            nodes: Connected nodes.
            server_round: The round that is about to start; 0 before the first.
            strict: Any problem ends the run; otherwise the node is left out.
            timeout_seconds: Longest wait for an answer.
            on_message: Told of every message in both directions.

        Returns:
            Hospital (or ``node N``) -> reason, of those left out.

        Raises:
            RunFailed: if ``strict`` and a node does not answer, fails, breaks the contract,
                carries another fingerprint, or claims the name of a connected hospital. One
                that has not signed with the key of the hospital that it names ends no run: it is
                left out and never asked again, whether that hospital is here or not.
        """
        self.mute = {node: mute for node, mute in self.mute.items() if node in nodes}
        self.failing = {node: one for node, one in self.failing.items() if node in nodes}
        due = [node for node in nodes if self._is_asked(node, server_round)]
        # Nodes that were mute wait until there are no others, who would share their time.
        new = [node for node in due if node not in self.mute] or due
        if not new:
            return {}
        tries = {node: self.mute[node].tries if node in self.mute else 0 for node in new}
        timeout_seconds /= 2 ** min(tries.values())
        nonces = {node: new_nonce() for node in new}
        replies = exchange(
            grid,
            {node: self._query(nonces[node]) for node in new},
            kind="query",
            timeout_seconds=timeout_seconds,
            names=self.names,
            on_message=on_message,
            clock=self.clock,
        ).messages
        left_out: dict[str, str] = {}
        for node in new:
            name = _name_in(replies.get(node)) or f"node {node}"
            try:
                hello = self._checked_hello(name, replies.get(node), timeout_seconds)
                if self.keys is not None:
                    check_signature(self.keys, nonces[node], node, hello)
                self._enter(node, name, hello, nodes)
                self._forget(node)
            except RunFailed as error:
                if isinstance(error, Impostor):
                    name = f"node {node}"  # the hospital that it names is not to blame
                    self.impostors.add(node)
                elif strict:
                    raise
                left_out[name] = str(error)
                failed = self._forget(node)
                self.problems[node] = (name, str(error))
                reply = replies.get(node)
                if reply is None:
                    self.mute[node] = Mute(tries=tries[node] + 1, asked_in=server_round)
                elif reply.has_error():
                    self.failing[node] = Failing(tries=failed + 1, asked_at=self.clock.monotonic())
                else:
                    self.refused[node] = (name, str(error))
                _log.warning("%s is left out: %s", name, error)
        return left_out

    def _query(self, nonce: str) -> RecordDict:
        scalars: dict[str, int | str] = {"round": 0}
        if self.keys is not None:
            scalars[NONCE] = nonce
        return RecordDict({CONFIG: ConfigRecord(dict(scalars))})

    def _is_asked(self, node: int, server_round: int) -> bool:
        if node in self.names or node in self.refused:
            return False
        if node in self.failing:
            return self.failing[node].due(self.clock.monotonic())
        return node not in self.mute or self.mute[node].due(server_round)

    def _forget(self, node: int) -> int:
        """Forget what is wrong with a node; return how often it has failed."""
        self.mute.pop(node, None)
        self.problems.pop(node, None)
        failing = self.failing.pop(node, None)
        return failing.tries if failing else 0

    @property
    def reasons(self) -> str:
        """Why nodes are left out so far, as the end of a sentence; empty if none is."""
        told = sorted(set(self.problems.values()))
        return "".join(f"; {name}: {reason.removeprefix(f'{name}: ')}" for name, reason in told)

    def _enter(
        self, node: int, hospital: str, hello: dict[str, Any], connected: Collection[int]
    ) -> None:
        theirs = Fingerprints(
            a=hello["a-sha256"], backbone=hello["backbone-sha256"], source=hello["source-sha256"]
        )
        self.ours.check(hospital, theirs)
        if self.plan and hello["privacy-plan-sha256"] != self.plan.fingerprint:
            raise RunFailed(
                f"{hospital}: its privacy plan differs from the server's; "
                "fix: give both sides the same [privacy] section"
            )
        if self.of and hello["of"] != self.of:
            raise RunFailed(_miscount(hospital, hello["of"], self.of))
        before = next((old for old, name in self.names.items() if name == hospital), None)
        if before is not None and before in connected:
            raise RunFailed(f"two nodes call themselves {hospital}; fix: one node per hospital")
        if before is not None:
            del self.names[before]
        self.names[node] = hospital
        self.hellos[hospital] = hello

    def _checked_hello(
        self, name: str, reply: Message | None, timeout_seconds: float
    ) -> dict[str, Any]:
        if reply is None:
            raise RunFailed(f"a hospital did not answer the handshake in {timeout_seconds:.0f} s")
        if reply.has_error():
            reason = shortened(reply.error.reason, LONGEST_REASON)
            raise RunFailed(f"a hospital failed in the handshake: {reason}")
        try:
            record = only_record(reply.content, "config")
            signed = self.keys is not None
            return check_hello(record, private=self.plan is not None, signed=signed)
        except ContractError as error:
            raise RunFailed(f"{name}: its handshake breaks the contract: {error}") from None

    def count(self, expected: int) -> int:
        """Return how many hospitals there are by most admitted hospitals' account.

        Args:
            expected: What decides between equally many; else the smaller number does.
        """
        votes = Counter(hello["of"] for hello in self.hellos.values())
        return max(votes, key=lambda of: (votes[of], of == expected, -of), default=1)

    def settle(self, of: int) -> dict[str, str]:
        """Fix the number of hospitals, and refuse those who count otherwise, now and later.

        Returns:
            Hospital -> reason, of those left out.
        """
        self.of = of
        left_out: dict[str, str] = {}
        for node, name in list(self.names.items()):
            if self.hellos[name]["of"] != of:
                left_out[name] = _miscount(name, self.hellos.pop(name)["of"], of)
                self.refused[node] = self.problems[node] = (name, left_out[name])
                del self.names[node]
                _log.warning("%s is left out: %s", name, left_out[name])
        return left_out

    def connected(self, nodes: Iterable[int]) -> dict[str, int]:
        """Return hospital -> node of the admitted hospitals among the connected nodes."""
        return {self.names[node]: node for node in nodes if node in self.names}

    def choose(
        self, config: FederationConfig, server_round: int, connected: dict[str, int]
    ) -> tuple[list[int], int]:
        """Choose the hospitals of a round by name, from a stream of the federation's seed.

        All that were ever admitted are put in a seeded order; the first connected ones are asked,
        so a hospital that is away is replaced by the next. ``federation.only`` names the one to
        ask.

        Returns:
            The nodes to ask, in the order of their hospitals' names, and how many should be asked.

        Raises:
            RunFailed: if ``federation.only`` names no hospital.
        """
        if config.only:
            if config.only not in self.admitted:
                raise RunFailed(
                    f"federation.only={config.only}: the hospitals are {', '.join(self.admitted)}"
                )
            return [connected[name] for name in (config.only,) if name in connected], 1
        wanted = sampled(config.fraction, self.known)
        generator = stream(config.seed, "hospital-sampling", server_round)
        order = generator.permutation(self.admitted).tolist()
        chosen = sorted([name for name in order if name in connected][:wanted])
        return [connected[name] for name in chosen], wanted


def _name_in(reply: Message | None) -> str | None:
    """Return the hospital that a reply claims to come from."""
    if reply is None or reply.has_error():
        return None
    records = list(reply.content.config_records.values())
    return claimed_name(records[0]) if len(records) == 1 else None


def _miscount(hospital: str, theirs: int, of: int) -> str:
    return f"{hospital}: it counts {theirs} hospitals, the federation has {of}"
