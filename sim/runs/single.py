"""``fedrx single``: what a hospital does, on one node that holds everything, without Flower."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from common.config import Config
from common.configio import flatten
from common.errors import UserError
from common.limits import available_cpus
from common.model.adapter.layout import adapter_spec
from common.privacy.budget.receipts import PRIVACY, privacy_summary
from common.privacy.settings import is_private, protects, with_calibrated_noise
from common.provenance import environment, peak_device_bytes, peak_rss_bytes, tensors_sha256
from common.rundir import RunDirectory
from common.training.worker import Worker
from sim.answers.evaluate import evaluate_run
from sim.process.lock import exclusive
from sim.process.stages import EVALUATION, REPORT, reported
from sim.report.run_report import write_report
from sim.report.terminal import show_summary
from sim.runs.federate import Preparation, data_facts, fingerprints, prepare, with_absolute_paths
from sim.runs.single_training import SingleTraining, scaling

MODE = "single"


def single(
    config: Config,
    *,
    console: Console,
    command_line: Sequence[str],
    run_dir: Path | None = None,
    worker: Worker | None = None,
) -> dict[str, Any]:
    """Train on one node, to the report: the paper's mode.

    A federated run of the same configuration with one hospital ends in the same B.

    Args:
        config: Complete configuration; ``federation.hospitals`` becomes 1.
        console: Where progress and results are shown.
        command_line: Stored in environment.json.
        run_dir: Run directory; default below ``runs``.
        worker: Keeps the backbone over runs; one of its own when None.

    Returns:
        The content of summary.json.

    Raises:
        UserError: before anything is started.
        RunFailed: if a loss or gradient is not finite; status.json says so too.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, with a checkpoint written.
    """
    started = time.monotonic()
    RunDirectory.require_new(config, directory=run_dir)
    config = one_node(config)
    preparation = prepare(config, console)
    facts = {"mode": MODE, "config": flatten(config), "inputs": fingerprints(preparation)}
    facts = {**environment(list(command_line)), **facts}
    run = RunDirectory.create(config, directory=run_dir)
    config = replace(config, run=replace(config.run, directory=str(run.path)))
    run.write_config(config)
    run.write_json("data.json", data_facts(preparation))
    # Last, because it makes the run one that can be resumed.
    run.write_json("environment.json", facts)
    console.print(f"run directory: {run.path}", markup=False, highlight=False)
    with exclusive(run):
        return go_on(run, config, preparation, console, started=started, worker=worker)


def one_node(config: Config) -> Config:
    """Return the configuration with one hospital, absolute paths and a fixed thread count.

    With privacy on the noise is calibrated here.

    Raises:
        UserError: if the configuration protects hospitals, of which there is one.
    """
    if protects(config) and not is_private(config):
        raise UserError(
            "privacy.unit=hospital in a single-node run",
            allowed="patient, admission",
            fix="set privacy.unit",
        )
    config = replace(config, federation=replace(config.federation, hospitals=1))
    config = with_absolute_paths(with_calibrated_noise(config))
    threads = config.train.threads or available_cpus()
    return replace(config, train=replace(config.train, threads=threads))


def go_on(
    run: RunDirectory,
    config: Config,
    preparation: Preparation,
    console: Console,
    *,
    started: float,
    worker: Worker | None = None,
) -> dict[str, Any]:
    """Train from the last checkpoint (or from nothing) to the end, answer and report.

    Args:
        run: The run's directory, held alone.
        config: As it was when the run began.
        preparation: What the run reads.
        console: Where progress and results are shown.
        started: When this process began to work on it, by ``time.monotonic``.
        worker: Keeps the backbone over runs; one of its own when None.
    """
    with reported(run, console, lambda: {"step": last_step(run)}):
        return train_and_answer(run, config, preparation, console, started=started, worker=worker)


def train_and_answer(
    run: RunDirectory,
    config: Config,
    preparation: Preparation,
    console: Console,
    *,
    started: float,
    worker: Worker | None = None,
) -> dict[str, Any]:
    """Do what is left of a run; each part leaves its result in the run directory."""
    worker = worker or Worker()
    session = worker.session(config)
    hospital = worker.tokens(config, preparation.data.hospitals[0])
    training = SingleTraining(
        run=run, config=config, session=session, hospital=hospital, console=console
    )
    training.restore()
    for note in scaling(training)["notes"]:
        console.print(note, markup=False, highlight=False)
    training.finish()
    run.write_json("summary.json", summarise(training, preparation, loads=worker.loads))
    run.write_status("running", stage=EVALUATION, step=training.total.value)
    summary = evaluate_run(run, console=console, worker=worker, data=preparation.data)
    summary |= {
        "seconds": round(training.seconds_before + time.monotonic() - started, 3),
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_device_bytes": peak_device_bytes(),
    }
    run.write_json("summary.json", summary)
    run.write_status("running", stage=REPORT, step=training.total.value)
    write_report(run)
    run.write_status("finished", step=training.total.value)
    show_summary(console, run, summary)
    return summary


def summarise(training: SingleTraining, preparation: Preparation, *, loads: int) -> dict[str, Any]:
    """Return summary.json before the answers: the keys of a federation's, and the steps."""
    run, config, session = training.run, training.config, training.session
    adapter, hospital = config.adapter, preparation.data.hospitals[0]
    losses = {event["step"]: event["value"] for event in run.metrics("validation-loss")}
    guard = training.guard
    privacy = {}
    if guard:
        privacy["privacy"] = privacy_summary(guard.ledger.plan, run.lines(PRIVACY))
    checkpoints = [{"name": name, **run.checkpoint_facts(name)} for name in run.checkpoint_names()]
    return {
        "mode": MODE,
        "trainable_parameters": session.adapter.held_parameters,
        "adapter": {
            "mode": adapter.mode,
            "rank": adapter.rank,
            "alpha": adapter.alpha,
            "targets": list(adapter_spec(adapter).targets),
        },
        "backbone": {
            "name": preparation.backbone.name,
            "fingerprint": preparation.backbone.fingerprint,
        },
        "hospitals": [
            {"name": hospital.name, "patients": hospital.patients, "samples": hospital.samples}
        ],
        "rounds": 0,
        **privacy,
        "scaling": scaling(training),
        "checkpoints": [
            {**facts, "validation_loss": losses.get(facts["step"])} for facts in checkpoints
        ],
        "b_sha256": tensors_sha256(session.adapter.state()),
        "wire": {"tensors": [], "bytes_up": 0, "bytes_down": 0},
        "backbone_loads": loads,
        "workers": 1,
        "validation_loss": [losses[step] for step in sorted(losses)],
        "training_seconds": round(training.seconds, 3),
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_device_bytes": peak_device_bytes(),
        "device": session.device.value,
        "attention": {"kernel": session.attention.value, "reason": session.attention.reason},
        "dtype": session.dtype.as_dict(),
        "source": preparation.data.source,
    }


def last_step(run: RunDirectory) -> int:
    """Return the step that a run would go on from."""
    names = run.checkpoint_names()
    return int(run.checkpoint_facts(names[-1])["step"]) if names else 0
