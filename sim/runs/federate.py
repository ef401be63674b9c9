"""``fedrx federate``: a federation in simulation, through to its report."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial

import torch

import client.app
from common.config import IN_PROCESS, Config
from common.data.handling import handling_of
from common.data.partition import Hospital
from common.errors import FedrxError
from common.limits import available_cpus, default_threads
from common.privacy.forecast import warnings
from common.privacy.settings import partition_note, with_calibrated_noise
from common.records.run import Inputs, RunRecord
from common.records.summary import Summary
from common.rundir import RunDirectory
from common.training.budget import steps_of_round
from common.wire.cohort import check_only, trained_by
from server.known import layout_record
from server.strategies import check_strategy
from sim.flower.in_process import run_in_process
from sim.flower.superlink import end_leftovers, run_flower
from sim.flower.worker_count import choose_workers
from sim.process.progress import Console, RunProgress
from sim.runs.lifecycle import Kind, Run, start
from sim.runs.preparation import Preparation, with_absolute_paths
from sim.runs.stages import importing_ahead


class Federation(Kind):
    """Hospitals that train together: rounds by Flower on Ray, or in this process."""

    mode = "federation"

    def resolve(self, config: Config) -> Config:
        """Check what no data decides, and resolve the rest."""
        check_strategy(config.federation)
        check_only(config.federation)
        return resolved(config)

    def ready(self, config: Config, preparation: Preparation, console: Console) -> Config:
        """Warn of what the protection costs here, and choose the workers."""
        steps = total_steps(config, preparation.data.hospitals)
        notes = warnings(config, preparation.adapter.held_parameters)
        console.say(*filter(None, [*notes, partition_note(config)]), style="yellow")
        self.layout = layout_record(config, preparation.backbone, preparation.adapter)
        self.workers = choose_workers(config, preparation.backbone.shape, steps=steps)
        return replace(config, federation=replace(config.federation, workers=self.workers.value))

    def record(self, config: Config, inputs: Inputs) -> RunRecord:
        """Tell the server what it must know of backbone and adapter."""
        return super().record(config, inputs).model_copy(update={"layout": self.layout})

    def facts(self, record: RunRecord) -> Mapping[str, object]:
        """Say how many workers there are, and why."""
        return {**super().facts(record), "workers": asdict(self.workers)}

    def place(self, run: Run) -> Mapping[str, object]:
        """Return the last round that has a checkpoint; -1 before the first."""
        names = run.directory.checkpoint_names()
        return {"round": run.directory.checkpoint_facts(names[-1]).round if names else -1}

    def train(self, run: Run) -> Summary:
        """Run the rounds after the last checkpoint (or all); the server sums them up."""
        end_leftovers(run.directory.path)
        earlier = len(tracebacks(run.directory))
        try:
            start = train_rounds(run)
            summary = run.directory.summary()
            return summary.having(start_seconds=start) if start else summary
        except FedrxError:
            traceback = tracebacks(run.directory)[earlier:].rstrip()
            if traceback and handling_of(run.preparation.data.source).is_open:
                run.console.say(traceback, error=True)
            raise


def train_rounds(run: Run) -> dict[str, float]:
    """Run the rounds that are left, with progress shown; return the seconds of their start."""
    config, directory = run.config, run.directory
    directory.write_status("started", **run.kind.place(run))
    shutil.rmtree(directory.path / "workers", ignore_errors=True)
    steps = total_steps(config, run.preparation.data.hospitals)
    rounds = config.federation.rounds
    with run.curves(), RunProgress(run.console, directory, steps=steps, rounds=rounds) as progress:

        def on_tick() -> None:
            progress.tick()
            run.peak.tick()

        if config.run.backend == IN_PROCESS:
            run.worker = client.app.worker()
            run_in_process(config, run.preparation.data, on_tick=on_tick)
        else:
            workers = config.federation.workers
            with importing_ahead():
                run_flower(
                    config,
                    directory,
                    workers=workers,
                    gpus_per_worker=gpus_per_worker(config, workers),
                    on_tick=on_tick,
                    on_phase=progress.phase,
                )
    return progress.start_seconds


def resolved(config: Config) -> Config:
    """Return the configuration with all that decides a federation's result filled in.

    That is absolute paths, a fixed thread count and, with privacy on, calibrated noise.
    """
    config = with_absolute_paths(with_calibrated_noise(config))
    return replace(config, train=replace(config.train, threads=threads_per_worker(config)))


def threads_per_worker(config: Config) -> int:
    """Return the CPU threads of each worker: the cores over the hospitals that fit on them.

    It does not depend on ``federation.workers``, because a sum that is split over another number
    of threads differs in its last bit: one, two and three workers give the same B.
    """
    cpus = available_cpus()
    each = max(1, cpus // min(cpus, config.federation.hospitals))
    return config.train.threads or min(each, default_threads())


def tracebacks(directory: RunDirectory) -> str:
    """Return the tracebacks that the hospitals of all attempts have left on this machine."""
    file = directory.path / "hospitals" / "errors.txt"
    return file.read_text(encoding="utf-8") if file.exists() else ""


def total_steps(config: Config, hospitals: Sequence[Hospital]) -> int:
    """Return the local optimizer steps of all hospitals and rounds (at full participation).

    Raises:
        UserError: if there are fewer steps than rounds.
    """
    rounds, only = range(1, config.federation.rounds + 1), trained_by(config.federation)
    return sum(
        steps_of_round(config, len(hospital.train), number).value
        for hospital in hospitals
        if not only or hospital.name in only
        for number in rounds
    )


def gpus_per_worker(config: Config, workers: int) -> float:
    """Return the share of a GPU that each Ray actor holds."""
    if config.train.device == "cpu" or not torch.cuda.is_available():
        return 0.0
    return min(1.0, torch.cuda.device_count() / workers)


federate = partial(start, kind=Federation)
"""Run one federation in simulation."""
