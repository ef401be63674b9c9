"""A damaged file of a run: one line and exit status 2 from every verb, before work begins."""

import shutil
import sys

import pytest

import sim.checks.audit_membership
import sim.checks.forget
import sim.cli.main
from common.config import Config
from common.records.run import RunRecord, SavedFacts
from common.rundir import RunDirectory
from common.tensor_files import Altered
from sim.process.open_run import rank_folder
from sim.runs.federate import federate
from sim.runs.resume import resume

DAMAGED = (
    "fedrx: checkpoint round-00001 is damaged, was altered, or is an earlier FedRx's, which kept "
    "no digests: it is not used; allowed: the file as it was written; fix: bring it back from a "
    "copy, or start a new run; a run whose training is not done goes on from the checkpoint before "
    "it, once this one is removed"
)
READERS = (
    ["resume"],
    ["evaluate"],
    ["evaluate", "--checkpoint", "round-00000"],
    ["export"],
    ["suggest", "--sex", "F", "--age", "60", "--diagnosis", "I50.9"],
    ["audit", "--membership"],
    ["forget", "--hospital", "hospital-1"],
    ["generalise", "--seeds", "1"],
)
WORK = (
    *("sim.runs.lifecycle.prepare", "sim.answers.evaluate.reopen", "sim.runs.cells.run_cell"),
    *("sim.checks.audit_membership.reopen", "sim.checks.forget.run_cell"),
)
"""What reads data, opens the backbone or trains."""


@pytest.fixture(scope="module")
def whole(tiny_config, tmp_path_factory) -> RunDirectory:
    """A finished federation of one round that kept its updates."""
    config = tiny_config(
        federation__keep_updates=True,
        federation__rounds=1,
        data__synthetic_patients=60,
        evaluation__samples=2,
        evaluation__max_new_tokens=8,
        run__backend="in-process",
    )
    folder = tmp_path_factory.mktemp("whole") / "run"
    return federate(config, command_line=[], run_dir=folder).directory


@pytest.fixture
def run(whole, tmp_path) -> RunDirectory:
    """A copy that a test may damage."""
    shutil.copytree(whole.path, tmp_path / "run")
    return RunDirectory(tmp_path / "run")


def flip(file):
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def end_early(run, *, trained):
    """Leave what a kill leaves: in the last round, or after it."""
    if trained:
        run.write_status("failed", stage="evaluation")
    else:
        run.write_status("interrupted", stage="training")
        (run.path / "summary.json").unlink()


@pytest.fixture
def idle(monkeypatch):
    """Let no verb come to its work."""
    for name in WORK:
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("work has begun"))


@pytest.fixture
def told(run, monkeypatch, capsys):
    """Give a command on the run; returns its exit status and what a person is told of an error."""

    def command(verb, *arguments) -> tuple[int, list[str]]:
        monkeypatch.setattr(sys, "argv", ["fedrx", *verb.split(), str(run.path), *arguments])
        with pytest.raises(SystemExit) as ended:
            sim.cli.main.main()
        return int(ended.value.code or 0), capsys.readouterr().err.splitlines()

    return command


@pytest.mark.parametrize("part", ["b.safetensors", "facts.json"])
@pytest.mark.parametrize("words", READERS, ids=" ".join)
def test_a_damaged_checkpoint_is_the_same_line_from_every_verb(words, part, run, told, idle):
    flip(run.path / "checkpoints" / "round-00001" / part)
    assert told(*words) == (2, [DAMAGED])
    assert run.status().state == "finished"


@pytest.mark.parametrize(
    ("name", "commands"),
    [
        ("predictions.jsonl", [["judge", "--dry-run"], ["review make"], ["report"]]),
        (
            "updates/round-00001.safetensors",
            [["contribution"], ["forget", "--hospital", "hospital-1"]],
        ),
        ("summary.json", [*READERS, ["report"], ["judge", "--dry-run"], ["contribution"]]),
    ],
)
def test_other_damaged_files_are_a_line_and_status_2_too(name, commands, run, told):
    (run.path / name).write_bytes(b"{")
    for words in commands:
        status, (line,) = told(*words)
        assert status == 2
        assert f"{name.rpartition('/')[2]} is damaged" in line
        assert "; fix: bring it back from a copy" in line
        assert "go on with" not in line


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("part", ["b.safetensors", "facts.json"])
def test_a_resumed_run_says_it_before_anything_is_opened(part, trained, run, told, idle):
    end_early(run, trained=trained)
    flip(run.path / "checkpoints" / "round-00001" / part)
    before = run.status()
    assert told("resume") == (2, [DAMAGED])
    assert run.status() == before


def test_a_trained_run_without_its_last_checkpoint_is_refused_at_once(run, told, idle):
    end_early(run, trained=True)
    for left in ("ended with another B than that of its last checkpoint", "has no checkpoint"):
        run.remove_checkpoint(run.checkpoint_names()[-1])
        for verb in ("resume", "evaluate"):
            status, (line,) = told(verb)
            assert status == 2
            assert left in line


def test_what_the_line_advises_helps(run, whole, told):
    """Once the damaged checkpoint is removed, the run goes on to the same B."""
    end_early(run, trained=False)
    flip(run.path / "checkpoints" / "round-00001" / "b.safetensors")
    assert told("resume") == (2, [DAMAGED])
    shutil.rmtree(run.path / "checkpoints" / "round-00001")
    assert told("resume") == (0, [])
    assert run.status().state == "finished"
    assert run.summary().b_sha256 == whole.summary().b_sha256


def test_a_finished_run_that_has_lost_its_summary_is_not_told_to_finish(run, told):
    (run.path / "summary.json").unlink()
    for words in (["resume"], ["evaluate"], ["report"], ["export"]):
        status, (line,) = told(*words)
        assert status == 2
        assert "is finished, and its summary.json is gone; fix: bring it back" in line
        assert "fedrx resume" not in line


@pytest.mark.parametrize("inside", [rank_folder(16), rank_folder(32), "best"])
def test_a_paper_run_looks_at_the_runs_inside_first(inside, b, tmp_path, idle):
    paper = RunDirectory.create(Config(), directory=tmp_path / "paper")
    paper.write_json("run.json", RunRecord(mode="paper", resumable=True, ranks=(16, 32)))
    paper.write_status("interrupted")
    one = RunDirectory.create(Config(), directory=paper.path / inside)
    folder = one.save_checkpoint("step-00000001", b, facts=SavedFacts(step=1))
    flip(folder / "b.safetensors")
    with pytest.raises(Altered, match="^checkpoint step-00000001 is damaged"):
        resume(paper.path, command_line=[])


@pytest.fixture
def b(whole):
    return whole.load_checkpoint().b
