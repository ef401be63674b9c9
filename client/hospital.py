"""Which hospital a node is, and what it holds."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config import Config, DataConfig, PartitionConfig
from common.data.partition import Hospital, assign_hospitals
from common.data.prepare import load_samples
from common.errors import RunFailed
from common.model.session import Session
from common.seeds import stream
from common.text.batches import Encoded, encode


@dataclass(frozen=True, kw_only=True)
class HospitalData:
    """One hospital's samples as tokens."""

    name: str
    patients: int
    samples: int
    train: tuple[Encoded, ...]
    validation: tuple[Encoded, ...]


def hospital_of(config: Config, node_config: Mapping[str, Any]) -> Hospital:
    """Return the samples of the hospital that a Flower node stands for.

    In a simulation Flower numbers the nodes; each is the hospital of that index.

    Raises:
        RunFailed: if Flower started another number of nodes than there are hospitals.
    """
    index, nodes = int(node_config["partition-id"]), int(node_config["num-partitions"])
    if nodes != config.federation.hospitals:
        raise RunFailed(
            f"{nodes} simulated SuperNodes for {config.federation.hospitals} hospitals; fix: "
            f'--federation-config "num-supernodes={config.federation.hospitals}"'
        )
    return hospitals_of(config.data, config.partition, nodes)[index]


@functools.lru_cache(maxsize=1)
def hospitals_of(
    data: DataConfig, partition: PartitionConfig, hospitals: int
) -> tuple[Hospital, ...]:
    """Read the prepared samples and deal them to hospitals; once per process."""
    table = load_samples(data)
    return assign_hospitals(table.admissions, partition, hospitals=hospitals, data=data)


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
    length = config.train.max_length

    def tokens(admissions: object) -> tuple[Encoded, ...]:
        assert isinstance(admissions, list | tuple)
        return tuple(encode(one, session.tokenizer, max_length_tokens=length) for one in admissions)

    return HospitalData(
        name=hospital.name,
        patients=hospital.patients,
        samples=hospital.samples,
        train=tokens(hospital.train),
        validation=tokens(validation),
    )


def private_folder(config: Config, hospital: str) -> Path:
    """Return (and make) the folder of what stays in a hospital."""
    folder = Path(config.run.directory) / "hospitals" / hospital
    folder.mkdir(parents=True, exist_ok=True)
    return folder
