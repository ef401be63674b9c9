"""What the server knows of each hospital's privacy spending: the run's privacy.jsonl."""

from collections.abc import Iterable, Mapping
from typing import Any

from common.privacy.budget.receipts import PRIVACY, PrivacyLine, ledger_line, privacy_lines
from common.privacy.plan import PrivacyPlan
from common.rundir import RunDirectory


class PrivacyAccount:
    """Writes a line for every hospital that is asked, and bounds what the next reply may claim.

    What a hospital has told stays in the run directory, so the bounds outlive the server.

    Args:
        run: The run's directory.
        plan: The run's plan.
    """

    def __init__(self, run: RunDirectory, plan: PrivacyPlan) -> None:
        self.run, self.plan = run, plan
        self._last: dict[str, int] = {}
        self._least: dict[str, list[tuple[int, int]]] = {}
        for line in privacy_lines(run):
            self._remember(line)

    def bounds(self, hospital: str, server_round: int, steps: int) -> tuple[int, int]:
        """Return the least and the most steps that a hospital's ledger can show after a round.

        A ledger never shrinks, so it shows at least what is certain of earlier rounds and this
        round's ``steps``; a round that is asked again may be answered at no further cost.
        """
        known = self._least.get(hospital, [])
        earlier = max((count for number, count in known if number < server_round), default=0)
        again = max((count for number, count in known if number >= server_round), default=0)
        return max(earlier + steps, again), self.plan.steps

    def record_reply(self, hospital: str, server_round: int, steps: int) -> None:
        """Write what a checked reply says that the hospital's ledger has charged so far."""
        self._write(ledger_line(self.plan, hospital, server_round, steps))

    def record_missing(
        self, hospital: str, server_round: int, steps: int, *, answered: bool = False
    ) -> None:
        """Write the worst case of a hospital that was asked and whose reply was not accepted.

        It may have released this round's ``steps``; its ledger pays for no more than the plan's.

        Args:
            hospital: Public name.
            server_round: Round, from 1.
            steps: Of the round.
            answered: Whether a reply came, so that the round's steps are certain.
        """
        worst = min(self._last.get(hospital, 0) + steps, self.plan.steps)
        certain = self.bounds(hospital, server_round, steps if answered else 0)[0]
        line = ledger_line(self.plan, hospital, server_round, worst)
        self._write(line.model_copy(update={"least_steps": min(certain, self.plan.steps)}))

    def record_interrupted(
        self, wire: Iterable[Mapping[str, Any]], server_round: int, steps: int
    ) -> None:
        """Write the worst case of hospitals that an earlier process asked and heard no more of.

        Args:
            wire: Lines of wire.jsonl.
            server_round: The round that the earlier process died in.
            steps: Of that round.
        """
        known = {line.hospital for line in privacy_lines(self.run) if line.round == server_round}
        asked = {
            line["hospital"]
            for line in wire
            if (line["direction"], line["kind"], line["round"]) == ("down", "train", server_round)
        }
        for hospital in sorted(asked - known):
            self.record_missing(hospital, server_round, steps)

    def _write(self, line: PrivacyLine) -> None:
        self.run.append(PRIVACY, line.as_json())
        self._remember(line)

    def _remember(self, line: PrivacyLine) -> None:
        self._last[line.hospital] = line.steps
        certain = line.steps if line.least_steps is None else line.least_steps
        self._least.setdefault(line.hospital, []).append((line.round, certain))
