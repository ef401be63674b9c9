"""Which hospital a node is, and what it holds."""

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from client.kept_state import own_folder
from common.config import Config, DataConfig, PartitionConfig
from common.configio import config_hash, settled
from common.data.partition import Hospital, assign_hospitals
from common.data.prepare import load_samples
from common.errors import RunFailed
from common.model.session import Session
from common.seeds import stream
from common.text.batches import Encoded, encode
from common.wire.handshake import NAME_PATTERN

NAME = "hospital"
"""Key of the node configuration: a deployed hospital's name."""
SIMULATED = "num-partitions"
"""Key of the node configuration: how many nodes Flower simulates."""


@dataclass(frozen=True, kw_only=True)
class HospitalData:
    """One hospital's samples as tokens."""

    name: str
    patients: int
    samples: int
    train: tuple[Encoded, ...]
    validation: tuple[Encoded, ...]


def local_config(config: Config, node_config: Mapping[str, Any], run_id: int) -> Config:
    """Put a hospital's own paths into the configuration that the server sent.

    In a deployment the node configuration names the hospital (``hospital``), its tables
    (``data``) and the folder for what stays there (``folder``); ``backbone`` is optional.

    Args:
        config: As Flower hands it over.
        node_config: Flower's, of this node.
        run_id: Flower's run id; names the run directory of plain ``flwr run``.

    Raises:
        RunFailed: if the node configuration lacks a key.
    """
    if SIMULATED in node_config and NAME not in node_config:
        return settled(config, run_id=run_id, nodes=int(node_config[SIMULATED]))
    missing = [key for key in (NAME, "data", "folder") if key not in node_config]
    if missing:
        raise RunFailed(
            f"the node configuration has no {missing[0]!r}; fix: name hospital, data and folder "
            "in the SuperNode's --node-config"
        )
    # Not Flower's run id: a federation that is started again goes on with the hospital's state.
    place = hashlib.sha256(config.run.directory.encode()).hexdigest()[:8]
    folder = Path(str(node_config["folder"])) / "runs" / f"{config_hash(config)}-{place}"
    backbone = str(node_config.get("backbone", config.model.backbone))
    return replace(
        config,
        data=replace(config.data, path=str(node_config["data"])),
        model=replace(config.model, backbone=backbone),
        run=replace(config.run, directory=str(folder)),
    )


def hospital_of(config: Config, node_config: Mapping[str, Any]) -> Hospital:
    """Return the samples of the hospital that a Flower node stands for.

    In a simulation Flower numbers the nodes; each is the hospital of that index. A deployed node
    has its own tables, and all of them are its own.

    Raises:
        RunFailed: if Flower started another number of nodes than there are hospitals, or the
            node's name is not fit for a folder.
    """
    if NAME in node_config:
        name = str(node_config[NAME])
        if not NAME_PATTERN.fullmatch(name):
            raise RunFailed(f"a hospital's name must match {NAME_PATTERN.pattern}")
        return replace(hospitals_of(config.data, config.partition, 1)[0], name=name)
    index, nodes = int(node_config["partition-id"]), int(node_config[SIMULATED])
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
    return own_folder(Path(config.run.directory) / "hospitals" / hospital)
