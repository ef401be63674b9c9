"""What a hospital keeps over rounds: optimizer state, per round, on its own disk."""

from pathlib import Path

import torch

from common.files import json_line, read_json_lines, write_text
from common.rundir import read_tensors, write_tensors
from common.training.optimiser import TrainState

STEPS = "steps.jsonl"
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


def forget_steps(folder: Path, *, from_round: int) -> None:
    """Drop the step log's lines of rounds that run again, and one that a crash has torn."""
    lines = read_json_lines(folder / STEPS)
    kept = [line for line in lines if line["round"] < from_round]
    text = "".join(json_line(line) for line in kept)
    if lines != kept or ((folder / STEPS).exists() and (folder / STEPS).stat().st_size > len(text)):
        write_text(folder / STEPS, text)


def _states(folder: Path) -> list[Path]:
    return sorted(folder.glob("state-*.safetensors"))


def _round(file: Path) -> int:
    return int(file.stem.removeprefix("state-"))
