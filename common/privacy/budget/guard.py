"""What stands between a hospital's training and everything that leaves it."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from common.files import write_json
from common.model.session import Session
from common.privacy.budget.ledger import Ledger, LedgerDoubtful
from common.privacy.budget.receipts import Receipt, receipt
from common.privacy.mechanism.gradients import PrivateGradient
from common.privacy.mechanism.noise import NoiseSource
from common.privacy.plan import PrivacyPlan
from common.text.batches import Encoded

LEDGER, RECEIPT = "privacy-ledger.jsonl", "privacy-receipt.json"


class Guard:
    """One hospital's ledger and private gradient source, for one stretch of training.

    A federated round and the single-node mode between two checkpoints use it the same way:
    ``charge``, train with ``source``, ``release``, and only then let anything out.

    ``charged`` and ``released`` are the steps that the hospital's other files prove.

    Raises:
        LedgerDoubtful: if the ledger is behind either of them, or behind the last receipt.
    """

    def __init__(
        self,
        plan: PrivacyPlan,
        *,
        hospital: str,
        dataset: Sequence[Encoded],
        folder: Path,
        seed: int,
        micro_batch: int,
        charged: int = 0,
        released: int = 0,
    ) -> None:
        self.hospital, self.folder, self.seed = hospital, folder, seed
        self.ledger = Ledger(folder / LEDGER, plan)
        last = self.ledger.entries()[-1]
        if (folder / RECEIPT).exists():
            shown = Receipt.read((folder / RECEIPT).read_bytes(), what=RECEIPT)
            charged, released = max(charged, shown.steps), max(released, shown.released_steps)
        if last.total_steps < charged or last.released_steps < released:
            raise LedgerDoubtful(
                f"privacy ledger {LEDGER} holds fewer steps than this hospital's other files: it "
                "was removed or restored from an older copy; nothing is released"
            )
        self.source = PrivateGradient(
            dataset, plan, NoiseSource(), seed=seed, micro_batch=micro_batch
        )

    def charge(self, round_number: int, steps: int) -> int:
        """Pay for a stretch before it is trained; returns the steps charged so far.

        Raises:
            BudgetExhausted: if the plan does not pay for it.
        """
        if self.ledger.plan.deterministic_noise:
            text = f"{self.seed}|{self.hospital}|{self.ledger.taken}"
            fixed = NoiseSource(hashlib.sha256(text.encode()).digest())
            self.source.noise, self.source.mechanism = fixed, None
        return self.ledger.charge(round_number, steps)

    def release(
        self, round_number: int, session: Session, source_digest: str, *, result: str
    ) -> None:
        """Record that the stretch's result, by its digest, leaves now; renew the receipt."""
        self.ledger.release(round_number, result)
        self._write_receipt(session, source_digest)

    def record_release(self, steps: int, session: Session, source_digest: str) -> None:
        """Record that a result with the run's first ``steps`` steps is out; renew the receipt."""
        self.ledger.record_release(steps, steps)
        self._write_receipt(session, source_digest)

    def _write_receipt(self, session: Session, source_digest: str) -> None:
        mechanism = self.source.mechanism_for(session)
        shown = receipt(self.hospital, self.ledger, mechanism, source_digest)
        write_json(self.folder / RECEIPT, shown.as_json())
