"""What every hospital sent, by round: kept on the server with ``federation.keep-updates``.

One file a round, written when its replies are checked and before they are aggregated; a round that
is asked again replaces it.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.rundir import RunDirectory
from common.tensor_files import Tensors, read_tensors, write_tensors
from common.wire.contract import Update

_WEIGHT = "weight"


def keep(run: RunDirectory, server_round: int, updates: Sequence[Update]) -> None:
    """Write a round's updates as they are aggregated: B (fp32) and weight of each hospital."""
    file = _file(run, server_round)
    file.parent.mkdir(exist_ok=True)
    tensors = {f"{one.hospital}/{key}": value for one in updates for key, value in one.b.items()}
    weights = {f"{one.hospital}/{_WEIGHT}": np.array(one.weight) for one in updates}
    write_tensors(file, tensors | weights)


def read(run: RunDirectory, server_round: int) -> list[Update]:
    """Return a round's updates, sorted by hospital; empty if none were kept.

    Raises:
        Altered: if the file is not what was written.
    """
    file = _file(run, server_round)
    by_hospital: dict[str, Tensors] = {}
    for name, value in (read_tensors(file) if file.exists() else {}).items():
        hospital, _, key = name.partition("/")
        by_hospital.setdefault(hospital, {})[key] = value
    return [
        Update(hospital=hospital, weight=float(b.pop(_WEIGHT)), b=b, metrics={})
        for hospital, b in sorted(by_hospital.items())
    ]


def _file(run: RunDirectory, server_round: int) -> Path:
    return run.path / "updates" / f"round-{server_round:05d}.safetensors"
