"""``fedrx single``: what a hospital does, on one node that holds everything, without Flower."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from common.config import Config
from common.errors import UserError
from common.limits import default_threads
from common.privacy.budget.receipts import privacy_lines, privacy_summary
from common.privacy.forecast import warnings
from common.privacy.settings import is_private, protects, with_calibrated_noise
from common.provenance import peak_device_bytes, peak_rss_bytes, tensors_sha256, tokens_per_second
from common.records.summary import Summary
from common.rundir import SUMMARY, RunDirectory
from sim.process.progress import Console
from sim.report.terminal import rule
from sim.runs.lifecycle import Kind, Run, resume, start
from sim.runs.preparation import Preparation, with_absolute_paths
from sim.runs.single_training import SingleTraining, scaling


class Single(Kind):
    """One node that trains on everything."""

    mode = "single"
    trains_here = True

    def resolve(self, config: Config) -> Config:
        """Make it one hospital, and resolve the rest."""
        return one_node(config)

    def ready(self, config: Config, preparation: Preparation, console: Console) -> Config:
        """Warn of what the protection costs here."""
        console.say(*warnings(config, preparation.adapter.held_parameters), style="yellow")
        return config

    def place(self, run: Run) -> Mapping[str, object]:
        """Return the step that a run would go on from."""
        names = run.directory.checkpoint_names()
        return {"step": run.directory.checkpoint_facts(names[-1]).step if names else 0}

    def train(self, run: Run) -> Summary:
        """Train from the last checkpoint (or from nothing) to the end."""
        training = SingleTraining(
            run=run.directory,
            config=run.config,
            session=run.worker.session(run.config),
            hospital=run.worker.tokens(run.config, run.preparation.data.hospitals[0]),
            console=run.console,
        )
        training.restore()
        run.seconds_before = training.seconds_before
        run.console.say(*scaling(training).notes)
        with run.curves():
            training.finish()
        loads = run.worker.loads_of(run.config)
        return summarise(training, run.preparation).having(backbone_loads=loads)


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
    alone = replace(config.federation, hospitals=1)
    config = replace(config, federation=alone, adapter=replace(config.adapter, personal=False))
    config = with_absolute_paths(with_calibrated_noise(config))
    threads = config.train.threads or default_threads()
    return replace(config, train=replace(config.train, threads=threads))


def summarise(training: SingleTraining, preparation: Preparation) -> Summary:
    """Return summary.json before the answers: the keys of a federation's, and the steps."""
    run, session = training.run, training.session
    losses = {event.place: event.number for event in run.metrics("validation-loss")}
    steps = run.metrics("train-loss")
    checkpoints = [(name, run.checkpoint_facts(name)) for name in run.checkpoint_names()]
    figures = {
        "mode": Single.mode,
        "trainable_parameters": session.adapter.held_parameters,
        "adapter": session.adapter.spec,
        "backbone": preparation.backbone,
        "hospitals": [{"name": training.hospital.name}]
        if training.guard
        else preparation.data.hospitals,
        "rounds": 0,
        "scaling": scaling(training),
        "checkpoints": [
            {"name": name, **facts.as_json(), "validation_loss": losses.get(facts.step)}
            for name, facts in checkpoints
        ],
        "b_sha256": tensors_sha256(session.adapter.state()),
        "wire": {"tensors": [], "bytes_up": 0, "bytes_down": 0},
        "workers": 1,
        "validation_loss": [losses[step] for step in sorted(losses)],
        "training_seconds": round(training.seconds, 3),
        "tokens_per_second": tokens_per_second(
            sum(event.tokens for event in steps), sum(event.seconds for event in steps)
        ),
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_device_bytes": peak_device_bytes(),
        "device": session.device.value,
        "attention": {"kernel": session.attention.value, "reason": session.attention.reason},
        "dtype": session.dtype,
    }
    if training.guard:
        figures["privacy"] = privacy_summary(training.guard.ledger.plan, privacy_lines(run))
    return Summary.read(figures, what=SUMMARY)


single = partial(start, kind=Single)
"""Train on one node, to the report; after Ctrl-C or SIGTERM a checkpoint is written.

A federated run of the same configuration with one hospital ends in the same B.
"""


def single_inside(around: Run, config: Config, folder: str, title: str) -> RunDirectory:
    """Train in a folder of another run, from where an earlier process has left it.

    Args:
        around: The other run.
        config: Of the run inside; its place and name are made here.
        folder: Name below the other run's.
        title: What a person is told that it is.
    """
    path = around.directory.path / folder
    settings = replace(config.run, directory=str(path), name=f"{config.run.name}-{folder}")
    options: Any = {"console": around.console, "command_line": around.command_line}
    options |= {"inside": True, "worker": around.worker}
    one = RunDirectory(path)
    if one.record() is None:
        around.console.say(rule(title))
        single(replace(config, run=settings), run_dir=path, **options)
    elif not one.is_finished:
        around.console.say(rule(f"{title}, resumed"))
        resume(path, kinds=(Single,), **options)
    return one
