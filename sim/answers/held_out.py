"""What models make of held-out patients, without a list: losses, patient by patient."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.config import Config
from common.data.partition import Hospital
from common.data.samples import Admission
from common.errors import UserError
from common.model.session import Session
from common.privacy.membership import patient_losses
from common.tensor_files import Tensors
from common.text.batches import Encoded, encode


def encoded(admissions: Iterable[Admission], session: Session, config: Config) -> list[Encoded]:
    """Return admissions as a run reads them."""
    text, length = config.text, config.train.max_length
    return [
        encode(one, session.tokenizer, text=text, max_length_tokens=length) for one in admissions
    ]


@dataclass(frozen=True)
class HeldOut:
    """Held-out records of all hospitals, and whose patients they are of."""

    records: Sequence[Encoded]
    hospital_of: dict[int, str]
    """By the patient's local key."""

    @classmethod
    def of(cls, hospitals: Sequence[Hospital], session: Session, config: Config) -> "HeldOut":
        """Encode the test splits.

        Raises:
            UserError: if nothing is held out.
        """
        kept = [(one, hospital.name) for hospital in hospitals for one in hospital.test]
        if not kept:
            raise UserError("no held-out patients", fix="raise data.test-fraction")
        records = encoded([one for one, _ in kept], session, config)
        return cls(records, {one.patient: name for one, name in kept})

    @property
    def hospitals(self) -> list[str]:
        """The hospital of each patient, in the order of ``losses``."""
        return [self.hospital_of[patient] for patient in sorted(self.hospital_of)]

    def losses(
        self,
        session: Session,
        models: Iterable[Tensors],
        progress: Callable[[int], None] = lambda done: None,
    ) -> NDArray[np.float64]:
        """Return [M, N]: each patient's loss per answer token (nats) under each model."""
        found = []
        for done, b in enumerate(models, 1):
            found.append(patient_losses(session, self.records, [b])[0][:, 0])
            progress(done)
        return np.stack(found)
