"""One hospital's samples as tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from common.config import Config
from common.data.partition import Hospital
from common.data.samples import Admission
from common.errors import SettingError
from common.model.session import Session
from common.seeds import stream
from common.text.batches import Encoded, encode
from common.text.drug_order import in_order

NOBODY = Admission(patient=0, admission=0, sex="F", age=50)
"""What every prompt has at least."""


@dataclass(frozen=True, kw_only=True)
class HospitalData:
    """One hospital's samples as tokens."""

    name: str
    train: tuple[Encoded, ...]
    validation: tuple[Encoded, ...]


def encode_hospital(hospital: Hospital, session: Session, config: Config) -> HospitalData:
    """Turn a hospital's training and validation samples into tokens.

    ``evaluation.validation-samples`` limits the validation split by a seeded choice.

    With privacy on a sample whose frame ``train.max-length`` does not hold is left out: the server
    chooses the length and the frame, and whether a round fails would tell it of one patient.

    Raises:
        UserError: if ``train.max-length`` holds some sample's frame not; with privacy on, nobody's.
    """
    validation = list(hospital.validation)
    limit = config.evaluation.validation_samples
    if 0 < limit < len(validation):
        generator = stream(config.evaluation.seed, "validation-samples", hospital.name)
        chosen = sorted(generator.choice(len(validation), size=limit, replace=False).tolist())
        validation = [validation[place] for place in chosen]
    private = config.privacy.is_on

    def encoded(admission: Admission) -> Encoded:
        text, length = config.text, config.train.max_length
        return encode(admission, session.tokenizer, text=text, max_length_tokens=length)

    def tokens(admissions: Sequence[Admission], *, ordered: bool) -> tuple[Encoded, ...]:
        kept, samples = [], []
        for one in admissions:
            try:
                samples.append(encoded(one))
            except SettingError:
                if not private:
                    raise
            else:
                kept.append(one)
        if not ordered:
            return tuple(samples)
        return in_order(samples, kept, session.tokenizer, config, hospital.name)

    if private:
        encoded(replace(NOBODY, protocol=config.data.protocol))
    as_set = config.data.drug_order == "set"
    found = tokens(validation, ordered=as_set)
    return HospitalData(
        name=hospital.name,
        train=tokens(hospital.train, ordered=True),
        # Another loss is learnt, so that one is validated.
        validation=tuple(one.in_epoch(0) for one in found) if as_set else found,
    )
