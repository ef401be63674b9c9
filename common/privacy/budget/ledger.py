"""One hospital's privacy ledger: what has been spent, on that hospital's disk.

Append-only JSON lines, each written with one write and fsynced before the call returns. A charge
is recorded before anything that it pays for is released, so that a process killed at any point
has recorded at least what it has released. What was charged and never released pays for a second
attempt: the first one's result never left the hospital.
"""

import json
import os
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from common.errors import RunFailed, UserError
from common.files import locked
from common.privacy.budget.synced import append, read
from common.privacy.plan import PrivacyPlan
from common.records import Record

_TOTALS = ("total_steps", "released_steps")
"""What the ledger's next line starts from."""


class BudgetExhausted(RunFailed):
    """The plan pays for no further step: the hospital sends nothing."""


class LedgerDoubtful(RunFailed):
    """The ledger cannot vouch for what was spent: nothing is released. The text holds no data."""


class Entry(Record):
    """One line of the ledger."""

    number: int
    """Position, from 0: a gap means that a line was lost."""
    event: str
    """``open``, ``charge`` or ``release``."""
    plan: str
    """Fingerprint of the plan."""
    round: int = -1
    steps: int = 0
    """Steps charged by this entry."""
    total_steps: int = 0
    """Steps charged so far: what epsilon is computed from."""
    released_steps: int = 0
    """Steps that results which may have left contain."""
    deterministic: bool = False
    """Whether the noise was reproducible, hence no protection."""
    result: str = ""
    """Digest of the result that a release lets out; empty where it is kept elsewhere."""


class Ledger:
    """The ledger of one hospital for one run.

    ``taken`` are the steps that released results and this object's charges contain.

    Raises:
        UserError: if the plan is not calibrated, or the file belongs to another plan.
        LedgerDoubtful: if the file is damaged.
    """

    def __init__(self, path: Path, plan: PrivacyPlan) -> None:
        _ = plan.sigma
        self.path, self.plan = path, plan
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(self.path) as handle:
            entries = self._read(handle)
            if not entries:
                entries = [self._append(handle, entries, "open")]
                _sync_folder(path.parent)
        self._released = self.taken = entries[-1].released_steps

    def entries(self) -> list[Entry]:
        """Return every entry."""
        with locked(self.path) as handle:
            return self._read(handle)

    @property
    def steps(self) -> int:
        """Steps charged so far."""
        return self.entries()[-1].total_steps

    def charge(self, round_number: int, steps: int) -> int:
        """Pay for ``steps`` releases before they are made.

        Steps that were charged and not released when this object was made are used up first.

        Returns:
            Steps charged so far, these included.

        Raises:
            BudgetExhausted: if the plan does not pay for them; nothing is recorded then.
        """
        with locked(self.path) as handle:
            entries = self._untouched(handle)
            needed = self.taken + steps
            if steps < 0 or needed > self.plan.steps:
                raise BudgetExhausted(
                    f"privacy budget: round {round_number} asks for {steps} steps, "
                    f"{self.plan.steps - self.taken} of {self.plan.steps} are left; "
                    "nothing is released"
                )
            charged = entries[-1].total_steps
            if needed > charged:
                paid = {"steps": needed - charged, "total_steps": needed}
                self._append(handle, entries, "charge", round=round_number, **paid)
            self.taken = needed
            return max(charged, needed)

    def release(self, round_number: int, result: str = "") -> None:
        """Record that a result with all steps charged so far is about to leave, before it does.

        Raises:
            RunFailed: if no step was charged since the last release.
        """
        if self.taken <= self._released:
            raise RunFailed(f"privacy ledger: round {round_number} was not charged")
        self.record_release(round_number, self.taken, result)

    def record_release(self, round_number: int, steps: int, result: str = "") -> None:
        """Record that a result with the run's first ``steps`` steps exists outside the hospital.

        An interrupted stretch contains fewer steps than were charged; the rest stays for the next
        attempt. Nothing is recorded if such a result was released already.

        Raises:
            RunFailed: if the ledger was not charged for that many.
        """
        with locked(self.path) as handle:
            entries = self._untouched(handle)
            if steps > entries[-1].total_steps:
                raise RunFailed(f"privacy ledger: {steps} steps were not charged")
            if steps > self._released:
                out = {"round": round_number, "released_steps": steps, "result": result}
                self._append(handle, entries, "release", **out)
                self._released = self.taken = steps

    def released(self, round_number: int, result: str) -> bool:
        """Return whether this very result of a round was recorded as leaving."""
        wanted = ("release", round_number, result)
        return any((e.event, e.round, e.result) == wanted for e in self.entries())

    def _untouched(self, handle: int) -> list[Entry]:
        """Return the entries, unless another process has released from this ledger meanwhile."""
        entries = self._read(handle)
        if entries[-1].released_steps != self._released:
            raise LedgerDoubtful(
                f"privacy ledger {self.path.name}: another process uses it; nothing is released"
            )
        return entries

    def _append(self, handle: int, entries: list[Entry], event: str, **changes: Any) -> Entry:
        """Write a line: the totals of the one before, and what this one changes."""
        totals = {one: getattr(entries[-1], one) for one in _TOTALS} if entries else {}
        entry = Entry(
            number=len(entries),
            event=event,
            plan=self.plan.fingerprint,
            deterministic=self.plan.deterministic_noise,
            **(totals | changes),
        )
        text = read(handle)
        torn = "\n" if text and not text.endswith("\n") else ""
        line = torn + json.dumps(entry.as_json()) + "\n"
        append(handle, line, self.path, LedgerDoubtful, f"privacy ledger {self.path.name}")
        return entry

    def _read(self, handle: int) -> list[Entry]:
        text = read(handle)
        found = [_entry(line) for line in text.splitlines()]
        if found and found[-1] is None and not text.endswith("\n"):
            # a process was killed within its write: that charge never returned to its caller
            found.pop()
        entries = [entry for entry in found if entry is not None]
        charged = released = 0
        for number, entry in enumerate(entries):
            charged += entry.steps
            whole = (entry.number, entry.total_steps) == (number, charged)
            if not whole or not released <= entry.released_steps <= charged:
                raise self._damaged()
            released = entry.released_steps
            if entry.plan != self.plan.fingerprint:
                raise UserError(
                    f"privacy ledger {self.path.name} was opened with another privacy plan",
                    fix="resume with the run's own configuration, or start a new run",
                )
        if found and found[-1] is None:
            raise self._damaged()
        return entries

    def _damaged(self) -> LedgerDoubtful:
        return LedgerDoubtful(f"privacy ledger {self.path.name} is damaged: nothing is released")


def _entry(line: str) -> Entry | None:
    """Return a line's entry, or None for what is no whole entry."""
    try:
        entry = Entry.model_validate_json(line, strict=True)
    except ValidationError:
        return None
    return entry if entry.model_fields_set == set(Entry.model_fields) else None


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
