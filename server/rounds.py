"""The federated rounds: ask, check, aggregate, evaluate, checkpoint."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from flwr.app import Message
from flwr.serverapp import Grid

from common.config import Config
from common.errors import RunFailed
from common.model.adapter.scheme import Scheme
from common.privacy.settings import HOSPITAL
from common.rundir import Checkpoint, RunDirectory
from common.tensor_files import under
from common.wire.cohort import NOT_EVALUATED, WITHSTANDS_NOTHING
from common.wire.contract import (
    ContractError,
    Shapes,
    Tensors,
    Update,
    read_evaluate_reply,
    read_train_reply,
    train_message,
)
from server import checkpoints, kept_updates
from server.checkpoints import CARRIED, STRATEGY, Round
from server.clock import Clock
from server.expected_replies import most_validation_tokens, private_steps, steps_expected, train_due
from server.messages import Recorder, answered, exchange, require
from server.privacy_account import PrivacyAccount
from server.progress import log, round_line
from server.roster import Roster
from server.screening import outliers, with_capped_weights
from server.strategies import check_strategy, withstands
from server.strategy import Aggregator, aggregator_for
from server.timeouts import HANDSHAKE_SECONDS, RECONNECT_SECONDS, Pace

Answer = TypeVar("Answer")
_log = logging.getLogger(__name__)


@dataclass
class Rounds:
    """One federated training over a grid.

    ``start`` runs it, from the run directory's last checkpoint if there is one; everything it
    learns is written to the run directory as it happens.
    """

    grid: Grid
    config: Config
    run: RunDirectory
    shapes: Shapes
    """Of all that the server holds and sends."""
    scheme: Scheme
    """What of it a round's replies hold."""
    roster: Roster
    account: PrivacyAccount | None = None
    """With privacy on: what each hospital has spent, as the run directory tells it."""
    paces: dict[str, Pace] = field(default_factory=dict)
    """The slowest exchange so far of each kind of message."""
    clock: Clock = time

    def start(self, b: Tensors) -> Tensors:
        """Run all rounds, or those after the last checkpoint, and return the last B.

        Raises:
            ChangedRun: if the run directory is that of another configuration, A or backbone.
            RunFailed: if the handshake fails or a round stays below its quorum.
        """
        checkpoint = checkpoints.load(self.run, self.config, self.roster.ours)
        if checkpoint:
            self.roster.remember(checkpoint.facts)
        self.run.write_status("running", round=0)
        self.gather()
        if self.roster.plan:
            self.account = PrivacyAccount(self.run, self.roster.plan)
        aggregator = aggregator_for(self.config.federation, self.scheme, self.roster.plan, self.run)
        last = self._resumed(checkpoint, aggregator) if checkpoint else self._first(b, aggregator)
        for number in range(last.number + 1, self.config.federation.rounds + 1):
            started = self.clock.monotonic()
            updates = self.train(last, number)
            if self.config.federation.keep_updates:
                kept_updates.keep(self.run, number, updates)
            if not withstands(self.config.federation, len(updates)):
                self.run.metric(WITHSTANDS_NOTHING, len(updates), round=number)
            base = self.scheme.shapes(number, last.received)
            b = aggregator.aggregate(base, updates, server_round=number)
            last = self._round(number, last.received | b, last.carried)
            loss = self.evaluate(last)
            log.info(round_line(number, self.config.federation.rounds, updates, loss))
            self.run.metric("round-seconds", self._since(started), round=number)
            self._save(last, aggregator)
            self.run.write_status("running", round=number)
        return last.b

    def _round(self, number: int, b: Tensors, owed: Tensors) -> Round:
        codec = self.config.federation.codec
        return Round.encode(number, b, owed, codec=codec, shapes=self.shapes)

    def _first(self, b: Tensors, aggregator: Aggregator) -> Round:
        """Return the round before the first: B as it begins, evaluated and saved."""
        first = self._round(0, b, {})
        log.info(round_line(0, self.config.federation.rounds, [], self.evaluate(first)))
        self._save(first, aggregator)
        return first

    def _resumed(self, checkpoint: Checkpoint, aggregator: Aggregator) -> Round:
        """Go back to the last checkpoint: B, strategy, hospitals, what was measured."""
        last = checkpoint.facts.round
        aggregator.state = under(STRATEGY, checkpoint.extra)
        paces = checkpoint.facts.paces.items()
        self.paces = {kind: Pace.read(pace, what=kind) for kind, pace in paces}
        self.run.forget_metrics(after=last)
        if self.account:
            cost = private_steps(self.config, self.roster.plan, last + 1)
            self.account.record_interrupted(last + 1, cost)
        self.run.write_status("running", round=last)
        return self._round(last, checkpoint.b, under(CARRIED, checkpoint.extra))

    def _save(self, finished: Round, aggregator: Aggregator) -> None:
        checkpoints.save(self.run, finished, self.config, self.roster, self.paces, aggregator)

    def _since(self, started: float) -> float:
        return round(self.clock.monotonic() - started, 3)

    def gather(self) -> None:
        """Wait for the hospitals and shake hands with each.

        The hospitals say how many they are; with plain ``flwr run`` only Flower knows. A resumed
        run waits a moment for those that it knew, and leaves it to the rounds whether it can do
        without the others.

        Raises:
            RunFailed: if too few come, or with ``stop`` one is not as the server or the others.
            UserError: if the strategy withstands nothing with so many hospitals.
        """
        federation = self.config.federation
        strict = federation.mismatch == "stop"
        limit = federation.timeout_seconds or HANDSHAKE_SECONDS
        started = self.clock.monotonic()
        while True:
            self._admit(0, strict=strict)
            sizes = {one.federation_size for one in self.roster.handshakes.values()}
            if strict and len(sizes) > 1:
                raise RunFailed(f"the hospitals disagree on how many they are: {sorted(sizes)}")
            size = self.roster.federation_size or self.roster.count(federation.hospitals)
            needed = min(federation.min_hospitals or size, size)
            waited = self.clock.monotonic() - started
            if len(self.roster.arrived) >= needed:
                break
            able = bool(self.roster.handshakes) and self.roster.known >= needed
            if able and waited > min(limit, RECONNECT_SECONDS):
                break
            if waited > limit:
                raise RunFailed(
                    f"{len(self.roster.arrived)} of {federation.min_hospitals or size} hospitals "
                    f"are connected after {limit:.0f} s{self.roster.reasons}"
                )
            self.clock.sleep(0.5)
        self._leave_out(self.roster.fix_number(size), 0)
        if not self.roster.handshakes:
            raise RunFailed("every hospital was refused; metrics.jsonl has the reasons")
        self.config = replace(self.config, federation=replace(federation, hospitals=size))
        check_strategy(self.config.federation)

    def train(self, last: Round, server_round: int) -> list[Update]:
        """Ask the sampled hospitals to train from the last round's B; refuse broken contracts.

        Raises:
            RunFailed: below quorum, with every failed hospital's reason.
        """
        nodes, needed, wanted = self._ready(server_round)
        account, cost = self.account, private_steps(self.config, self.roster.plan, server_round)
        answered_by: set[str] = set()
        handshakes = self.roster.handshakes

        def check(reply: Message, hospital: str) -> Update:
            answered_by.add(hospital)
            return read_train_reply(
                reply.content,
                self.scheme.shapes(server_round, self.shapes),
                hospital=hospital,
                server_round=server_round,
                charged=account.bounds(hospital, server_round, cost) if account else None,
                due=None if account else train_due(self.config, handshakes[hospital], server_round),
                codec=self.config.federation.codec,
                base=last.received,
            )

        updates, failures = self._ask("train", nodes, last, server_round, check)
        if account:
            for hospital in sorted(failures):
                account.record_missing(
                    hospital, server_round, cost, answered=hospital in answered_by
                )
        for hospital, update in updates.items():
            if account:
                account.record_reply(hospital, server_round, int(update.metrics["steps"]))
                continue
            for name in ("train-loss", "weight", "steps", "seconds"):
                self.run.metric(name, update.metrics[name], round=server_round, hospital=hospital)
        failures |= self._screened(last, updates, server_round)
        require(len(updates), needed, wanted, server_round, failures)
        return with_capped_weights(self.config.federation, list(updates.values()))

    def _screened(
        self, last: Round, updates: dict[str, Update], server_round: int
    ) -> dict[str, str]:
        """Take the updates out that moved B implausibly far; return the reasons by hospital."""
        plan = self.roster.plan
        if plan and plan.unit == HOSPITAL:  # its clip is the bound, and none may be left out
            return {}
        found = outliers(self.config.federation, last.received, list(updates.values()))
        for hospital, reason in found.items():
            del updates[hospital]
            self._refuse(hospital, reason, server_round)
        return found

    def evaluate(self, last: Round) -> float | None:
        """Ask every hospital for its validation loss of the last B; return the weighted mean.

        With privacy on nobody is asked: no loss leaves a hospital. With too few of the admitted
        hospitals connected the round is trained and not evaluated, which is logged.

        Raises:
            RunFailed: below quorum, with every failed hospital's reason.
        """
        if self.roster.plan is not None:
            return None
        server_round, handshakes = last.number, self.roster.handshakes
        able = [name for name in sorted(handshakes) if handshakes[name].validation_samples]
        connected = self.roster.connected(self.grid.get_node_ids())
        nodes = [connected[name] for name in able if name in connected]
        needed = self._quorum(len(able))
        if able and len(nodes) < needed:
            reason = (
                f"{len(nodes)} of {len(able)} hospitals with validation samples are connected, "
                f"the quorum is {needed}"
            )
            _log.warning("round %d is not evaluated: %s", server_round, reason)
            self.run.metric(NOT_EVALUATED, reason, round=server_round)
        if len(nodes) < needed:
            return None

        def check(reply: Message, hospital: str) -> dict[str, float]:
            return read_evaluate_reply(
                reply.content,
                server_round=server_round,
                most_tokens=most_validation_tokens(self.config, handshakes[hospital]),
            )

        losses, failures = self._ask("evaluate", nodes, last, server_round, check)
        require(len(losses), needed, len(able), server_round, failures)
        weight = math.fsum(metrics["weight"] for metrics in losses.values())
        total = math.fsum(metrics["loss"] * metrics["weight"] for metrics in losses.values())
        for hospital, metrics in losses.items():
            self.run.metric(
                "validation-loss", metrics["loss"], round=server_round, hospital=hospital
            )
        self.run.metric("validation-loss", total / weight, round=server_round)
        return total / weight

    def _admit(self, server_round: int, *, strict: bool) -> None:
        left_out = self.roster.admit(
            self.grid,
            sorted(self.grid.get_node_ids()),
            server_round=server_round,
            strict=strict,
            timeout_seconds=self.config.federation.timeout_seconds or HANDSHAKE_SECONDS,
            on_message=Recorder(self.run, server_round, self.shapes),
        )
        self._leave_out(left_out, server_round)

    def _leave_out(self, left_out: dict[str, str], server_round: int) -> None:
        for hospital, reason in sorted(left_out.items()):
            self.run.metric("refused", reason, round=server_round, hospital=hospital)

    def _ready(self, server_round: int) -> tuple[list[int], int, int]:
        """Choose the nodes of a round; wait for enough of them to be connected.

        Returns:
            Nodes to ask, how many must answer, and how many were wanted.
        """
        federation = self.config.federation
        limit = federation.timeout_seconds or HANDSHAKE_SECONDS
        deadline = self.clock.monotonic() + limit
        while True:
            self._admit(server_round, strict=False)
            connected = self.roster.connected(self.grid.get_node_ids())
            nodes, wanted = self.roster.choose(federation, server_round, connected)
            needed = self._quorum(wanted)
            if len(nodes) >= needed:
                return nodes, needed, wanted
            if self.clock.monotonic() > deadline:
                raise RunFailed(
                    f"round {server_round}: {len(nodes)} hospitals are connected after "
                    f"{limit:.0f} s, the quorum is {needed} of {wanted}{self.roster.reasons}"
                )
            self.clock.sleep(0.5)

    def _quorum(self, asked: int) -> int:
        return max(1, math.ceil(self.config.federation.quorum * asked - 1e-9))

    def _ask(
        self,
        kind: str,
        nodes: Sequence[int],
        last: Round,
        server_round: int,
        check: Callable[[Message, str], Answer],
    ) -> tuple[dict[str, Answer], dict[str, str]]:
        """Send the last B to each node; return checked answers, and reasons of the refused."""
        names, handshakes = self.roster.names, self.roster.handshakes
        steps = 1
        if kind == "train":
            asked = [handshakes[names[node]] for node in nodes]
            steps = max(steps_expected(self.config, one, server_round) for one in asked)
        pace = self.paces.get(kind)
        started = self.clock.monotonic()
        replies = exchange(
            self.grid,
            dict.fromkeys(nodes, train_message(last.wire, server_round=server_round)),
            kind=kind,
            timeout_seconds=self.config.federation.timeout_seconds
            or Pace.limit(pace, steps=steps, hospitals=len(nodes)),
            names=names,
            on_message=Recorder(self.run, server_round, self.shapes),
            clock=self.clock,
        )
        self.run.metric(f"{kind}-exchange-seconds", self._since(started), round=server_round)
        answers: dict[str, Answer] = {}
        failures: dict[str, str] = {}
        for node in nodes:
            hospital = names[node]
            try:
                answers[hospital] = check(answered(replies.messages.get(node)), hospital)
            except ContractError as error:
                failures[hospital] = str(error)
                self._refuse(hospital, str(error), server_round)
        if answers:
            now = Pace(
                seconds=max(replies.seconds[node] for node in nodes if names[node] in answers),
                steps=steps,
                hospitals=len(nodes),
            )
            self.paces[kind] = Pace.slower(pace, now, timed_out=replies.timed_out)
        return answers, failures

    def _refuse(self, hospital: str, reason: str, server_round: int) -> None:
        _log.warning("round %d: %s is refused: %s", server_round, hospital, reason)
        self.run.metric("refused", reason, round=server_round, hospital=hospital)
