"""``fedrx sweep --slurm``: jobs by submitit's local executor, two of which are disturbed."""

import contextlib
import io
import os
import signal
import stat
import threading
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from waiting import until

from common.config import DataConfig
from common.errors import RunFailed, UserError
from common.rundir import RunDirectory
from sim.cli.terminal import Terminal
from sim.process import extras
from sim.process.progress import SILENT
from sim.runs import slurm
from sim.runs.single import single
from sim.runs.slurm import JOBS, CellJob, jobs_on, read_options
from sim.runs.sweep import plan_cells, sweep

pytest.importorskip("submitit")

TOLD = {"partition": "gpu", "options": (), "command_line": ["fedrx", "sweep"]}


def run_cells(cells, folder, *, partition, options, console, command_line):
    """Run them as jobs alone, for ``sweep`` makes the table; return how often one was finished."""
    ended = []
    jobs_on(partition, options)(cells, folder, console, command_line, lambda: ended.append(None))
    return len(ended)


def single_cells(tiny_config, seeds, **keys):
    config = tiny_config(evaluation__samples=2, evaluation__max_new_tokens=8, **keys)
    return plan_cells(config, arms=["centralised"], seeds=range(seeds))


def worker_of(cell, folder):
    """The process that a cell's job runs in, once its run has a checkpoint."""
    run = RunDirectory(folder / cell.folder)
    until(run.checkpoint_names, "the first checkpoint", 300, pause=0.005)
    for file in (folder / JOBS).glob("*_log.out"):
        with contextlib.suppress(psutil.Error):  # jobs that have ended
            controller = psutil.Process(int(file.name.split("_")[0]))
            for worker in controller.children(recursive=True):
                if run.path / ".lock" in [Path(one.path) for one in worker.open_files()]:
                    return controller, worker
    raise AssertionError("no process works on the run")


@pytest.mark.process
def test_three_cells_finish_though_one_is_killed_and_one_pre_empted(
    tiny_config, tmp_path, monkeypatch
):
    import submitit

    assert submitit.__version__
    monkeypatch.setattr(slurm, "SECONDS", 0.1)
    # So long it waits for the result of a job that has ended: on one machine it is there.
    monkeypatch.setattr("submitit.core.core.Job._results_timeout_s", 1)
    monkeypatch.setattr(slurm.shutil, "which", lambda name: None)
    cells = single_cells(tiny_config, 3, train__checkpoint_every=1, train__steps=40)
    folder = tmp_path / "sweep"
    disturbed = []

    def disturb():
        controller, worker = worker_of(cells[1], folder)
        for process in (controller, worker):
            process.kill()
        disturbed.append("killed")
        _, worker = worker_of(cells[2], folder)
        worker.send_signal(signal.SIGUSR2)
        disturbed.append("pre-empted")

    thread = threading.Thread(target=disturb, daemon=True)
    thread.start()
    shown = io.StringIO()
    console = Terminal(file=shown, width=200)
    assert run_cells(cells, folder, console=console, **TOLD) == 3
    thread.join(60)
    assert disturbed == ["killed", "pre-empted"]
    lines = shown.getvalue()
    assert "no Slurm here" in lines
    assert f"{cells[1].folder} ended without a word: again" in lines
    runs = [RunDirectory(folder / cell.folder) for cell in cells]
    assert [run.status().state for run in runs] == ["finished"] * 3
    resumed = [len(run.read_json("environment.json").get("resumed", [])) for run in runs]
    assert resumed == [0, 1, 1]
    # The table is that of the same sweep; nothing is left to run.
    before = [run.read_json("summary.json") for run in runs]
    rows = sweep(cells, folder, command_line=["fedrx"]).as_json()
    assert [run.read_json("summary.json") for run in runs] == before
    assert rows["rows"][0]["runs"] == 3
    # Nothing is submitted for what is finished.
    jobs = set((folder / JOBS).iterdir())
    run_cells(cells, folder, console=console, **TOLD)
    assert set((folder / JOBS).iterdir()) == jobs


class Job:
    """A job that ended in some way."""

    def __init__(self, error):
        self.error, self.cancelled = error, False

    def done(self):
        return True

    def exception(self):
        return None if isinstance(self.error, str) else self.error

    def result(self):
        return self.error or ""

    def cancel(self, check):
        self.cancelled = True


class Executor:
    """Takes jobs, and lets each end as it is told."""

    cluster = "slurm"

    def __init__(self, ends):
        self.ends, self.submitted, self.jobs = ends, [], []

    def submit(self, work):
        self.submitted.append(work.cell.folder)
        end = self.ends.pop(0)
        if isinstance(end, type) and issubclass(end, BaseException):
            raise end
        self.jobs.append(Job(end))
        return self.jobs[-1]


@pytest.fixture
def ending(monkeypatch):
    """Let the jobs end in the order in which they are submitted."""

    def end(*errors):
        executor = Executor(list(errors))
        monkeypatch.setattr(slurm, "SECONDS", 0)
        monkeypatch.setattr(slurm, "_executor", lambda *_: (executor, 2))
        return executor

    return end


def test_what_vanishes_is_submitted_three_times_and_what_fails_once(tiny_config, tmp_path, ending):
    from submitit.core.utils import FailedJobError, UncompletedJobError

    cells = single_cells(tiny_config, 3)
    gone, failed = UncompletedJobError("gone"), FailedJobError("Zebediah Quux")
    executor = ending(gone, failed, None, gone, gone)
    with pytest.raises(RunFailed) as error:
        run_cells(cells, tmp_path, console=SILENT, **TOLD)
    names = [cell.folder for cell in cells]
    assert executor.submitted == [names[0], names[1], names[2], names[0], names[0]]
    line = str(error.value)
    assert line.startswith("2 of 3 cells failed: ")
    assert f"{names[0]}: ended without a word" in line
    assert f"{names[1]}: the job failed" in line
    assert "go on with: the same `fedrx sweep`" in line
    assert "Quux" not in line


def test_what_a_person_can_mend_is_the_cells_own_line(tiny_config, tmp_path, ending, monkeypatch):
    """Before there is a run directory too: the job hands its line over."""
    cells = single_cells(tiny_config, 2)
    wrong = replace(cells[0], config=replace(cells[0].config, data=DataConfig(path="/no/where")))
    told = CellJob(cell=wrong, folder=tmp_path, command_line=("fedrx",))()
    with pytest.raises(UserError) as own:
        single(wrong.config, console=SILENT, command_line=(), run_dir=tmp_path / "own")
    assert told == str(own.value)
    ending(told, None)
    with pytest.raises(RunFailed) as error:
        run_cells([wrong, cells[1]], tmp_path / "sweep", console=SILENT, **TOLD)
    assert str(error.value).startswith(f"1 of 2 cells failed: {wrong.folder}: {told}; what the ")
    assert "\n" not in str(error.value)


def test_jobs_are_cancelled_where_the_sweep_ends(tiny_config, tmp_path, ending):
    executor = ending(None, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        run_cells(single_cells(tiny_config, 2), tmp_path, console=SILENT, **TOLD)
    assert [job.cancelled for job in executor.jobs] == [True]


def test_a_pre_empted_job_is_queued_as_it_was(tiny_config, tmp_path):
    (cell,) = single_cells(tiny_config, 1)
    job = CellJob(cell=cell, folder=tmp_path, command_line=("fedrx",))
    assert job.checkpoint().function == job


@pytest.mark.process
def test_slurm_gets_partition_and_options_and_its_refusal_is_one_line(
    tiny_config, tmp_path, monkeypatch
):
    """A fake sbatch keeps the script that it is given."""
    tools = tmp_path / "bin"
    tools.mkdir()
    script = tmp_path / "script.sh"
    for name, text in (
        ("srun", "exit 0"),
        ("sbatch", f"cp $1 {script}; echo 'sbatch: error: invalid partition: gpu' >&2; exit 1"),
    ):
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o700 | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    told = {**TOLD, "options": ["gres=gpu:1", "--account=heart", "time=90"]}
    with pytest.raises(UserError) as error:
        run_cells(single_cells(tiny_config, 1), tmp_path / "sweep", console=SILENT, **told)
    assert "invalid partition: gpu" in str(error.value)
    assert "\n" not in str(error.value)
    lines = script.read_text().splitlines()
    for option in ("partition=gpu", "gres=gpu:1", "account=heart", "time=90"):
        assert f"#SBATCH --{option}" in lines
    assert any("submitit.core._submit" in line for line in lines)


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"partition": "", "options": ["gres=gpu:1"]}, "--slurm-set without --slurm"),
        ({"partition": ""}, "--slurm names no partition; fix: add --slurm PARTITION"),
        ({"options": ["gres"]}, "--slurm-set gres; allowed: key=value"),
        ({"options": ["=1"]}, "--slurm-set =1; allowed: key=value"),
        ({"options": ["a b=1"]}, "--slurm-set a b=1; allowed: key=value"),
        ({"options": ["mem=1\n#SBATCH --uid=0"]}, "^--slurm-set 'mem=1.n#SBATCH --uid=0'; allo"),
        ({"options": ["me\nm=1"]}, "^--slurm-set 'me.nm=1'; allowed: key=value"),
    ],
)
def test_wrong_options_are_one_line(tiny_config, tmp_path, told, words):
    with pytest.raises(UserError, match=words) as error:
        run_cells((), tmp_path / "sweep", console=SILENT, **{**TOLD, **told})
    assert "\n" not in str(error.value)
    assert not (tmp_path / "sweep").exists()


def test_without_submitit_it_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--slurm needs the package submitit; fix: pip install '"):
        run_cells((), tmp_path / "sweep", console=SILENT, **TOLD)
    assert not (tmp_path / "sweep").exists()


def test_options_are_read():
    assert read_options(["cpus-per-task = 8"]) == {"cpus-per-task": "8"}
