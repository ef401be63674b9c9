"""A run directory that a verb is given: opened, or refused with what to name instead."""

from pathlib import Path

from common.errors import UserError
from common.rundir import RunDirectory

COMPUTING = (
    *("model.attention", "model.kernels", "model.weights"),
    *("train.device", "train.dtype", "train.threads"),
)
"""Keys of where and how a run is computed, which change nothing of what it is."""


def open_run(path: Path) -> RunDirectory:
    """Open a run that has checkpoints and answers of its own.

    Raises:
        UserError: if there is none, or it is a paper run: those lie inside.
    """
    run = RunDirectory.open(path)
    record = run.record()
    if record and record.ranks:
        inside = [str(path / rank_folder(rank)) for rank in record.ranks]
        raise UserError(
            f"{path} is a paper run, with one run for each rank inside",
            allowed=", ".join(inside),
            fix=f"name one of them, for instance {inside[0]}",
        )
    return run


def rank_folder(rank: int) -> str:
    """Return the folder of a rank's run inside the paper run.

    >>> rank_folder(16)
    'rank-16'
    """
    return f"rank-{rank}"


def require_same(what: str, found: str, recorded: str, key: str) -> None:
    """Hold what a run reads to what it was trained with.

    Raises:
        UserError: if its sha256 is another.
    """
    if recorded not in ("", found):
        raise UserError(
            f"{what} is not what the run was trained with: {found[:12]}, not {recorded[:12]}",
            fix=f"restore what {key} named",
        )
