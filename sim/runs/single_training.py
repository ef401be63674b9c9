"""The training of a single-node run: steps, checkpoints, and going on from one.

A checkpoint holds B and the optimizer's state. The data order and the learning rate are pure
functions of the global step, so nothing else is needed to go on to the same B.

With privacy on, a checkpoint is a release: the steps up to it are charged before they are taken,
and no loss is computed.
"""

import math
import time
from dataclasses import dataclass

import numpy as np

from client.local_update import evaluate
from client.private_update import guard_of
from common.config import Config
from common.errors import RunFailed
from common.model.adapter.layout import initial_tensors
from common.model.session import Session
from common.privacy.budget.guard import Guard
from common.privacy.budget.receipts import PRIVACY, ledger_line
from common.privacy.settings import is_private
from common.provenance import source_digest, tensors_sha256
from common.records.run import SavedFacts
from common.records.summary import Scaling
from common.rundir import RunDirectory
from common.tensor_files import Tensors, damaged
from common.training.budget import checkpoint_steps, steps_in_all, steps_per_epoch, stretches
from common.training.hospital_data import HospitalData
from common.training.loop import StepReport, train
from common.training.optimiser import TrainState
from sim.process.interrupt import Stop, Stopped, deferred_stop
from sim.process.progress import SILENT, Console, Meter


@dataclass(kw_only=True)
class SingleTraining:
    """One run's training: what its steps need, and what is written as they pass."""

    run: RunDirectory
    config: Config
    session: Session
    hospital: HospitalData
    console: Console = SILENT

    def __post_init__(self) -> None:
        self.guard: Guard | None = None
        if is_private(self.config):
            folder = self.run.hospital(self.hospital.name)
            self.guard = guard_of(self.config, self.hospital, folder)
        self.total = steps_in_all(self.config, 0 if self.guard else len(self.hospital.train))
        self.kept = checkpoint_steps(self.config, self.total.value)
        self.state = TrainState()
        self.seconds_before = 0.0
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds of training, those before a resume included."""
        return self.seconds_before + time.monotonic() - self._started

    def restore(self) -> None:
        """Go back to the last checkpoint, or to the start; forget the events that came after it.

        Raises:
            Altered: if the checkpoint is damaged.
        """
        adapter = self.session.adapter
        names = self.run.checkpoint_names()
        if not names:
            adapter.load(initial_tensors(adapter.shapes, adapter.spec))
            self.run.forget_metrics(after=-1)
            return
        checkpoint = self.run.load_checkpoint(names[-1])
        adapter.load(checkpoint.b)
        try:
            self.state = TrainState.from_tensors(checkpoint.extra)
        except KeyError:
            raise damaged(checkpoint.name) from None
        self.seconds_before = checkpoint.facts.seconds
        self.run.forget_metrics(after=self.state.step)
        self._record_release()
        self._tidy()

    def finish(self) -> None:
        """Take the steps that are left.

        Raises:
            Stopped: if an end was asked for; a checkpoint is written.
            RunFailed: if a loss, gradient or B is not finite; the last good B is kept.
        """
        self.run.write_status("running", step=self.state.step)
        meter = Meter(self.console, "steps", self.total.value, done=self.state.step)
        with deferred_stop() as stop, meter:
            if self.state.step in {0, *self.kept.value} and not self._validated():
                self._validate()
                stop.check()
            for place in self._places():
                self._train_to(place, stop, meter)
                if place in self.kept.value:
                    self._validate()
                self._save()
                stop.check()

    def _validated(self) -> bool:
        """Tell whether the loss of B as it is has been logged: an end may come just before."""
        return any(e.step == self.state.step for e in self.run.metrics("validation-loss"))

    def _places(self) -> list[int]:
        """Return the steps still ahead at which something is written."""
        every, total = self.config.train.checkpoint_every, self.total.value
        places = {*self.kept.value, *(range(every, total, every) if every else ())}
        return sorted(place for place in places if place > self.state.step)

    def _train_to(self, place: int, stop: Stop, meter: Meter) -> None:
        def on_step(report: StepReport) -> None:
            self._log(report)
            meter.update(report.step, "" if report.loss is None else f"loss {report.loss:.4f}")
            stop.check()

        if self.guard:
            self.guard.charge(place, place - self.state.step)
        try:
            # A round of a federation may train another part of the adapter.
            for server_round, stop_at in stretches(
                self.config,
                self.session.adapter.spec.scheme,
                0 if self.guard else len(self.hospital.train),
                start=self.state.step,
                stop=place,
            ):
                self.session.adapter.start_round(server_round)
                train(
                    self.session,
                    self.hospital.train,
                    self.config.train,
                    self.state,
                    steps=stop_at - self.state.step,
                    schedule_steps=self.total.value,
                    stream=self.hospital.name,
                    on_step=on_step,
                    source=self.guard.source if self.guard else None,
                )
        except (Stopped, RunFailed):
            # Both come between two updates, so B and the optimizer's state belong together.
            if self.state.step and math.isfinite(b_norm(self.session.adapter.state())):
                self._save()
            raise

    def _log(self, report: StepReport) -> None:
        self.run.metric(
            "train-loss",
            report.loss,
            step=report.step,
            gradient_norm=report.gradient_norm,
            learning_rate=report.learning_rate,
            tokens=report.tokens,
            seconds=round(report.seconds, 4),
        )

    def _validate(self) -> None:
        """Log the validation loss of B as it is, before its checkpoint makes it final."""
        if self.guard or not self.hospital.validation:
            return
        loss = evaluate(self.session, self.hospital, self.session.adapter.state())["loss"]
        step = self.state.step
        self._require_finite("the validation loss", loss)
        self.run.metric("validation-loss", loss, step=step)
        moment = f"step {step}/{self.total.value}" if step else "untrained"
        self.console.say(f"{moment}: validation loss {loss:.4f}")

    def _require_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise RunFailed(
                f"step {self.state.step}: {what} is not finite; earlier checkpoints stay "
                "(start anew with a lower train.learning-rate, or set train.max-grad-norm)"
            )

    def _save(self) -> None:
        """Write a checkpoint."""
        step = self.state.step
        b = self.session.adapter.state()
        norm = b_norm(b)
        self._require_finite("B", norm)
        self.run.save_checkpoint(
            checkpoint_name(step),
            b,
            facts=SavedFacts(
                step=step,
                b_sha256=tensors_sha256(b),
                b_norm=norm,
                seconds=round(self.seconds, 3),
            ),
            extra=self.state.to_tensors(),
        )
        self._record_release()
        self._tidy()
        self.run.write_status("running", step=step)

    def _record_release(self) -> None:
        """With privacy on: tell the ledger which steps are out, and add to privacy.jsonl.

        The steps were charged before they were taken, so a kill between a checkpoint and this
        costs nothing: the next process begins by recording it.
        """
        if self.guard:
            self.guard.record_release(self.state.step, self.session, source_digest())
            ledger = self.guard.ledger
            line = ledger_line(ledger.plan, self.hospital.name, self.state.step, ledger.steps)
            self.run.append(PRIVACY, line)
            spent = f"step {self.state.step}/{self.total.value}: epsilon {float(line.epsilon):.3f}"
            self.console.say(f"{spent} spent")

    def _tidy(self) -> None:
        """Remove checkpoints that were only there to resume from, but for the last."""
        keep = {checkpoint_name(step) for step in self.kept.value}
        for name in self.run.checkpoint_names()[:-1]:
            if name not in keep:
                self.run.remove_checkpoint(name)


def scaling(training: SingleTraining) -> Scaling:
    """Return how the asked-for steps fit the samples that are there, in figures and in words."""
    config, steps = training.config, training.total.value
    samples = per_epoch = epochs = None
    notes = [f"{steps} steps from {training.total.reason}"]
    if not training.guard:
        samples = len(training.hospital.train)
        per_epoch = steps_per_epoch(config, samples)
        epochs = round(steps / per_epoch, 3)
        passes = f"{steps / per_epoch:.3g} passes over {samples} training samples"
        notes = [f"{notes[0]}: {passes}, {per_epoch} steps each"]
        if samples < config.data.train_samples:
            notes.append(f"data.train-samples={config.data.train_samples}: there are {samples}")
    if "scaled" in training.kept.reason:
        kept = ", ".join(map(str, training.kept.value))
        notes.append(f"{training.kept.reason}: {kept}")
    return Scaling(
        train_samples=samples,
        steps=steps,
        steps_per_epoch=per_epoch,
        epochs=epochs,
        checkpoint_steps=training.kept.value,
        notes=tuple(notes),
    )


def checkpoint_name(step: int) -> str:
    """Return the name of a step's checkpoint; names sort in time.

    >>> checkpoint_name(1950)
    'step-00001950'
    """
    return f"step-{step:08d}"


def b_norm(b: Tensors) -> float:
    """Return the L2 norm of all matrices together.

    >>> b_norm({"a": np.array([[3.0]]), "b": np.array([[4.0]])})
    5.0
    """
    squares = (np.square(value, dtype=np.float64).sum() for value in b.values())
    return float(np.sqrt(sum(squares)))
