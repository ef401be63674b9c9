"""The life of a run: begun or gone on with, held alone, trained, answered, reported.

A kind of run (``federate``, ``single``, ``paper``, ``sweep``, ``generalise``, ``audit``) supplies
what differs.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.config import Config
from common.configio import changed_freely, differences, flatten, from_flat, read_config
from common.errors import UserError
from common.provenance import (
    environment,
    peak_device_bytes,
    peak_rss_bytes,
    shown_command,
    source_digest,
)
from common.records import Record
from common.records.run import Inputs, Mode, Resumption, RunRecord
from common.records.summary import Summary
from common.rundir import DATA, ENVIRONMENT, RUN, SUMMARY, RunDirectory
from common.training.worker import Worker
from sim.answers.evaluate import FREE_KEYS, evaluate_run
from sim.process.lock import exclusive
from sim.process.peak_memory import PeakMemory
from sim.process.progress import SILENT, Console
from sim.report.run_report import write_report
from sim.report.terminal import summary_parts
from sim.runs.curves import check_tracker, curves, with_tracker
from sim.runs.preparation import Preparation, data_facts, fingerprints, prepare, require_same_inputs
from sim.runs.stages import (
    EVALUATION,
    REPORT,
    after_training,
    is_trained,
    reported,
    resume_command,
)


class Kind:
    """What differs between kinds of runs, in the order in which a run asks for it."""

    mode: Mode
    resumable = True
    trains_here = False
    """Whether this process trains, with the run's worker."""
    renewed = False
    """Whether a finished run is worked on again when it is resumed."""
    file = SUMMARY
    """Where its result stands."""

    def resolve(self, config: Config) -> Config:
        """Before data is read: fill in what decides the result, refuse what is known to fail."""
        return config

    def prepare(self, config: Config, console: Console, worker: Worker) -> Preparation | None:
        """Read what the run needs; also before it is resumed."""
        return prepare(config, console, worker, trains_here=self.trains_here)

    def ready(self, config: Config, preparation: Preparation, console: Console) -> Config:
        """Before anything is written: check and choose what depends on the data."""
        return config

    def record(self, config: Config, inputs: Inputs) -> RunRecord:
        """Return run.json."""
        flat = flatten(config)
        return RunRecord(mode=self.mode, resumable=self.resumable, config=flat, inputs=inputs)

    def facts(self, record: RunRecord) -> Mapping[str, object]:
        """Return what environment.json says beside the environment."""
        return record.model_dump(mode="json", include={"mode", "config", "inputs"})

    def place(self, run: "Run") -> Mapping[str, object]:
        """Return how far a run has come, for status.json."""
        return {}

    def again(self, run: "Run") -> str:
        """Return the command that goes on with a run; empty where none does."""
        return resume_command(run.directory) if self.resumable else ""

    def trained_in(self, directory: RunDirectory, record: RunRecord) -> Sequence[RunDirectory]:
        """Return the runs whose checkpoints it goes on from."""
        return (directory,)

    def train(self, run: "Run") -> Any:
        """Do what is left of the training, or of what stands in its place, and sum it up."""
        raise NotImplementedError

    def report(self, run: "Run", result: Any) -> None:
        """Write what people read."""
        write_report(run.directory)

    def show(self, run: "Run", result: Any) -> None:
        """Show what came out."""
        run.console.say(*summary_parts(run.directory, result))


@dataclass
class Run:
    """One process's work on a run that it holds alone."""

    kind: Kind
    directory: RunDirectory
    record: RunRecord
    config: Config
    """Resolved, with the run's directory; of a run that is made of others, nothing but defaults."""
    prepared: Preparation | None
    console: Console
    command_line: Sequence[str]
    started: float
    """When this process began to work on it, by ``time.monotonic``."""
    overrides: Sequence[str] = ()
    """How its answers are made, otherwise than it began."""
    seconds_before: float = 0.0
    """Spent by earlier processes."""
    peak: PeakMemory = field(default_factory=PeakMemory)
    worker: Worker = field(default_factory=Worker)
    """Has data and backbone open, for runs inside, training in this process and the answers."""
    result: Record = field(default_factory=Summary)
    """Content of its file, once there is one."""

    @property
    def preparation(self) -> Preparation:
        """What the run reads; an audit reads nothing."""
        assert self.prepared is not None
        return self.prepared

    @property
    def seconds(self) -> float:
        """Seconds of all processes until now."""
        return self.seconds_before + time.monotonic() - self.started

    def curves(self) -> AbstractContextManager[object]:
        """Return what draws the curves of what is trained in its block."""
        return curves(
            self.directory,
            self.config,
            source=self.preparation.data.source,
            command_line=self.command_line,
            console=self.console,
        )

    def enter(self, stage: str) -> None:
        """Say in status.json that a stage begins."""
        self.directory.write_status("running", **{"stage": stage, **self.kind.place(self)})

    def live(self, *, inside: bool) -> "Run":
        """Do what is left, to the report; where that breaks off, status.json says so."""
        kind, directory, console = self.kind, self.directory, None if inside else self.console
        with reported(directory, console, lambda: kind.place(self), again=kind.again(self)):
            self.result = self._answered() if self.record.has_model else kind.train(self)
            directory.write_json(kind.file, self.result)
            self.enter(REPORT)
            kind.report(self, self.result)
            directory.write_status("finished", **kind.place(self))
            kind.show(self, self.result)
        return self

    def _answered(self) -> Summary:
        """Train what is left, and answer held-out patients."""
        directory, data = self.directory, self.preparation.data
        summary = directory.summary()
        spent = sum(directory.numbers("round-seconds"))
        self.seconds_before = summary.training_seconds or float(spent)
        if not is_trained(directory):
            summary = self.kind.train(self)
        if summary.training_seconds is None:
            summary = summary.having(training_seconds=round(self.seconds, 3))
        directory.write_json(SUMMARY, summary.having(source=data.source))
        self.enter(EVALUATION)
        summary = evaluate_run(
            directory, overrides=self.overrides, console=self.console, worker=self.worker, data=data
        )
        devices = [size for size in (summary.peak_device_bytes, peak_device_bytes()) if size]
        return summary.having(
            seconds=round(self.seconds, 3),
            peak_rss_bytes=max(self.peak.bytes, peak_rss_bytes()),
            peak_device_bytes=max(devices, default=None),
        )


def start(
    config: Config,
    kind: Callable[[], Kind],
    *,
    console: Console = SILENT,
    command_line: Sequence[str],
    run_dir: Path | None = None,
    inside: bool = False,
    worker: Worker | None = None,
) -> Run:
    """Begin a run and see it through.

    Args:
        config: Complete configuration.
        kind: What the run does.
        console: Where progress and results are shown.
        command_line: Stored in environment.json.
        run_dir: Run directory; default below ``runs``.
        inside: Whether a run around this one says how to go on.
        worker: Of a run around this one.

    Raises:
        UserError: before anything is written.
        RunFailed: if the work fails; status.json says so too.
        KeyboardInterrupt: after Ctrl-C or SIGTERM.
    """
    started, chosen, worker = time.monotonic(), kind(), worker or Worker()
    RunDirectory.require_new(config, directory=run_dir)
    resolved = config = chosen.resolve(config)
    check_tracker(config, command_line)
    preparation, inputs = chosen.prepare(config, console, worker), Inputs()
    if preparation:
        check_tracker(config, command_line, source=preparation.data.source)
        config, inputs = chosen.ready(config, preparation, console), fingerprints(preparation)
    directory = RunDirectory.made(resolved, directory=run_dir)
    config = replace(config, run=replace(config.run, directory=str(directory.path)))
    with exclusive(directory):
        directory.begin(config)
        if preparation:
            directory.write_json(DATA, data_facts(preparation))
        record = chosen.record(config, inputs)
        directory.write_json(ENVIRONMENT, {**environment(command_line), **chosen.facts(record)})
        directory.write_json(RUN, record)
        console.say(f"run directory: {directory.path}")
        known = (chosen, directory, record, config, preparation, console, command_line, started)
        return Run(*known, worker=worker).live(inside=inside)


def start_or_go_on(
    kind: Kind, folder: Path, *, console: Console = SILENT, command_line: Sequence[str]
) -> Run:
    """Begin a run that is made of others, or go on with it, and see it through.

    Args:
        kind: What the run does; it reads nothing itself.
        folder: Its directory, which may hold finished runs of it.
        console: Where progress and results are shown.
        command_line: Stored in the environment.json of every run inside.

    Raises:
        UserError: if another process is at work on it, or it holds a run of another kind.
        RunFailed: if the work fails; status.json says so too.
        KeyboardInterrupt: after Ctrl-C or SIGTERM.
    """
    started, directory = time.monotonic(), RunDirectory(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive(directory):
        begun = directory.record()
        if begun and begun.mode != kind.mode:
            raise UserError(
                f"{folder} holds a run of another kind ({begun.mode})", fix="name another --run-dir"
            )
        record = kind.record(Config(), Inputs())
        directory.write_json(RUN, record)
        directory.write_status("started")
        known = (kind, directory, record, Config(), None, console, command_line, started)
        return Run(*known).live(inside=False)


def resume(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    kinds: Iterable[Callable[[], Kind]],
    console: Console = SILENT,
    command_line: Sequence[str],
    inside: bool = False,
    worker: Worker | None = None,
) -> Mapping[str, object]:
    """Go on with a run from its last checkpoint.

    Args:
        path: Its run directory.
        overrides: ``key=value``; once training is done, of how answers are made; before, a value
            other than the run's own is refused.
        kinds: Of runs that can be gone on with.
        console: Where progress and results are shown.
        command_line: Added to environment.json.
        inside: Whether a run around this one says how to go on.
        worker: Of a run around this one.

    Returns:
        The content of summary.json; a finished run's is returned as it is.

    Raises:
        UserError: if this is no run, another process is at work on it, its last checkpoint is
            damaged, or its configuration, data or backbone have changed.
    """
    directory = RunDirectory.open(path)
    record, state = directory.record(), directory.status().state
    if record and record.mode == "flower":
        if state != "finished":
            raise UserError(f"{path} was made by plain `flwr run`", fix="start it again with flwr")
        console.say("the run is finished: nothing to do; `fedrx evaluate` gives its answers")
        return directory.summary().as_json()
    if record is None or not record.resumable:
        raise UserError(f"{directory.path} has no run that can be resumed", fix="start it again")
    (kind,) = (one for one in (make() for make in kinds) if one.mode == record.mode)
    answering = record.has_model and state != "finished" and is_trained(directory)
    config = _unchanged_config(directory, record, () if answering else overrides)
    if answering:
        changed_freely(config, overrides, FREE_KEYS)
    if state == "finished" and not kind.renewed:
        if directory.checkpoint_names():
            directory.load_checkpoint()  # says what is wrong with the last one
        console.say("the run is finished: nothing to do")
        return directory.summary().as_json()
    started, worker = time.monotonic(), worker or Worker()
    check_tracker(config, command_line)
    with exclusive(directory):
        for one in kind.trained_in(directory, record):
            _check_checkpoint(one)
        preparation = kind.prepare(config, console, worker)
        if preparation:
            require_same_inputs(record.inputs, preparation)
        _note_resumption(directory, command_line, console)
        known = (kind, directory, record, config, preparation, console, command_line, started)
        run = Run(*known, overrides=overrides if answering else (), worker=worker)
        return run.live(inside=inside).result.as_json()


def _unchanged_config(
    directory: RunDirectory, record: RunRecord, overrides: Sequence[str]
) -> Config:
    """Return the run's configuration, if config.toml with the overrides is still the same.

    Raises:
        UserError: naming every key that differs, with both values.
    """
    begun = from_flat(record.config)
    now = read_config(directory.path / "config.toml", overrides)
    changes = differences(begun, now)
    if changes:
        raise UserError(
            "a run goes on as it began; changed: " + "; ".join(map(str, changes)),
            fix="undo the change, or start a new run with it",
        )
    settings = with_tracker(begun.run, now.run)
    return replace(begun, run=replace(settings, directory=str(directory.path)))


def _check_checkpoint(run: RunDirectory) -> None:
    """Read the checkpoint that a run goes on from, or answers with, before anything is opened.

    Raises:
        UserError: if it is not what was written, or not the one that training ended with.
    """
    names = run.checkpoint_names()
    if run.record() and is_trained(run):
        run.load_checkpoint()
    elif names:
        run.load_checkpoint(names[-1])


def _note_resumption(
    directory: RunDirectory, command_line: Sequence[str], console: Console
) -> None:
    """Add the resumption to environment.json, and warn if the source has changed."""
    facts, digest = directory.environment(), source_digest()
    if digest != facts.source_digest:
        console.say("FedRx's source has changed since the run began", style="yellow")
    now, command = datetime.now(UTC).isoformat(timespec="seconds"), shown_command(command_line)
    entry = Resumption(time=now, command_line=tuple(command), source_digest=digest)
    facts = facts.model_copy(update={"resumed": (*facts.resumed, entry)})
    directory.write_json(ENVIRONMENT, facts)


def evaluate(
    directory: RunDirectory,
    *,
    console: Console = SILENT,
    checkpoint: str | None = None,
    overrides: Iterable[str] = (),
) -> Summary:
    """Answer with a trained run again, and write its report anew; it is finished then.

    Args:
        directory: The run's directory.
        console: Where progress and results are shown.
        checkpoint: Name of a checkpoint; default the last.
        overrides: ``key=value`` of the evaluation, see ``evaluate_run``.

    Raises:
        UserError: If the run's training is not done, another process works on it, or see
            ``evaluate_run``.
        StageFailed: If answering or the report fails.
    """
    status = directory.status()
    if not is_trained(directory):
        what = f"{directory.path} is {status.state}"
        raise UserError(what, allowed="a trained run", fix="`fedrx resume` it")

    place = status.model_dump(include={"round", "step"}, exclude_unset=True)
    with exclusive(directory), after_training(directory, "the answers", "fedrx evaluate"):
        summary = evaluate_run(
            directory, checkpoint=checkpoint, overrides=overrides, console=console
        )
        summary = summary.having(seconds=summary.seconds or summary.training_seconds or 0.0)
        directory.write_json(SUMMARY, summary)
        write_report(directory)
        if status.state != "finished":
            directory.write_status("finished", **place)
        console.say(*summary_parts(directory, summary))
        return summary
