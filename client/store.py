"""What a hospital keeps over rounds: optimizer state, per round, on its own disk."""

from pathlib import Path

import torch

from common.rundir import read_tensors, write_tensors
from common.training.optimiser import TrainState

KEPT_ROUNDS = 2
"""A resumed server may ask for the last round once more, so the state before it stays."""


def load_state(folder: Path, *, before_round: int) -> TrainState:
    """Return the state after the hospital's last round before ``before_round``."""
    earlier = [file for file in _states(folder) if _round(file) < before_round]
    if not earlier:
        return TrainState()
    tensors = read_tensors(earlier[-1])
    return TrainState.from_tensors({k: torch.from_numpy(v) for k, v in tensors.items()})


def save_state(folder: Path, state: TrainState, *, server_round: int) -> None:
    """Write the state after a round atomically, and forget the ones no resume can need."""
    target = folder / f"state-{server_round:05d}.safetensors"
    write_tensors(target, {key: value.numpy() for key, value in state.to_tensors().items()})
    for file in [f for f in _states(folder) if _round(f) <= server_round][:-KEPT_ROUNDS]:
        file.unlink(missing_ok=True)


def _states(folder: Path) -> list[Path]:
    return sorted(folder.glob("state-*.safetensors"))


def _round(file: Path) -> int:
    return int(file.stem.removeprefix("state-"))
