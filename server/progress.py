"""What Flower's own log shows of a run: where it is kept, and the losses of each round."""

import logging
from collections.abc import Sequence

from common.rundir import RunDirectory
from common.wire.contract import Update

log = logging.getLogger("flwr.fedrx")
"""Below Flower's logger, which `flwr run --stream` and `flwr log` show."""


def round_line(number: int, rounds: int, updates: Sequence[Update], loss: float | None) -> str:
    """Return one line on a finished round; with privacy on no loss leaves a hospital.

    >>> one, other = (Update(hospital=h, b={}, weight=w, metrics={"train-loss": 2.0 * w})
    ...               for h, w in (("a", 1.0), ("b", 3.0)))
    >>> round_line(2, 4, [one, other], 1.5)
    'round 2 of 4: 2 hospitals, training loss 5.0000, validation loss 1.5000'
    >>> round_line(0, 4, [], None)
    'round 0 of 4'
    """
    parts = [f"{len(updates)} hospitals"] if updates else []
    with_loss = [update for update in updates if "train-loss" in update.metrics]
    if with_loss:
        total = sum(update.metrics["train-loss"] * update.weight for update in with_loss)
        mean = total / sum(update.weight for update in with_loss)
        parts.append(f"training loss {mean:.4f}")
    if loss is not None:
        parts.append(f"validation loss {loss:.4f}")
    return f"round {number} of {rounds}" + (": " if parts else "") + ", ".join(parts)


def note_start(run: RunDirectory) -> None:
    """Say where the run is kept."""
    log.info("run directory: %s", run.path)


def note_end(run: RunDirectory) -> None:
    """Say how a run that nobody goes on with gets its answers and its report."""
    log.info("trained; for answers and a report: fedrx evaluate %s", run.path)
