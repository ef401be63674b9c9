"""A single run that ends at any moment goes on to the B of one that never ended.

The run directory is copied before and after everything that changes it: each copy is what a kill
at that moment leaves on the disk.
"""

import json
import os
import pathlib
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest

import common.rundir
import common.tensor_files
import sim.runs.single_training
from common.errors import RunFailed
from common.provenance import tensors_sha256
from common.rundir import RunDirectory
from sim.process.interrupt import Stopped
from sim.runs.single_training import SingleTraining

STEPS = 8
KEYS = {
    "train.steps": STEPS,
    "train.checkpoint-steps": "4,8",
    "train.checkpoint-every": 3,
    "train.schedule": "linear",
    "train.warmup-steps": 2,
}


class Moments:
    """Copies of a run directory, one for each moment at which it changes."""

    def __init__(self, run: RunDirectory, folder: pathlib.Path) -> None:
        self.run, self.folder, self.count = run, folder, 0

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for owner, name in (
            (pathlib.Path, "rename"),
            (pathlib.Path, "replace"),
            (common.rundir.shutil, "rmtree"),
            (common.rundir, "append_json_line"),
        ):
            monkeypatch.setattr(owner, name, self._wrapped(getattr(owner, name)))

    def _wrapped(self, change):
        def changed(*arguments, **options):
            self._copy()
            result = change(*arguments, **options)
            self._copy()
            return result

        return changed

    def _copy(self) -> None:
        shutil.copytree(self.run.path, self.folder / f"{self.count:04d}")
        self.count += 1


def b_hash(training: SingleTraining) -> str:
    return tensors_sha256(training.session.adapter.state())


def told(training: SingleTraining) -> list[tuple[str, int, float]]:
    return [(e.name, e.step, e.value) for e in training.run.metrics()]


def go_on_in(path: pathlib.Path, like: SingleTraining) -> SingleTraining:
    training = SingleTraining(
        run=RunDirectory(path),
        config=like.config,
        session=like.session,
        hospital=like.hospital,
    )
    training.restore()
    training.finish()
    return training


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [{"train.optimizer": "sgd", "train.momentum": 0.9}, {"train.optimizer": "adamw"}],
    ids=["sgd", "adamw"],
)
def test_killed_at_any_moment(keys, configure, begin, tmp_path):
    whole = begin(configure({**KEYS, **keys}))
    moments = Moments(whole.run, tmp_path / "moments")
    with pytest.MonkeyPatch.context() as monkeypatch:
        moments.watch(monkeypatch)
        whole.finish()
    assert moments.count > 80
    expected, events = b_hash(whole), told(whole)
    assert [step for name, step, _ in events if name == "validation-loss"] == [0, 4, 8]
    assert whole.run.checkpoint_names() == ["step-00000004", "step-00000008"]
    starts = set()
    # Every third moment: two neighbours are the same change, before and after.
    for path in sorted((tmp_path / "moments").iterdir())[::3]:
        names = RunDirectory(path).checkpoint_names()
        starts.add(names[-1] if names else "")
        again = go_on_in(path, whole)
        assert b_hash(again) == expected
        assert told(again) == events
        assert again.run.checkpoint_names() == whole.run.checkpoint_names()
    assert starts == {"", "step-00000003", "step-00000004", "step-00000006", "step-00000008"}


def test_a_resumed_run_needs_the_optimizers_state(configure, begin, tmp_path):
    """What the equality above rests on: without the moments B is another one."""
    whole = begin(configure({**KEYS, "train.optimizer": "adamw"}))
    whole.finish()
    cut = tmp_path / "cut"
    shutil.copytree(whole.run.path, cut)
    RunDirectory(cut).remove_checkpoint("step-00000008")
    kept = RunDirectory(cut).load_checkpoint("step-00000004")
    extra = {k: v if k == "step" else np.zeros_like(v) for k, v in kept.extra.items()}
    RunDirectory(cut).save_checkpoint(kept.name, kept.b, facts=kept.facts, extra=extra)
    assert b_hash(go_on_in(cut, whole)) != b_hash(begin(whole.config))


@pytest.mark.parametrize(
    ("number", "step"),
    [(signal.SIGINT, 4), (signal.SIGINT, 6), (signal.SIGTERM, 6), (signal.SIGTERM, 8)],
)
def test_ctrl_c_waits_for_the_step_and_writes_a_checkpoint(
    number, step, configure, begin, monkeypatch
):
    """At a step whose validation loss is due, it is computed when the run goes on."""
    config = configure({**KEYS, "train.checkpoint-every": 0})
    whole = begin(config, name="whole")
    whole.finish()
    expected, events = b_hash(whole), told(whole)
    stopped = begin(config, name="stopped")
    log = SingleTraining._log

    def interrupted(self, report):
        log(self, report)
        if report.step == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(SingleTraining, "_log", interrupted)
    handler = signal.getsignal(number)
    with pytest.raises(Stopped):
        stopped.finish()
    assert signal.getsignal(number) is handler
    assert stopped.run.checkpoint_names() == [f"step-{kept:08d}" for kept in sorted({4, step})]
    monkeypatch.undo()
    again = go_on_in(stopped.run.path, stopped)
    assert b_hash(again) == expected
    assert told(again) == events


def test_a_loss_that_is_not_finite_stops_before_the_update(configure, begin, monkeypatch):
    config = configure({**KEYS, "train.checkpoint-every": 0})
    training = begin(config)
    last = {}

    def poisoned(self, report):
        last["b"] = b_hash(self)
        if report.step == 5:
            scale.fill_(float("nan"))

    scale = training.session.model.model.norm.weight.data
    before = scale.clone()
    monkeypatch.setattr(SingleTraining, "_log", poisoned)
    try:
        with pytest.raises(RunFailed, match=r"step 6: .* not finite"):
            training.finish()
    finally:
        scale.copy_(before)
    assert b_hash(training) == last["b"]
    kept = training.run.load_checkpoint()
    assert (kept.name, tensors_sha256(kept.b)) == ("step-00000005", last["b"])


@pytest.mark.parametrize("withheld", [False, True], ids=["validated", "without-validation"])
@pytest.mark.parametrize(
    ("place", "what"), [(4, "the validation loss|B"), (6, "B")], ids=["kept", "in-between"]
)
def test_b_that_is_not_finite_is_never_a_checkpoint(
    place, what, withheld, configure, begin, monkeypatch
):
    """One update overflows: one line says so, and the last good checkpoint stays."""
    training = begin(configure({**KEYS, "train.checkpoint-steps": "4,8"}))
    if withheld:
        training.hospital = replace(training.hospital, validation=())
    log = SingleTraining._log

    def overflown(self, report):
        log(self, report)
        if report.step == place:
            self.session.adapter.flat[0] = float("inf")

    monkeypatch.setattr(SingleTraining, "_log", overflown)
    with pytest.raises(RunFailed, match=rf"step {place}: ({what}) is not finite"):
        training.finish()
    last = {4: "step-00000003", 6: "step-00000004"}[place]
    assert training.run.load_checkpoint().name == last
    assert all(np.isfinite(v).all() for v in training.run.load_checkpoint().b.values())


def test_a_failing_step_after_an_overflow_saves_nothing(configure, begin, monkeypatch):
    """The step after the overflow finds its loss not finite: B is not good either."""
    training = begin(configure(KEYS))
    log = SingleTraining._log

    def overflown(self, report):
        log(self, report)
        if report.step == 5:
            self.session.adapter.flat[:] = float("nan")

    monkeypatch.setattr(SingleTraining, "_log", overflown)
    with pytest.raises(RunFailed, match=r"step 6: the loss or its gradient is not finite"):
        training.finish()
    assert training.run.load_checkpoint().name == "step-00000004"


def test_a_validation_loss_that_is_not_finite_fails_the_run(configure, begin, monkeypatch):
    """B is finite, and its loss is not: neither the loss nor its checkpoint is written."""
    training = begin(configure(KEYS))
    losses = iter([7.0, float("nan")])
    monkeypatch.setattr(sim.runs.single_training, "evaluate", lambda *_: {"loss": next(losses)})
    with pytest.raises(RunFailed, match="step 4: the validation loss is not finite"):
        training.finish()
    assert [event.value for event in training.run.metrics("validation-loss")] == [7.0]
    assert training.run.load_checkpoint().name == "step-00000003"


def flip_one_bit(file, place):
    """Flip the lowest bit of the byte at a share of the file's length."""
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 1
    file.write_bytes(content)


PARTS = ("b.safetensors", "extra.safetensors", "facts.json")


@pytest.mark.parametrize(
    "damage", ["value", "cut", "no-state", "another-state", "no-digests", *PARTS]
)
def test_a_damaged_checkpoint_is_refused(configure, begin, damage):
    training = begin(configure({**KEYS, "train.optimizer": "adamw"}))
    training.finish()
    folder = training.run.path / "checkpoints" / "step-00000008"
    if damage == "value":
        b = common.tensor_files.read_tensors(folder / "b.safetensors")
        b[min(b)][0, 0] += 1
        common.tensor_files.write_tensors(folder / "b.safetensors", b)
    if damage == "cut":
        content = (folder / "b.safetensors").read_bytes()
        (folder / "b.safetensors").write_bytes(content[: len(content) // 2])
    if damage == "another-state":  # whole in itself, and not this checkpoint's
        before = folder.with_name("step-00000004")
        shutil.copy(before / "extra.safetensors", folder / "extra.safetensors")
    if damage == "no-digests":  # as it was written before there were any
        facts = json.loads((folder / "facts.json").read_text())
        del facts["sha256"]
        (folder / "facts.json").write_text(json.dumps(facts))
    if damage in PARTS:
        flip_one_bit(folder / damage, 0.9)
    if damage == "no-state":
        (folder / "extra.safetensors").unlink()
    with pytest.raises(common.tensor_files.Altered, match="step-00000008 is damaged"):
        begin(training.config)


def test_a_half_removed_checkpoint_is_not_in_the_way(configure, begin):
    run = begin(configure(KEYS)).run
    hidden = run.path / "checkpoints" / ".step-00000003.gone"
    for folder in (hidden, hidden.with_name("step-00000003")):
        folder.mkdir(parents=True)
        (folder / "facts.json").touch()
    run.remove_checkpoint("step-00000003")
    assert not any((run.path / "checkpoints").iterdir())
