"""Runs that are put together: each is an ordinary run below one folder.

A finished one is not run again, so the same command goes on where it stopped.
"""

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import client.app
from common.config import IN_PROCESS, Config
from common.configio import differences
from common.errors import UserError
from common.provenance import shown_command
from common.records.run import Inputs, RunRecord
from common.records.summary import Summary
from common.rundir import RunDirectory
from sim.process.progress import Console
from sim.runs.federate import federate, resolved
from sim.runs.lifecycle import Kind, Run
from sim.runs.resume import resume
from sim.runs.single import one_node, single
from sim.runs.stages import COMPARISON, TRAINING

RESULTLESS = ("federation.workers",)
"""Keys that cannot change a run's result."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of several."""

    arm: str
    """Name of the arm, with the values that are varied beside it."""
    seed: int
    part: str
    """The hospital of a local-only run; else empty."""
    config: Config
    federated: bool

    @property
    def title(self) -> str:
        """What a person reads of it."""
        return ", ".join(filter(None, (self.arm, f"seed {self.seed}", self.part)))

    @property
    def folder(self) -> str:
        """Name of the run's folder below that of all."""
        parts = (self.arm, f"seed-{self.seed}", self.part)
        return "-".join(part for part in parts if part).replace("=", "-").replace(" ", "-")


Jobs = Callable[[Sequence[Cell], Path, Console, Sequence[str], Callable[[], None]], None]
"""Finishes cells below a folder by other processes: a console, the command line for each, and what
to call when one is finished."""


@dataclass
class Cells(Kind):
    """Runs of one folder, put together once all are finished."""

    resumable = False
    cells: Sequence[Cell]
    trained: Mapping[str, RunDirectory] = field(default_factory=dict)
    """Finished runs elsewhere that stand for cells, by the cells' folders."""
    jobs: Jobs | None = None
    """Finishes cells elsewhere, before this process does."""
    runs: dict[str, RunDirectory] = field(default_factory=dict)
    """All of them, by their cells' folders."""

    def record(self, config: Config, inputs: Inputs) -> RunRecord:
        """Say which runs lie inside."""
        names = tuple(cell.folder for cell in self.cells)
        return RunRecord(mode=self.mode, resumable=False, cells=names)

    def place(self, run: Run) -> Mapping[str, object]:
        """Return how many runs are finished."""
        return {"cells": sum(one.is_finished for one in self.runs.values())}

    def again(self, run: Run) -> str:
        """Return the same command."""
        return shlex.join(shown_command(run.command_line)) or f"the same `fedrx {self.mode}`"

    def finish(self, run: Run) -> None:
        """Run what is not finished; the comparison begins then."""
        below = run.directory.path
        self.runs = {
            name: self.trained.get(name) or RunDirectory(below / name) for name in run.record.cells
        }
        client.app.worker().forget_data()  # of an earlier call: files may have changed since
        run.enter(TRAINING)
        if self.jobs:
            finished = partial(run.enter, TRAINING)
            self.jobs(self.cells, below, run.console, run.command_line, finished)
        for number, cell in enumerate(self.cells, 1):
            run.console.say(f"{number}/{len(self.cells)}: {cell.title}", style="bold")
            run_cell(cell, self.runs[cell.folder].path, run.console, run.command_line)
            run.enter(TRAINING)
        run.enter(COMPARISON)


def run_cell(cell: Cell, folder: Path, console: Console, command_line: Sequence[str]) -> Summary:
    """Run a cell in its folder, or go on with it; a finished one is not run again.

    Raises:
        UserError: if the folder holds another run than the cell's.
    """
    run = RunDirectory(folder)
    # In one process all cells have one backbone and one data set open, hospitals and single node.
    worker = client.app.worker() if cell.config.run.backend == IN_PROCESS else None
    work: Callable[..., object]
    if run.record() is None:
        work = partial(federate if cell.federated else single, cell.config, run_dir=folder)
    else:
        _check_same(cell, run)
        work = partial(resume, folder)
    if not run.is_finished:
        work(console=console, command_line=command_line, inside=True, worker=worker)
    return run.summary()


def _check_same(cell: Cell, run: RunDirectory) -> None:
    """Refuse a run that is not the cell's, by the configurations that both run with."""
    wanted = resolved(cell.config) if cell.federated else one_node(cell.config)
    changed = [
        str(change)
        for change in differences(run.config(), wanted)
        if not change.key.startswith(RESULTLESS)
    ]
    if changed:
        raise UserError(
            f"{run.path} holds a run with another configuration: {'; '.join(changed)}",
            fix="name another --run-dir, or set these keys as they were",
        )
