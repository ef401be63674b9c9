"""How far the start of a simulation has come, as its files tell it."""

from collections.abc import Callable
from pathlib import Path

from common.rundir import RunDirectory
from common.undocumented.ray_names import RAYLET

SUPERLINK, FLOWER, RAY = "SuperLink", "Flower's app", "Ray"
BACKBONE, HANDSHAKE, FIRST_LOSS = "backbone", "handshake", "tokens and first loss"


def phases_of(folder: Path, run: RunDirectory) -> Callable[[], str]:
    """Return what tells the phase of a simulation that is about to start; empty once it trains.

    Args:
        folder: Ray's temporary folder.
        run: The run directory; what earlier attempts have left there does not count.
    """
    before, training = len(run.wire()), False

    def phase() -> str:
        nonlocal training
        kinds = () if training else {line.kind for line in run.wire()[before:]}
        training = training or "train" in kinds
        if training:
            return ""
        if "evaluate" in kinds:
            return FIRST_LOSS
        if any((run.path / "workers").glob("*.json")):
            return HANDSHAKE
        return BACKBONE if (folder / RAYLET).exists() else RAY

    return phase
