"""What a hospital keeps over rounds: optimizer state, per round, on its own disk.

Each file carries its digest; one that was altered is refused, and with it the round.
"""

from pathlib import Path

from common.files import json_line, needing_room, read_json_lines, write_text
from common.records.run import StepLine
from common.tensor_files import Tensors, read_tensors, write_tensors
from common.training.optimiser import TrainState

STEPS = "steps.jsonl"
KEPT_ROUNDS = 2
"""A resumed server may ask for the last round once more, so the state before it stays."""


def own_folder(folder: Path) -> Path:
    """Return a folder that its owner alone may read; make it, and those above it, if missing."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    with needing_room("a folder of the hospital's own"):
        for one in reversed(missing):
            one.mkdir(mode=0o700, exist_ok=True)
    return folder


def load_state(folder: Path, *, before_round: int) -> TrainState:
    """Return the state after the hospital's last round before ``before_round``."""
    tensors = load_kept(folder, "state", before_round=before_round)
    if not tensors:
        return TrainState()
    return TrainState.from_tensors(tensors)


def save_state(folder: Path, state: TrainState, *, server_round: int) -> None:
    """Write the state after a round."""
    keep(folder, "state", state.to_tensors(), server_round=server_round)


def kept_steps(folder: Path) -> int:
    """Return the most steps that a kept state has taken; 0 if none is kept."""
    kept = (read_tensors(file) for file in _kept(folder, "state"))
    return max((int(tensors["step"]) for tensors in kept), default=0)


def load_kept(folder: Path, name: str, *, before_round: int) -> Tensors:
    """Return the tensors kept under a name after the last round before ``before_round``."""
    earlier = [file for file in _kept(folder, name) if _round(file) < before_round]
    return read_tensors(earlier[-1]) if earlier else {}


def keep(folder: Path, name: str, tensors: Tensors, *, server_round: int) -> None:
    """Write a round's tensors atomically, and forget the ones that no resume can need."""
    write_tensors(folder / f"{name}-{server_round:05d}.safetensors", tensors)
    for file in [f for f in _kept(folder, name) if _round(f) <= server_round][:-KEPT_ROUNDS]:
        file.unlink(missing_ok=True)


def forget_steps(folder: Path, *, from_round: int) -> None:
    """Drop the step log's lines of rounds that run again, and one that a crash has torn.

    Without a log an empty one is made, which its owner alone may read.
    """
    with needing_room(STEPS):
        (folder / STEPS).touch(mode=0o600)
    lines = [StepLine.read(line, what=STEPS) for line in read_json_lines(folder / STEPS)]
    kept = [line for line in lines if line.round < from_round]
    text = "".join(json_line(line.as_json()) for line in kept)
    if lines != kept or (folder / STEPS).stat().st_size > len(text):
        write_text(folder / STEPS, text)


def _kept(folder: Path, name: str) -> list[Path]:
    return sorted(folder.glob(f"{name}-*.safetensors"))


def _round(file: Path) -> int:
    return int(file.stem.rpartition("-")[2])
