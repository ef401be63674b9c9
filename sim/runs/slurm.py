"""``fedrx sweep --slurm``: the runs of a sweep as jobs, until all of them are finished.

Each cell is a job that runs it from its last checkpoint, so one that was pre-empted, timed out or
killed goes on where it stopped. submitit writes the jobs; without Slurm on the machine they are
processes of it. What the jobs leave in the sweep's folder is what ``fedrx sweep`` leaves.
"""

import shutil
import subprocess
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from common.errors import FedrxError, RunFailed, UserError
from common.limits import available_cpus
from common.rundir import RunDirectory
from sim.process.extras import require_extra
from sim.process.progress import Console
from sim.runs.cells import Cell, Jobs, run_cell

JOBS = "jobs"
"""Folder of the jobs' output below the sweep's."""
TRIES = 3
"""Jobs of one cell that may vanish without a word, as killed ones do."""
SECONDS = 1.0
"""Between two looks at the jobs."""
MINUTES = 24 * 60
"""Time limit of a job where none is set; one that reaches it is queued again."""
LOCAL_MINUTES = 30 * 24 * 60
TIMEOUTS = 1000
VANISHED = "ended without a word"


@dataclass(frozen=True, kw_only=True)
class CellJob:
    """What a job does."""

    cell: Cell
    folder: Path
    """The sweep's."""
    command_line: tuple[str, ...]
    console: type[Console] = Console
    """Made by the job itself, for its output."""

    def __call__(self) -> str:
        """Run the cell, or go on with it; return the line that a person is told of a failure."""
        place = self.folder / self.cell.folder
        try:
            run_cell(self.cell, place, self.console(), self.command_line)
        except FedrxError as error:
            return str(error)
        return ""

    def checkpoint(self) -> Any:
        """Return what submitit queues when the job is pre-empted: the same, which goes on."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def read_options(texts: Sequence[str]) -> dict[str, str]:
    """Return sbatch's options from ``key=value``.

    >>> read_options(["gres=gpu:1", "time=120"])
    {'gres': 'gpu:1', 'time': '120'}

    Raises:
        UserError: for anything else.
    """
    options = {}
    for text in texts:
        key, equals, value = text.partition("=")
        key = key.strip().removeprefix("--")
        if not (equals and key.replace("-", "").isalnum() and value.strip().isprintable()):
            raise UserError(
                f"--slurm-set {text if text.isprintable() else ascii(text)}",
                allowed="key=value as sbatch has it",
                fix="for instance --slurm-set gres=gpu:1",
            )
        options[key] = value.strip()
    return options


def jobs_on(partition: str, options: Sequence[str]) -> Jobs:
    """Return what runs every cell that is not finished, each in a job of its own.

    Args:
        partition: Slurm's.
        options: sbatch's, as ``key=value``.

    Raises:
        UserError: for options that are none, or without submitit.
    """
    if not partition:
        what = "--slurm-set without --slurm" if options else "--slurm names no partition"
        raise UserError(what, fix="add --slurm PARTITION")
    read = read_options(options)
    require_extra("submitit", needed_by="--slurm", without="leave --slurm out")
    return partial(_run_cells, partition, read)


def _run_cells(
    partition: str,
    options: Mapping[str, str],
    cells: Sequence[Cell],
    folder: Path,
    console: Console,
    command_line: Sequence[str],
    finished: Callable[[], None],
) -> None:
    """Run the cells as jobs; on a cluster all nodes must see the folder.

    Raises:
        UserError: if Slurm refuses a job.
        RunFailed: naming the cells that failed; the others are finished.
        KeyboardInterrupt: after Ctrl-C; the jobs are cancelled, and their runs can be gone on with.
    """
    folder = folder.absolute()
    executor, at_once = _executor(folder / JOBS, partition, options)
    if executor.cluster == "local":
        what = f"no Slurm here (srun): {at_once} at a time as processes of this machine"
        console.say(what, style="yellow")
    waiting = deque(cell for cell in cells if not RunDirectory(folder / cell.folder).is_finished)
    command = tuple(command_line)
    job_of = partial(CellJob, folder=folder, command_line=command, console=type(console))
    running = dict[Any, Cell]()
    tries, failed = Counter[str](), dict[str, str]()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                cell = waiting.popleft()
                tries[cell.folder] += 1
                running[_submitted(executor, job_of(cell=cell))] = cell
            for job in [job for job in running if job.done()]:
                cell = running.pop(job)
                why = _failure(job, folder / cell.folder)
                if why == VANISHED and tries[cell.folder] < TRIES:
                    console.say(f"{cell.folder} {why}: again")
                    waiting.append(cell)
                elif why:
                    failed[cell.folder] = why
                else:
                    console.say(f"{cell.folder} is finished")
                    finished()
            if running:
                time.sleep(SECONDS)
    finally:
        for job in running:
            job.cancel(check=False)
    if failed:
        reasons = "; ".join(f"{name}: {why}" for name, why in failed.items())
        raise RunFailed(
            f"{len(failed)} of {len(cells)} cells failed: {reasons}; what the jobs said is in "
            f"{folder / JOBS}; go on with: the same `fedrx sweep`"
        )


def _executor(folder: Path, partition: str, options: Mapping[str, str]) -> tuple[Any, int]:
    """Return submitit's executor, and how many jobs it may have at once."""
    import submitit

    if shutil.which("srun") is None:
        local = submitit.AutoExecutor(folder=folder, cluster="local")
        local.update_parameters(timeout_min=LOCAL_MINUTES)
        return local, max(1, available_cpus() // 2)
    slurm = submitit.AutoExecutor(folder=folder, cluster="slurm", slurm_max_num_timeout=TIMEOUTS)
    slurm.update_parameters(
        name="fedrx-sweep",
        timeout_min=MINUTES,
        slurm_partition=partition,
        slurm_additional_parameters=dict(options),
    )
    return slurm, TIMEOUTS


def _submitted(executor: Any, work: CellJob) -> Any:
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    try:
        return executor.submit(work)
    except (FailedJobError, FailedSubmissionError, subprocess.SubprocessError, OSError) as error:
        line = " ".join(str(error).split())[:300]
        raise UserError(
            f"Slurm does not take the job: {line}", fix="mend --slurm and --slurm-set"
        ) from error


def _failure(job: Any, place: Path) -> str:
    """Return why a job is not finished; empty if it is."""
    from submitit.core.utils import FailedJobError

    error = job.exception()
    if error is None:
        return str(job.result())
    if not isinstance(error, FailedJobError):
        return VANISHED
    # The job's own text may quote data; status.json does not.
    run = RunDirectory(place)
    return (run.record() and run.status().error) or "the job failed"
