"""One hospital's samples as tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.config import Config
from common.data.partition import Hospital
from common.model.session import Session
from common.seeds import stream
from common.text.batches import Encoded, encode
from common.text.drug_order import in_order

if TYPE_CHECKING:
    from common.data.samples import Admission


@dataclass(frozen=True, kw_only=True)
class HospitalData:
    """One hospital's samples as tokens."""

    name: str
    train: tuple[Encoded, ...]
    validation: tuple[Encoded, ...]


def encode_hospital(hospital: Hospital, session: Session, config: Config) -> HospitalData:
    """Turn a hospital's training and validation samples into tokens.

    ``evaluation.validation-samples`` limits the validation split by a seeded choice.
    """
    validation = list(hospital.validation)
    limit = config.evaluation.validation_samples
    if 0 < limit < len(validation):
        generator = stream(config.evaluation.seed, "validation-samples", hospital.name)
        chosen = sorted(generator.choice(len(validation), size=limit, replace=False).tolist())
        validation = [validation[place] for place in chosen]
    asked, length = config.text, config.train.max_length

    def tokens(admissions: Sequence["Admission"]) -> tuple[Encoded, ...]:
        return tuple(
            encode(one, session.tokenizer, text=asked, max_length_tokens=length)
            for one in admissions
        )

    def ordered(admissions: Sequence["Admission"]) -> tuple[Encoded, ...]:
        return in_order(tokens(admissions), admissions, session.tokenizer, config, hospital.name)

    return HospitalData(
        name=hospital.name,
        train=ordered(hospital.train),
        # Another loss is learnt, so that one is validated.
        validation=tuple(one.in_epoch(0) for one in ordered(validation))
        if config.data.drug_order == "set"
        else tokens(validation),
    )
