"""The federated rounds: ask, check, aggregate, evaluate, checkpoint."""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from common.config import Config
from common.errors import RunFailed
from common.exchange import (
    ContractError,
    Shapes,
    Tensors,
    Update,
    describe,
    read_evaluate_reply,
    read_train_reply,
    train_message,
)
from common.privacy.receipts import PRIVACY, ledger_line
from common.provenance import tensors_sha256
from common.rundir import RunDirectory
from server.roster import Roster, exchange
from server.strategy import aggregate, build_strategy

LONGEST_SECONDS = 43_200.0 - 60.0
"""Flower ends a message after 12 hours."""
SHORTEST_SECONDS = 60.0
SLACK = 5.0
"""An automatic timeout is this many times the slowest round so far."""


@dataclass
class Rounds:
    """One federated training over a grid.

    ``start`` runs it; everything it learns is written to the run directory as it happens.
    """

    grid: Grid
    config: Config
    run: RunDirectory
    shapes: Shapes
    roster: Roster
    slowest_seconds: float = 0.0

    def start(self, b: Tensors) -> Tensors:
        """Run all rounds from the given B and return the last.

        Raises:
            RunFailed: if the handshake fails or a round stays below its quorum.
        """
        self.gather()
        self.evaluate(b, 0)
        strategy = build_strategy(self.config.federation)
        for server_round in range(1, self.config.federation.rounds + 1):
            started = time.monotonic()
            updates = self.train(b, server_round)
            b = aggregate(
                strategy,
                updates,
                server_round=server_round,
                weighting=self.config.federation.weighting,
            )
            self.evaluate(b, server_round)
            seconds = time.monotonic() - started
            self.run.metric("round-seconds", round(seconds, 3), round=server_round)
            self.run.save_checkpoint(
                f"round-{server_round:05d}",
                b,
                facts={"round": server_round, "b_sha256": tensors_sha256(b)},
            )
            self.run.write_status("running", round=server_round)
        return b

    def gather(self) -> None:
        """Wait for the hospitals and shake hands with each.

        The hospitals say how many they are; with plain ``flwr run`` only Flower knows.
        """
        deadline = time.monotonic() + self.timeout_seconds()
        expected = 1
        while len(self.roster.names) < expected:
            nodes = sorted(self.grid.get_node_ids())
            self.roster.admit(
                self.grid, nodes, timeout_seconds=self.timeout_seconds(), on_message=self.record(0)
            )
            sizes = {int(hello["of"]) for hello in self.roster.hellos.values()}
            if len(sizes) > 1:
                raise RunFailed(f"the hospitals disagree on how many they are: {sorted(sizes)}")
            expected = max(sizes, default=1)
            if len(self.roster.names) < expected:
                if time.monotonic() > deadline:
                    raise RunFailed(
                        f"{len(self.roster.names)} of {expected} hospitals are connected; gave up"
                    )
                time.sleep(0.5)
        federation = replace(self.config.federation, hospitals=expected)
        self.config = replace(self.config, federation=federation)

    def train(self, b: Tensors, server_round: int) -> list[Update]:
        """Ask the sampled hospitals for their updates; refuse what breaks the contract.

        Raises:
            RunFailed: below quorum, with every failed hospital's reason.
        """
        nodes = self.roster.choose(self.config.federation, server_round)
        replies = self._ask(nodes, b, server_round, "train")
        updates, failures = [], {}
        for node in nodes:
            hospital = self.roster.names[node]
            try:
                reply = answered(replies.get(node))
                update = read_train_reply(
                    reply.content,
                    self.shapes,
                    hospital=hospital,
                    server_round=server_round,
                    private=self.roster.plan is not None,
                )
            except ContractError as error:
                failures[hospital] = str(error)
                self.run.metric("refused", str(error), round=server_round, hospital=hospital)
                continue
            updates.append(update)
            if self.roster.plan is not None:
                steps = int(update.metrics["steps"])
                line = ledger_line(self.roster.plan, hospital, server_round, steps)
                self.run.append(PRIVACY, line)
                continue
            for name in ("train-loss", "weight", "steps", "seconds"):
                self.run.metric(name, update.metrics[name], round=server_round, hospital=hospital)
        self._require_quorum(len(updates), len(nodes), server_round, failures)
        return updates

    def evaluate(self, b: Tensors, server_round: int) -> None:
        """Ask every hospital for the loss on its validation split; log the weighted mean.

        With privacy on nobody is asked: no loss leaves a hospital.
        """
        if self.roster.plan is not None:
            return
        hellos = self.roster.hellos
        nodes = [
            node
            for node in sorted(self.roster.names, key=lambda node: self.roster.names[node])
            if hellos[self.roster.names[node]]["validation-samples"]
        ]
        if not nodes:
            return
        replies = self._ask(nodes, b, server_round, "evaluate")
        total, weight = 0.0, 0.0
        failures = {}
        for node in nodes:
            hospital = self.roster.names[node]
            try:
                metrics = read_evaluate_reply(
                    answered(replies.get(node)).content, server_round=server_round
                )
            except ContractError as error:
                failures[hospital] = str(error)
                self.run.metric("refused", str(error), round=server_round, hospital=hospital)
                continue
            self.run.metric(
                "validation-loss", metrics["loss"], round=server_round, hospital=hospital
            )
            total += metrics["loss"] * metrics["weight"]
            weight += metrics["weight"]
        self._require_quorum(len(nodes) - len(failures), len(nodes), server_round, failures)
        self.run.metric("validation-loss", total / weight, round=server_round)

    def timeout_seconds(self) -> float:
        """Return the longest wait for one exchange: configured, or from the slowest so far."""
        if self.config.federation.timeout_seconds:
            return self.config.federation.timeout_seconds
        if not self.slowest_seconds:
            return LONGEST_SECONDS
        return min(LONGEST_SECONDS, max(SHORTEST_SECONDS, SLACK * self.slowest_seconds))

    def record(self, server_round: int) -> "Recorder":
        """Return a callback that writes every message's names and bytes to wire.jsonl."""
        return Recorder(self.run, server_round)

    def _ask(
        self, nodes: Iterable[int], b: Tensors, server_round: int, kind: str
    ) -> dict[int, Message]:
        content = train_message(b, server_round=server_round)
        started = time.monotonic()
        replies = exchange(
            self.grid,
            dict.fromkeys(nodes, content),
            kind=kind,
            timeout_seconds=self.timeout_seconds(),
            names=self.roster.names,
            on_message=self.record(server_round),
        )
        if kind == "train":
            self.slowest_seconds = max(self.slowest_seconds, time.monotonic() - started)
        return replies

    def _require_quorum(
        self, good: int, asked: int, server_round: int, failures: dict[str, str]
    ) -> None:
        needed = max(1, math.ceil(self.config.federation.quorum * asked - 1e-9))
        if good < needed:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in sorted(failures.items()))
            raise RunFailed(
                f"round {server_round}: {good} of {asked} hospitals answered, "
                f"the quorum is {needed}; {reasons}"
            )


@dataclass(frozen=True)
class Recorder:
    """Writes one line per message: direction, hospital, round, kind, tensors, scalars, bytes."""

    run: RunDirectory
    server_round: int

    def __call__(self, direction: str, hospital: str, message: Message) -> None:
        """Record one message."""
        facts: dict[str, Any] = describe(message)
        self.run.append(
            "wire.jsonl",
            {"direction": direction, "hospital": hospital, "round": self.server_round, **facts},
        )


def answered(reply: Message | None) -> Message:
    """Return the reply if there is one with content.

    Raises:
        ContractError: if the hospital did not answer in time or failed.
    """
    if reply is None:
        raise ContractError("no answer in time")
    if reply.has_error():
        raise ContractError(f"failed: {reply.error.reason}")
    return reply
