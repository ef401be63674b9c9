"""What a run says when something fails after training: what is done, what failed, how to go on."""

import errno
import importlib.util
import io
import json
import shlex
import sys
import threading
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import sim.answers.evaluate
import sim.cli.main
import sim.process.failures
import sim.runs.federate
import sim.runs.lifecycle
import sim.runs.paper
import sim.runs.preparation
import sim.runs.resume
import sim.runs.single
import sim.runs.stages
import sim.runs.sweep
from common.config import Config
from common.configio import from_flat
from common.errors import RunFailed, UserError
from common.files import write_bytes
from common.records.run import RunRecord, SavedFacts
from common.rundir import RunDirectory
from common.tensor_files import Altered
from sim.cli.terminal import Terminal
from sim.process.failures import ERROR_LOG, StageFailed
from sim.process.lock import exclusive
from sim.process.progress import SILENT
from sim.runs.stages import (
    EVALUATION,
    REPORT,
    TRAINED,
    TRAINING,
    after_training,
    importing_ahead,
    is_trained,
    resume_command,
)

NEWER_LIBRARY = TypeError("update() got an unexpected keyword argument 'kwargs'")
FULL_DISK = OSError(errno.ENOSPC, "No space left on device", "predictions.jsonl")


def reported(run, console, where=dict):
    """The work on a run that ``fedrx resume`` goes on with."""
    return sim.runs.stages.reported(run, console, where, again=resume_command(run))


def silent() -> Terminal:
    return Terminal(file=io.StringIO(), width=400)


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    """A run whose training is done, in a folder that a shell must quote."""
    made = RunDirectory.create(Config(), directory=tmp_path / "a run [1]")
    made.write_json("run.json", RunRecord(mode="federation", resumable=True))
    made.write_json("data.json", {"source": "synthetic"})
    made.save_checkpoint(
        "round-00004", {"b": np.zeros((1, 1), np.float32)}, facts=SavedFacts(round=4)
    )
    made.write_json("summary.json", {"b_sha256": "0" * 64, "source": "synthetic"})
    return made


def fail(run, error, stage, console=None, **facts):
    run.write_status("running", stage=stage, **facts)
    with pytest.raises(RunFailed) as caught, reported(run, console or silent(), lambda: facts):
        raise error
    return str(caught.value)


@pytest.mark.parametrize("error", [NEWER_LIBRARY, FULL_DISK, MemoryError(), RunFailed("no answer")])
@pytest.mark.parametrize(
    ("stage", "what"), [(TRAINED, "answers"), (EVALUATION, "answers"), (REPORT, "report")]
)
def test_a_failure_after_training_is_one_line_with_all_that_counts(run, error, stage, what):
    line = fail(run, error, stage, round=4)
    b = run.path / "checkpoints" / "round-00004" / "b.safetensors"
    assert b.is_file()
    assert line.startswith(f"training is done, B is in {b}; the {what} failed: ")
    assert line.endswith(f"; go on with: fedrx resume {shlex.quote(str(run.path))}")
    assert "\n" not in line
    status = run.status()
    assert (status.state, status.stage, status.round) == ("failed", stage, 4)
    assert status.error in line
    if isinstance(error, RunFailed):
        assert "no answer" in line
        assert not (run.path / ERROR_LOG).exists()
        return
    log = run.path / ERROR_LOG
    assert f"traceback in {log}" in line
    assert log.stat().st_mode & 0o077 == 0
    assert "Traceback (most recent call last)" in log.read_text()
    assert type(error).__name__ in line


def test_wrong_input_found_after_training_is_a_failure_of_the_run_too(run):
    line = fail(run, UserError("the data is not what the run was trained with"), EVALUATION)
    assert line.startswith("training is done, ")
    with pytest.raises(RunFailed) as caught, reported(run, silent()):
        raise UserError("x")
    assert caught.value.exit_status == 1


def test_a_failure_in_training_goes_to_the_log_and_names_the_resumption(run):
    run.write_status("running", round=2)
    with pytest.raises(StageFailed) as caught, reported(run, silent()):
        raise FULL_DISK
    line = str(caught.value)
    assert line.startswith("training failed: OSError: No space left on device: predictions.jsonl;")
    assert line.endswith(f"fedrx resume {shlex.quote(str(run.path))}")
    assert run.status().stage == TRAINING
    with pytest.raises(RunFailed, match="^below the quorum$"), reported(run, silent()):
        raise RunFailed("below the quorum")


def full_at(monkeypatch, *names):
    """Let the disk be full for files of these names, temporary ones included."""
    write = Path.write_bytes

    def full(self, content):
        if any(name in self.name for name in names):
            raise OSError(errno.ENOSPC, "No space left on device", str(self))
        return write(self, content)

    monkeypatch.setattr(Path, "write_bytes", full)


@pytest.mark.parametrize(
    ("stage", "file", "what"),
    [
        (TRAINING, "b.safetensors", "training failed"),
        (EVALUATION, "predictions.jsonl", "the answers failed"),
        (REPORT, "report.html", "the report failed"),
    ],
)
@pytest.mark.parametrize("status_too", [False, True])
def test_a_full_disk_is_one_line_and_needs_no_traceback(
    run, monkeypatch, stage, file, what, status_too
):
    """At any stage; status.json says so, over the old one where there is no room for another."""
    run.write_status("running", stage=stage)
    full_at(monkeypatch, file, *(["status.json"] if status_too else []))
    with pytest.raises(StageFailed) as caught, reported(run, silent()):
        write_bytes(run.path / file, b"x")
    line = str(caught.value)
    assert f"{what}: {file} cannot be written: No space left on device; fix: make room" in line
    assert line.endswith(f"; go on with: fedrx resume {shlex.quote(str(run.path))}")
    assert ("with --set evaluation.KEY=VALUE" in line) == (stage == EVALUATION)
    assert "\n" not in line
    assert not (run.path / ERROR_LOG).exists()
    assert run.status().state == "failed"


def test_ctrl_c_on_a_full_disk_is_still_an_interruption(run, monkeypatch):
    console = silent()
    full_at(monkeypatch, "status.json")
    with pytest.raises(KeyboardInterrupt), reported(run, console):
        raise KeyboardInterrupt
    assert "go on with: fedrx resume" in console.file.getvalue()
    assert run.status().state == "interrupted"


def test_a_run_whose_last_checkpoint_was_altered_says_so_and_fails(run):
    """Also where how far it has come can no longer be read."""

    def where():
        return {"round": run.checkpoint_facts("round-00004").round}

    assert where() == {"round": 4}
    (run.path / "checkpoints" / "round-00004" / "facts.json").write_text("{}")
    run.write_status("running", round=4)
    with (
        pytest.raises(Altered, match="^checkpoint round-00004 is damaged"),
        reported(run, silent(), where),
    ):
        run.load_checkpoint()
    assert run.status().state == "failed"
    assert "round-00004 is damaged" in run.status().error


def test_where_not_even_the_log_can_be_written_the_line_still_comes(run, monkeypatch, tmp_path):
    """A disk without room: status.json stays as it was, the traceback goes elsewhere."""

    def full(*args, **keys):
        raise FULL_DISK

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr(sim.process.failures.tempfile, "tempdir", str(elsewhere))
    run.write_status("running", stage=EVALUATION)
    before = (run.path / "status.json").read_text()
    monkeypatch.setattr("common.rundir.write_bytes_or_over", full)
    (run.path / ERROR_LOG).mkdir()  # as good as a file that cannot be opened
    with pytest.raises(StageFailed) as caught, reported(run, silent()):
        raise FULL_DISK
    (log,) = elsewhere.iterdir()
    assert f"traceback in {log}" in str(caught.value)
    assert "No space left" in log.read_text()
    assert (run.path / "status.json").read_text() == before
    log.unlink()
    monkeypatch.setattr(sim.process.failures.tempfile, "mkstemp", full)
    with (
        pytest.raises(StageFailed, match="traceback could not be written"),
        reported(run, silent()),
    ):
        raise FULL_DISK


@pytest.mark.parametrize("source", ["credentialed", "synthetic"])
def test_texts_that_may_quote_credentialed_data_stay_in_the_log(run, source):
    run.write_json("data.json", {"source": source})
    line = fail(run, ValueError("Furosemide 40 mg of somebody"), EVALUATION)
    assert ("Furosemide" in line) == (source == "synthetic")
    assert ("Furosemide" in str(run.status())) == (source == "synthetic")
    assert "ValueError" in line
    assert "Furosemide" in (run.path / ERROR_LOG).read_text()


def test_a_finished_run_stays_finished(run):
    run.write_status("finished", round=4)
    with pytest.raises(StageFailed), reported(run, silent()):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")
    assert run.status().state == "finished"


def test_a_run_around_others_names_its_own_command(run, tmp_path):
    outer = RunDirectory.create(Config(), directory=tmp_path / "outer")
    inner = fail(run, NEWER_LIBRARY, EVALUATION)
    with pytest.raises(StageFailed) as caught, reported(outer, silent()), reported(run, silent()):
        raise NEWER_LIBRARY
    line = str(caught.value)
    assert line.partition("; go on with: ")[2] == f"fedrx resume {outer.path}"
    assert line.partition("; go on with: ")[0] == inner.partition("; go on with: ")[0]
    assert outer.status().state == run.status().state == "failed"


def broken_by(error):
    """Training that does not come to its end."""

    def train(self, run):
        raise error

    return train


@pytest.mark.parametrize("error", [KeyboardInterrupt(), NEWER_LIBRARY])
def test_a_sweep_and_a_paper_run_name_themselves_and_no_run_inside(tmp_path, monkeypatch, error):
    """Once, with the command that goes on; after Ctrl-C and after a failure."""
    config, console = from_flat(TINY), silent()
    monkeypatch.setattr(sim.runs.single.Single, "train", broken_by(error))
    typed = ["/opt/bin/fedrx", "sweep", "a c.toml", "--seeds", "1"]
    cells = sim.runs.sweep.plan_cells(config, arms=["centralised"], seeds=[0])
    calls = (
        lambda: sim.runs.sweep.sweep(
            cells, tmp_path / "sweep", console=console, command_line=typed
        ),
        lambda: sim.runs.paper.paper(
            config,
            scale="small",
            ranks=(2,),
            console=console,
            command_line=(),
            run_dir=tmp_path / "paper",
        ),
    )
    for call in calls:
        try:
            call()
        except StageFailed as failed:
            console.print(str(failed))
        except KeyboardInterrupt:
            pass
    said = console.file.getvalue()
    assert [part.splitlines()[0] for part in said.split("go on with: ")[1:]] == [
        "fedrx sweep 'a c.toml' --seeds 1",
        f"fedrx resume {tmp_path / 'paper'}",
    ]


@pytest.mark.parametrize(("what", "verb"), [("the judge", "judge"), ("the report", "report")])
def test_verbs_on_a_trained_run_say_the_same(run, what, verb):
    with pytest.raises(StageFailed) as caught, after_training(run, what, f"fedrx {verb}"):
        raise NEWER_LIBRARY
    line = str(caught.value)
    assert line.startswith("training is done, B is in ")
    assert f"{what} failed: TypeError: update() got" in line
    assert line.endswith(f"; go on with: fedrx {verb} {shlex.quote(str(run.path))}")
    with pytest.raises(UserError, match="^mendable$"), after_training(run, what, verb):
        raise UserError("mendable")


def test_an_interruption_keeps_the_stage(run):
    console = silent()
    run.write_status("running", stage=EVALUATION)
    with pytest.raises(KeyboardInterrupt), reported(run, console):
        raise KeyboardInterrupt
    assert run.status().state == "interrupted"
    assert run.status().stage == EVALUATION
    assert f"fedrx resume {shlex.quote(str(run.path))}" in console.file.getvalue()


def test_only_a_summed_up_training_counts_as_done(run):
    for state, facts, expected in (
        ("running", {}, False),
        ("failed", {"stage": TRAINING}, False),
        ("failed", {"stage": EVALUATION}, True),
        ("failed", {"stage": REPORT}, True),
        ("finished", {}, True),
    ):
        run.write_status(state, **facts)
        assert is_trained(run) is expected
    run.write_json("summary.json", {})
    assert not is_trained(run)


TINY = {
    "data.synthetic-patients": 40,
    "model.backbone": "tiny",
    "adapter.rank": 2,
    "train.steps": 2,
    "train.max-length": 128,
    "train.batch-size": 1,
    "train.dtype": "fp32",
    "train.device": "cpu",
    "train.threads": 1,
    "evaluation.samples": 1,
    "evaluation.max-new-tokens": 8,
    "evaluation.validation-samples": 1,
}


def command(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    """Run the command line in this process."""
    monkeypatch.setattr(sys, "argv", ["fedrx", *arguments])
    with pytest.raises(SystemExit) as ended:
        sim.cli.main.main()
    out, error = capsys.readouterr()
    return int(ended.value.code or 0), out, error


def test_single_fails_in_its_answers_and_goes_on(tmp_path, monkeypatch, capsys):
    """The whole way of a run: failing answers, exit 1 in one line, then both commands go on."""
    config = tmp_path / "c.toml"
    config.write_text("")
    folder = tmp_path / "run"
    sets = [part for key, value in TINY.items() for part in ("--set", f"{key}={value}")]

    def newer(*args, **keys):
        raise NEWER_LIBRARY

    with monkeypatch.context() as broken:
        broken.setattr(sim.answers.evaluate, "evaluate_answers", newer)
        code, _, error = command(
            broken, capsys, "single", str(config), "--run-dir", str(folder), *sets
        )
    run = RunDirectory.open(folder)
    assert code == 1
    assert "Traceback" not in error
    assert error.splitlines()[-1].startswith("fedrx: training is done, B is in ")
    assert (run.status().state, run.status().stage) == ("failed", EVALUATION)
    trained = run.read_json("summary.json")["b_sha256"]

    # With other settings of the answers, and with these alone; no step is taken again.
    steps = (folder / "metrics.jsonl").read_bytes()
    code, _, error = command(monkeypatch, capsys, "resume", str(folder), "--set", "train.seed=4")
    assert code == 2
    assert "--set would change what was trained: train.seed: 0 -> 4" in error
    with monkeypatch.context() as broken:
        broken.setattr(sim.runs.lifecycle, "write_report", newer)
        broken.setattr(sim.runs.single, "SingleTraining", newer)
        code, _, error = command(
            broken, capsys, "resume", str(folder), "--set", "evaluation.max-new-tokens=9"
        )
    assert code == 1
    assert (folder / "metrics.jsonl").read_bytes() == steps
    told = run.summary().evaluation.settings
    assert (told["max_new_tokens"], told["samples"]) == (9, 1)
    assert run.config().evaluation.max_new_tokens == 8
    assert "the report failed: TypeError" in error.splitlines()[-1]
    assert run.status().stage == REPORT

    code, out, error = command(monkeypatch, capsys, "evaluate", str(folder), "--json")
    assert code == 0, error
    assert json.loads(out)["b_sha256"] == trained
    assert run.status().state == "finished"
    assert (folder / "report.html").exists()
    assert command(monkeypatch, capsys, "resume", str(folder))[0] == 0


def test_an_unexpected_error_outside_of_a_run_is_a_line_and_a_log(tmp_path, monkeypatch, capsys):
    def broken(*args, **keys):
        raise NEWER_LIBRARY

    monkeypatch.setattr(sim.process.failures.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("sim.checks.doctor.examine", broken)
    code, _, error = command(monkeypatch, capsys, "doctor")
    assert code == 1
    (line,) = error.splitlines()
    assert line.startswith("fedrx: TypeError at test_stages.py:")
    log = Path(line.rpartition("traceback in ")[2])
    assert "unexpected keyword argument" in log.read_text()


@pytest.mark.parametrize(("number", "status"), [(errno.ENOENT, 2), (errno.ENOSPC, 1)])
def test_a_wrong_path_is_input_and_a_full_disk_is_a_failure(
    tmp_path, monkeypatch, capsys, number, status
):
    def broken(*args, **keys):
        raise OSError(number, "no", "/x/file")

    monkeypatch.setattr(sim.process.failures.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("sim.checks.doctor.examine", broken)
    code, _, error = command(monkeypatch, capsys, "doctor")
    assert code == status
    assert len(error.splitlines()) == 1
    assert "/x/file" in error


def test_evaluate_refuses_a_device_before_it_reads_data(run, monkeypatch):
    run.write_status("finished")
    monkeypatch.setattr(
        sim.answers.evaluate, "open_hospitals", lambda *a: pytest.fail("data was read")
    )
    with pytest.raises(UserError, match="cuda:99"):
        sim.runs.lifecycle.evaluate(run, console=silent(), overrides=["train.device=cuda:99"])
    with exclusive(run):
        pass


def test_a_damaged_status_does_not_hide_what_failed(tmp_path):
    run = RunDirectory.create(Config(), directory=tmp_path / "run")
    (run.path / "status.json").write_text("{")
    with pytest.raises(StageFailed, match="training failed: .*no room"), reported(run, SILENT):
        raise OSError(28, "no room")


def test_what_comes_after_training_is_imported_beside_it(monkeypatch, tmp_path, capfd):
    assert all(importlib.util.find_spec(name) for name in sim.runs.stages.SLOW_IMPORTS)
    # As concurrent.futures says it when Ctrl-C came first, and as a broken package may.
    (tmp_path / "too_late.py").write_text("raise RuntimeError('shutdown')")
    (tmp_path / "broken.py").write_text("import os; os.no_such_name")
    monkeypatch.syspath_prepend(tmp_path)
    names = ("not.there", "too_late", "broken", "this")
    monkeypatch.setattr(sim.runs.stages, "SLOW_IMPORTS", names)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.delitem(sys.modules, "this", raising=False)
    with importing_ahead():
        for thread in threading.enumerate():
            if thread.name == "imports":
                thread.join()
    assert "this" in sys.modules
    assert capfd.readouterr().err == ""


def test_after_training_no_other_thread_imports(monkeypatch, tmp_path):
    """What one thread still imports is half made to another, where modules import each other."""
    gate = ModuleType("gate")
    gate.begun, gate.go = threading.Event(), threading.Event()
    monkeypatch.setitem(sys.modules, "gate", gate)
    (tmp_path / "slow.py").write_text("import gate\ngate.begun.set()\ngate.go.wait(60)\nDONE = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sim.runs.stages, "SLOW_IMPORTS", ("slow", "this"))
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.delitem(sys.modules, "this", raising=False)
    with importing_ahead():
        assert gate.begun.wait(60)
        threading.Timer(0.2, gate.go.set).start()
    assert sys.modules["slow"].DONE
    assert "this" not in sys.modules
