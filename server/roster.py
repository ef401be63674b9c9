"""Who takes part: nodes become hospitals by a handshake that compares fingerprints."""

import logging
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from common.config import FederationConfig
from common.errors import RunFailed
from common.privacy.plan import PrivacyPlan
from common.records.run import SavedFacts
from common.seeds import stream
from common.wire.cohort import sampled, trained_by
from common.wire.contract import (
    CONFIG,
    LONGEST_REASON,
    ContractError,
    Fingerprints,
    only_record,
    shortened,
)
from common.wire.handshake import Handshake, check_handshake, claimed_name
from common.wire.identity import NONCE, Impostor, check_signature, new_nonce
from server.clock import Clock
from server.messages import OnMessage, exchange
from server.nodes import Admitted, Erring, LeftOut, Node, Retried, Silent

_log = logging.getLogger(__name__)


@dataclass
class Roster:
    """Who takes part: what each node is, and which hospitals were known before a resume."""

    ours: Fingerprints
    plan: PrivacyPlan | None = None
    """With privacy on: what every hospital must have too, and no count may come with it."""
    keys: Mapping[str, EllipticCurvePublicKey] | None = None
    """In a deployment: hospital -> the key that its handshake must be signed with."""
    nodes: dict[int, Node] = field(default_factory=dict)
    """By Flower's node id; a node that was never asked is absent."""
    federation_size: int = 0
    """How many hospitals there are, by their own account; 0: not settled yet."""
    remembered: frozenset[str] = frozenset()
    """After a resume: the hospitals that were admitted before it, some of which may be away."""
    known_before: int = 0
    """After a resume: ``known`` before it."""
    clock: Clock = time

    @property
    def names(self) -> dict[int, str]:
        """Node id -> hospital, of those whose handshake was accepted."""
        return {node: one.name for node, one in self._admitted()}

    @property
    def handshakes(self) -> dict[str, Handshake]:
        """Hospital -> what it said of itself, of those that came in this process."""
        return {one.name: one.handshake for _, one in self._admitted()}

    def _admitted(self) -> list[tuple[int, Admitted]]:
        return [(node, one) for node, one in self.nodes.items() if isinstance(one, Admitted)]

    @property
    def admitted(self) -> list[str]:
        """The hospitals that were ever admitted, in the order of their names."""
        return sorted(self.remembered | set(self.handshakes))

    @property
    def known(self) -> int:
        """Number of hospitals ever shown up, refused ones included; at most ``federation_size``."""
        known = max(self.known_before, len(self.remembered | self.arrived))
        return min(known, self.federation_size) if self.federation_size else known

    @property
    def arrived(self) -> set[str]:
        """The hospitals that have shown up in this process, refused ones included.

        A second node under an admitted hospital's name is none.
        """
        refused = {
            one.name
            for one in self.nodes.values()
            if isinstance(one, LeftOut) and not isinstance(one, Retried) and not one.impostor
        }
        return {*self.handshakes, *refused}

    def remember(self, facts: SavedFacts) -> None:
        """Take over what a checkpoint keeps: who was admitted, and how many had shown up."""
        self.remembered = frozenset(facts.hospitals)
        self.known_before, self.federation_size = facts.known, facts.federation_size

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
        """Query the connected nodes that are not known yet, or whose next try is due.

        With ``strict`` any problem ends the run; otherwise the node is left out.

        Returns:
            Hospital (or ``node N``) -> reason, of those left out.

        Raises:
            RunFailed: if ``strict`` and a node does not answer, fails, breaks the contract,
                carries another fingerprint, or claims the name of a connected hospital. One
                that has not signed with the key of the hospital that it names ends no run: it is
                left out and never asked again, whether that hospital is here or not.
        """
        for node, one in self.nodes.items():
            if isinstance(one, Retried) and node not in nodes:
                self.nodes[node] = replace(one, tries=0)
        asked = self._due(nodes, server_round)
        if not asked:
            return {}
        timeout_seconds /= 2 ** min(self._silences(node) for node in asked)
        nonces = {node: new_nonce() for node in asked}
        replies = exchange(
            grid,
            {node: self._query(nonces[node]) for node in asked},
            kind="query",
            timeout_seconds=timeout_seconds,
            names=self.names,
            on_message=on_message,
            clock=self.clock,
        ).messages
        left_out: dict[str, str] = {}
        for node in asked:
            reply = replies.get(node)
            name = _name_in(reply) or f"node {node}"
            try:
                self._enter(
                    node, self._handshake(name, node, reply, nonces[node], timeout_seconds), nodes
                )
                continue
            except Impostor as error:  # the hospital that it names is not to blame
                one = LeftOut(name=f"node {node}", reason=str(error), impostor=True)
            except RunFailed as error:
                if strict:
                    raise
                one = self._left_out(node, name, str(error), reply, server_round)
            self.nodes[node] = one
            left_out[one.name] = one.reason
            _log.warning("%s is left out: %s", one.name, one.reason)
        return left_out

    def _due(self, nodes: Collection[int], server_round: int) -> list[int]:
        """Return the nodes to ask now.

        Those that were silent wait until there are no others, who would share their time.
        """
        now = self.clock.monotonic()
        asked = {node: self.nodes.get(node) for node in nodes}
        due = [node for node, one in asked.items() if one is None or one.due(server_round, now)]
        return [node for node in due if not self._silences(node)] or due

    def _silences(self, node: int) -> int:
        one = self.nodes.get(node)
        return one.tries if isinstance(one, Silent) else 0

    def _left_out(
        self, node: int, name: str, reason: str, reply: Message | None, server_round: int
    ) -> LeftOut:
        """Return what a node is whose handshake was not accepted."""
        before = self.nodes.get(node)
        if reply is None:
            tries = self._silences(node) + 1
            return Silent(name=name, reason=reason, tries=tries, asked_in=server_round)
        if reply.has_error():
            tries = before.tries + 1 if isinstance(before, Erring) else 1
            now = self.clock.monotonic()
            return Erring(name=name, reason=reason, tries=tries, asked_at=now)
        return LeftOut(name=name, reason=reason)

    def _query(self, nonce: str) -> RecordDict:
        scalars: dict[str, int | str] = {"round": 0}
        if self.keys is not None:
            scalars[NONCE] = nonce
        return RecordDict({CONFIG: ConfigRecord(dict(scalars))})

    @property
    def reasons(self) -> str:
        """Why nodes are left out so far, as the end of a sentence; empty if none is."""
        found = {(one.name, one.reason) for one in self.nodes.values() if isinstance(one, LeftOut)}
        return "".join(f"; {name}: {why.removeprefix(f'{name}: ')}" for name, why in sorted(found))

    def _enter(self, node: int, handshake: Handshake, connected: Collection[int]) -> None:
        hospital = handshake.hospital
        theirs = Fingerprints(
            a=handshake.a_sha256, backbone=handshake.backbone_sha256, source=handshake.source_sha256
        )
        self.ours.check(hospital, theirs)
        if self.plan and handshake.privacy_plan_sha256 != self.plan.fingerprint:
            raise RunFailed(
                f"{hospital}: its privacy plan differs from the server's; "
                "fix: give both sides the same [privacy] section"
            )
        if self.federation_size and handshake.federation_size != self.federation_size:
            raise RunFailed(_miscount(handshake, self.federation_size))
        before = next((old for old, name in self.names.items() if name == hospital), None)
        if before is not None and before in connected:
            raise RunFailed(f"two nodes call themselves {hospital}; fix: one node per hospital")
        if before is not None:
            del self.nodes[before]
        self.nodes[node] = Admitted(name=hospital, handshake=handshake)

    def _handshake(
        self, name: str, node: int, reply: Message | None, nonce: str, timeout_seconds: float
    ) -> Handshake:
        if reply is None:
            raise RunFailed(f"a hospital did not answer the handshake in {timeout_seconds:.0f} s")
        if reply.has_error():
            reason = shortened(reply.error.reason, LONGEST_REASON)
            raise RunFailed(f"a hospital failed in the handshake: {reason}")
        try:
            record, signed = only_record(reply.content, "config"), self.keys is not None
            handshake = check_handshake(record, private=self.plan is not None, signed=signed)
        except ContractError as error:
            raise RunFailed(f"{name}: its handshake breaks the contract: {error}") from None
        if self.keys is not None:
            check_signature(self.keys, nonce, node, record)
        return handshake

    def count(self, expected: int) -> int:
        """Return how many hospitals there are by most admitted hospitals' account.

        Between equally many ``expected`` decides, else the smaller number.
        """
        votes = Counter(handshake.federation_size for handshake in self.handshakes.values())
        return max(votes, key=lambda size: (votes[size], size == expected, -size), default=1)

    def fix_number(self, size: int) -> dict[str, str]:
        """Fix the number of hospitals, and refuse those who count otherwise, now and later.

        Returns:
            Hospital -> reason, of those left out.
        """
        self.federation_size = size
        left_out: dict[str, str] = {}
        for node, one in self._admitted():
            if one.handshake.federation_size != size:
                left_out[one.name] = _miscount(one.handshake, size)
                self.nodes[node] = LeftOut(name=one.name, reason=left_out[one.name])
                _log.warning("%s is left out: %s", one.name, left_out[one.name])
        return left_out

    def connected(self, nodes: Iterable[int]) -> dict[str, int]:
        """Return hospital -> node of the admitted hospitals among the connected nodes."""
        names = self.names
        return {names[node]: node for node in nodes if node in names}

    def choose(
        self, config: FederationConfig, server_round: int, connected: dict[str, int]
    ) -> tuple[list[int], int]:
        """Choose the hospitals of a round by name, from a stream of the federation's seed.

        All that were ever admitted are put in a seeded order; the first connected ones are asked,
        so a hospital that is away is replaced by the next. ``federation.only`` names those
        that count.

        Returns:
            The nodes to ask, in the order of their hospitals' names, and how many should be asked.

        Raises:
            RunFailed: if ``federation.only`` names somebody who is no hospital.
        """
        only = trained_by(config)
        if not set(only) <= set(self.admitted):
            raise RunFailed(
                f"federation.only={config.only}: the hospitals are {', '.join(self.admitted)}"
            )
        wanted = sampled(config.fraction, len(only) or self.known)
        generator = stream(config.seed, "hospital-sampling", server_round)
        order = generator.permutation(only or self.admitted).tolist()
        chosen = sorted([name for name in order if name in connected][:wanted])
        return [connected[name] for name in chosen], wanted


def _name_in(reply: Message | None) -> str | None:
    """Return the hospital that a reply claims to come from."""
    if reply is None or reply.has_error():
        return None
    records = list(reply.content.config_records.values())
    return claimed_name(records[0]) if len(records) == 1 else None


def _miscount(handshake: Handshake, size: int) -> str:
    counted = handshake.federation_size
    return f"{handshake.hospital}: it counts {counted} hospitals, the federation has {size}"
