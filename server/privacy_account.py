"""What the server knows of each hospital's privacy spending: the run's privacy.jsonl."""

from collections import defaultdict

from common.privacy.budget.receipts import PRIVACY, PrivacyLine, ledger_line, privacy_lines
from common.privacy.plan import PrivacyPlan
from common.rundir import RunDirectory


class PrivacyAccount:
    """Writes a line for every hospital that is asked, and bounds what the next reply may claim.

    What a hospital has told stays in the run directory, so the bounds outlive the server.
    """

    def __init__(self, run: RunDirectory, plan: PrivacyPlan) -> None:
        self.run, self.plan = run, plan
        self._lines: dict[str, list[PrivacyLine]] = defaultdict(list)
        for line in privacy_lines(run):
            self._lines[line.hospital].append(line)

    def bounds(self, hospital: str, server_round: int, steps: int) -> tuple[int, int]:
        """Return the least and the most steps that a hospital's ledger can show after a round.

        A ledger never shrinks, so it shows at least what is certain of earlier rounds and this
        round's ``steps``; a round that is asked again may be answered at no further cost.
        """
        known = self._lines[hospital]
        earlier = max((line.certain for line in known if line.round < server_round), default=0)
        again = max((line.certain for line in known if line.round >= server_round), default=0)
        return max(earlier + steps, again), self.plan.steps

    def record_reply(self, hospital: str, server_round: int, steps: int) -> None:
        """Write what a checked reply says that the hospital's ledger has charged so far."""
        self._write(ledger_line(self.plan, hospital, server_round, steps))

    def record_missing(
        self, hospital: str, server_round: int, steps: int, *, answered: bool = False
    ) -> None:
        """Write the worst case of a hospital that was asked and whose reply was not accepted.

        It may have released this round's ``steps``; its ledger pays for no more than the plan's.

        ``answered``: a reply came, so that the round's steps are certain.
        """
        before = self._lines[hospital][-1].steps if self._lines[hospital] else 0
        worst = min(before + steps, self.plan.steps)
        certain = self.bounds(hospital, server_round, steps if answered else 0)[0]
        line = ledger_line(self.plan, hospital, server_round, worst)
        self._write(line.model_copy(update={"least_steps": min(certain, self.plan.steps)}))

    def record_interrupted(self, server_round: int, steps: int) -> None:
        """Write the worst case of hospitals that an earlier process asked and heard no more of."""
        asked = {
            line.hospital
            for line in self.run.wire()
            if (line.direction, line.kind, line.round) == ("down", "train", server_round)
        }
        for hospital in sorted(asked):
            if all(line.round != server_round for line in self._lines[hospital]):
                self.record_missing(hospital, server_round, steps)

    def _write(self, line: PrivacyLine) -> None:
        self.run.append(PRIVACY, line)
        self._lines[line.hospital].append(line)
