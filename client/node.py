"""Which hospital a node is, and what it holds."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from client.epsilon_limit import LimitReached
from client.kept_state import own_folder
from client.policy import POLICY, Policy, read_policy
from client.site import KEYS, NAME
from common.config import Config, FederationConfig, PartitionConfig
from common.configio import completed_for_flwr, run_digest
from common.data.partition import ANY_SIZE, Hospital
from common.data.protocols import require_own_template
from common.errors import RunFailed, UserError
from common.privacy.settings import protects
from common.training.worker import Worker
from common.wire.handshake import NAME_PATTERN

SIMULATED = "num-partitions"
"""Key of the node configuration: how many nodes Flower simulates."""


def local_config(config: Config, node_config: Mapping[str, Any], run_id: int) -> Config:
    """Put a hospital's own paths into the configuration that the server sent.

    In a deployment the node configuration names the hospital (``hospital``), its tables
    (``data``) and the folder for what stays there (``folder``); ``backbone`` is optional.

    Raises:
        RunFailed: if the node configuration lacks a key, or has one that means nothing.
    """
    if SIMULATED in node_config and NAME not in node_config:
        return completed_for_flwr(config, run_id=run_id, nodes=int(node_config[SIMULATED]))
    unknown = sorted(set(node_config) - KEYS)
    if unknown:
        raise RunFailed(
            f"the node configuration has an unknown key {unknown[0]!r}; allowed: "
            f"{', '.join(sorted(KEYS))}; fix: mend the SuperNode's --node-config"
        )
    missing = [key for key in (NAME, "data", "folder") if key not in node_config]
    if missing:
        raise RunFailed(
            f"the node configuration has no {missing[0]!r}; fix: name hospital, data and folder "
            "in the SuperNode's --node-config"
        )
    folder = Path(str(node_config["folder"])) / "runs" / run_digest(config)
    backbone = str(node_config.get("backbone", config.model.backbone))
    return replace(
        config,
        data=replace(config.data, path=str(node_config["data"])),
        model=replace(config.model, backbone=backbone),
        run=replace(config.run, directory=str(folder)),
    )


def own_policy(node_config: Mapping[str, Any]) -> Policy | None:
    """Return the policy of a deployed hospital; a simulated one has none.

    Raises:
        LimitReached: if there is no policy that can be read; the hospital's own doctor says why.
    """
    if NAME not in node_config:
        return None
    try:
        return read_policy(Path(str(node_config["folder"])))
    except UserError:
        raise LimitReached(
            f"this hospital's {POLICY} is missing or broken, so it takes part in nothing"
        ) from None


def hospital_of(config: Config, node_config: Mapping[str, Any], worker: Worker) -> Hospital:
    """Return the samples of the hospital that a Flower node stands for.

    In a simulation Flower numbers the nodes; each is the hospital of that index. A deployed node
    has its own tables, and all of them are its own. The worker keeps what was read.

    Raises:
        RunFailed: if Flower started another number of nodes than there are hospitals, or the
            node's name is not fit for a folder.
        UserError: if its tables cannot be used, or cannot be asked as the configuration says.
    """
    require_own_template(config)
    if NAME in node_config:
        name = str(node_config[NAME])
        if not NAME_PATTERN.fullmatch(name):
            raise RunFailed(f"a hospital's name must match {NAME_PATTERN.pattern}")
        alone = replace(config, federation=FederationConfig(hospitals=1))
        if protects(config):
            alone = replace(alone, partition=PartitionConfig(min_patients=ANY_SIZE))
        return replace(worker.data(alone).hospitals[0], name=name)
    index, nodes = int(node_config["partition-id"]), int(node_config[SIMULATED])
    if nodes != config.federation.hospitals:
        raise RunFailed(
            f"{nodes} simulated SuperNodes for {config.federation.hospitals} hospitals; fix: "
            f'--federation-config "num-supernodes={config.federation.hospitals}"'
        )
    return worker.data(config).hospitals[index]


def private_folder(config: Config, hospital: str) -> Path:
    """Return (and make) the folder of what stays in a hospital."""
    return own_folder(Path(config.run.directory) / "hospitals" / hospital)
