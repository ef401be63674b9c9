"""``fedrx federate``: check everything, run the federation, answer held-out patients, report."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import client.app
from common.config import IN_PROCESS, Config
from common.configio import flatten
from common.data.dataset import Dataset, open_hospitals
from common.data.partition import Hospital
from common.errors import FedrxError
from common.evaluation.answers import choose_cases
from common.limits import available_cpus
from common.model.adapter.layout import AdapterLayout, adapter_layout, adapter_spec
from common.model.backbone.load import BackboneSpec, resolve_backbone
from common.privacy.mechanism.isolation import check_backbone
from common.privacy.settings import (
    hospital_warning,
    is_private,
    partition_note,
    plan_of,
    protects,
    with_calibrated_noise,
)
from common.provenance import environment, peak_rss_bytes
from common.rundir import RunDirectory
from common.training.budget import checkpoint_steps, steps_in_all, steps_of_round
from common.wire.cohort import check_only
from server.strategies import check_strategy
from sim.answers.evaluate import evaluate_run
from sim.flower.in_process import run_in_process
from sim.flower.superlink import end_leftovers, free_port, run_flower
from sim.flower.worker_count import choose_workers
from sim.process.early import check_settings
from sim.process.lock import exclusive
from sim.process.peak_memory import PeakMemory
from sim.process.progress import RunProgress
from sim.process.stages import EVALUATION, REPORT, reported
from sim.report.run_report import write_report
from sim.report.terminal import show_summary

MODE = "federation"
BUILT_IN = ("synthetic", "embedded", "tiny")
"""Data and backbones that are no folders, even where a folder has their name."""


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What is known before anything is started."""

    data: Dataset
    backbone: BackboneSpec
    layout: AdapterLayout


def prepare(config: Config, console: Console) -> Preparation:
    """Read the data, deal the hospitals and find the backbone.

    Raises:
        UserError: for everything that can be known to fail before the run starts.
    """

    def say(line: str) -> None:
        console.print(line, style="dim", markup=False, highlight=False)

    free_port(config.run.port)
    check_settings(config)
    data = open_hospitals(config, progress=say)
    for hospital in data.hospitals:
        checkpoint_steps(config, steps_in_all(config, len(hospital.train)).value)
    choose_cases(data.hospitals, samples=config.evaluation.samples, seed=config.evaluation.seed)
    backbone = resolve_backbone(config.model.backbone, progress=say)
    if is_private(config):
        check_backbone(backbone)
    layout = adapter_layout(backbone, adapter_spec(config.adapter))
    return Preparation(data=data, backbone=backbone, layout=layout)


def federate(
    config: Config,
    *,
    console: Console,
    command_line: Sequence[str],
    run_dir: Path | None = None,
) -> dict[str, Any]:
    """Run one federation in simulation, to its report.

    Args:
        config: Complete configuration.
        console: Where progress and results are shown.
        command_line: Stored in environment.json.
        run_dir: Run directory; default below ``runs``.

    Returns:
        The content of summary.json.

    Raises:
        UserError: before anything is started.
        RunFailed: if the federation fails; status.json says so too.
    """
    started = time.monotonic()
    check_strategy(config.federation)
    check_only(config.federation)
    RunDirectory.require_new(config, directory=run_dir)
    config = resolved(config)
    preparation = prepare(config, console)
    total_steps(config, preparation.data.hospitals)
    if protects(config) and not is_private(config):
        warning = hospital_warning(plan_of(config), preparation.layout.trainable_parameters)
        console.print(warning, style="yellow", markup=False, highlight=False)
    if partition_note(config):
        console.print(partition_note(config), style="yellow", markup=False, highlight=False)
    run = RunDirectory.create(config, directory=run_dir)
    workers = choose_workers(config, preparation.backbone.shape)
    config = replace(
        config,
        run=replace(config.run, directory=str(run.path)),
        federation=replace(config.federation, workers=workers.value),
    )
    facts = {
        **environment(list(command_line)),
        "mode": MODE,
        "workers": workers.as_dict(),
        "config": flatten(config),
        "inputs": fingerprints(preparation),
    }
    run.write_config(config)
    run.write_json("data.json", data_facts(preparation))
    # Last, because it makes the run one that can be resumed.
    run.write_json("environment.json", facts)
    console.print(f"run directory: {run.path}", markup=False, highlight=False)
    with exclusive(run):
        return go_on(run, config, preparation, console, started=started)


def resolved(config: Config) -> Config:
    """Return the configuration with all that decides a federation's result filled in.

    That is absolute paths, a fixed thread count and, with privacy on, calibrated noise.
    """
    config = with_absolute_paths(with_calibrated_noise(config))
    return replace(config, train=replace(config.train, threads=threads_per_worker(config)))


def go_on(
    run: RunDirectory,
    config: Config,
    preparation: Preparation,
    console: Console,
    *,
    started: float,
) -> dict[str, Any]:
    """Run the rounds after the last checkpoint (or all), answer held-out patients, report.

    Args:
        run: The run's directory, held alone.
        config: Resolved: with run directory, workers and threads.
        preparation: What the run reads.
        console: Where progress and results are shown.
        started: When this process began to work on it, by ``time.monotonic``.
    """
    with reported(run, console, lambda: {"round": last_round(run)}):
        end_leftovers(run.path)
        earlier = len(tracebacks(run))
        try:
            return train_and_answer(run, config, preparation, console, started=started)
        except FedrxError:
            if preparation.data.source != "credentialed":
                show_tracebacks(run, earlier)
            raise


def train_and_answer(
    run: RunDirectory,
    config: Config,
    preparation: Preparation,
    console: Console,
    *,
    started: float,
) -> dict[str, Any]:
    """Do what is left of a run; each part leaves its result in the run directory."""
    peak = PeakMemory()
    started -= seconds_before(run)
    if not trained(run, config):
        run.write_status("started", round=last_round(run))
        shutil.rmtree(run.path / "workers", ignore_errors=True)
        with RunProgress(
            console,
            run,
            steps=total_steps(config, preparation.data.hospitals),
            rounds=config.federation.rounds,
        ) as progress:

            def on_tick() -> None:
                progress.tick()
                peak.tick()

            if config.run.backend == IN_PROCESS:
                run_in_process(config, on_tick=on_tick)
            else:
                run_flower(
                    config,
                    run,
                    workers=config.federation.workers,
                    gpus_per_worker=gpus_per_worker(config, config.federation.workers),
                    on_tick=on_tick,
                )
    summary = run.read_json("summary.json")
    summary.setdefault("training_seconds", round(time.monotonic() - started, 3))
    run.write_json("summary.json", {**summary, "source": preparation.data.source})
    run.write_status("running", stage=EVALUATION, round=config.federation.rounds)
    # With Flower's own processes gone, what this one has kept is all there is.
    summary = evaluate_run(run, console=console, worker=client.app.worker(), data=preparation.data)
    summary["seconds"] = round(time.monotonic() - started, 3)
    summary["peak_rss_bytes"] = max(peak.bytes, peak_rss_bytes())
    run.write_json("summary.json", summary)
    run.write_status("running", stage=REPORT, round=config.federation.rounds)
    write_report(run)
    run.write_status("finished", round=config.federation.rounds)
    show_summary(console, run, summary)
    return summary


def trained(run: RunDirectory, config: Config) -> bool:
    """Return whether all rounds of a run are done and summed up."""
    done = "b_sha256" in run.read_json("summary.json")
    return done and last_round(run) == config.federation.rounds


def seconds_before(run: RunDirectory) -> float:
    """Return what earlier processes spent on a run: its training, or the rounds that count."""
    trained_in = run.read_json("summary.json").get("training_seconds")
    return float(trained_in or sum(event["value"] for event in run.metrics("round-seconds")))


def last_round(run: RunDirectory) -> int:
    """Return the last round that has a checkpoint; -1 before the first."""
    names = run.checkpoint_names()
    return int(run.checkpoint_facts(names[-1])["round"]) if names else -1


def fingerprints(preparation: Preparation) -> dict[str, str]:
    """Return what identifies a run's inputs: a resumed run must read the same."""
    return {
        "samples": preparation.data.digest,
        "backbone": preparation.backbone.fingerprint,
        "a": preparation.layout.a_fingerprint,
    }


def threads_per_worker(config: Config) -> int:
    """Return the CPU threads of each worker: the cores over the hospitals that fit on them.

    It does not depend on ``federation.workers``, because a sum that is split over another number
    of threads differs in its last bit: one, two and three workers give the same B.
    """
    cpus = available_cpus()
    return config.train.threads or max(1, cpus // min(cpus, config.federation.hospitals))


def show_tracebacks(run: RunDirectory, earlier: int) -> None:
    """Print the tracebacks that failing hospitals have left on this machine.

    Args:
        run: The run's directory.
        earlier: Length of what attempts before this one have left.
    """
    text = tracebacks(run)[earlier:].rstrip()
    if text:
        Console(stderr=True, soft_wrap=True).print(text, markup=False, highlight=False)


def tracebacks(run: RunDirectory) -> str:
    """Return the tracebacks that the hospitals of all attempts have left on this machine."""
    file = run.path / "hospitals" / "errors.txt"
    return file.read_text(encoding="utf-8") if file.exists() else ""


def total_steps(config: Config, hospitals: Sequence[Hospital]) -> int:
    """Return the local optimizer steps of all hospitals and rounds (at full participation).

    Raises:
        UserError: if there are fewer steps than rounds.
    """
    rounds = range(1, config.federation.rounds + 1)
    return sum(
        steps_of_round(config, len(hospital.train), number).value
        for hospital in hospitals
        if config.federation.only in ("", hospital.name)
        for number in rounds
    )


def gpus_per_worker(config: Config, workers: int) -> float:
    """Return the share of a GPU that each Ray actor holds."""
    if config.train.device == "cpu" or not torch.cuda.is_available():
        return 0.0
    return min(1.0, torch.cuda.device_count() / workers)


def data_facts(preparation: Preparation) -> dict[str, Any]:
    """Return what data.json holds: hashes, counts and sizes, never rows."""
    table = preparation.data.samples
    return {
        "source": table.source,
        "file_hashes": table.file_hashes,
        "counts": {name: value for name, value in table.counts.items() if name != "age"},
        "hospitals": [
            {
                "name": hospital.name,
                "patients": hospital.patients,
                "samples": hospital.samples,
                "train": len(hospital.train),
                "validation": len(hospital.validation),
                "test": len(hospital.test),
            }
            for hospital in preparation.data.hospitals
        ],
    }


def with_absolute_paths(config: Config) -> Config:
    """Make existing paths absolute, since workers run elsewhere; names (``synthetic``) stay."""
    data, model, evaluation = config.data, config.model, config.evaluation
    return replace(
        config,
        data=replace(data, path=_absolute(data.path), drug_map=_absolute(data.drug_map)),
        model=replace(model, backbone=_absolute(model.backbone)),
        evaluation=replace(
            evaluation,
            formulary=_absolute(evaluation.formulary),
            interactions=_absolute(evaluation.interactions),
        ),
    )


def _absolute(path: str) -> str:
    place = Path(path).expanduser()
    return str(place.absolute()) if path not in ("", *BUILT_IN) and place.exists() else path
