"""``fedrx resume``: what it refuses, and that one process at a time works on a run."""

import contextlib

import pytest

import sim.runs.lifecycle
from common.config import Config
from common.configio import flatten, from_flat
from common.errors import UserError
from common.provenance import source_digest
from common.records.run import RunRecord
from common.records.summary import Summary
from common.rundir import RunDirectory
from common.training.worker import Worker
from common.wire.cohort import hospital_names
from sim.process.lock import exclusive
from sim.process.open_run import rank_folder
from sim.process.progress import SILENT
from sim.runs import federate, paper, resume, single
from sim.runs.lifecycle import Kind, Run
from sim.runs.preparation import fingerprints, prepare

KEYS = {
    "model.backbone": "tiny",
    "data.synthetic-patients": 30,
    "train.dtype": "fp32",
    "train.device": "cpu",
    "train.threads": 1,
}


@pytest.fixture
def begun(tmp_path):
    """An interrupted single run, as far as resuming looks at it."""
    config = single.one_node(from_flat(KEYS))
    run = RunDirectory.create(config, directory=tmp_path / "run")
    inputs = fingerprints(prepare(config, SILENT, Worker()))
    record = RunRecord(mode="single", resumable=True, config=flatten(config), inputs=inputs)
    run.write_json("run.json", record)
    run.write_json("environment.json", {"source_digest": source_digest()})
    run.write_status("interrupted")
    return run


@pytest.fixture
def worked(monkeypatch):
    """Replace the work on a run by a look at its lock; lists the runs that were worked on."""
    runs = []

    def look(run):
        with pytest.raises(UserError, match="another process is at work"), exclusive(run):
            pass
        runs.append(run.path.name)
        return Summary()

    monkeypatch.setattr(Run, "_answered", lambda run: look(run.directory))
    for name in ("report", "show"):
        monkeypatch.setattr(Kind, name, lambda *_: None)
    monkeypatch.setattr(paper, "_answer_with_checkpoints", lambda run, *_: look(run))
    return runs


def test_a_run_goes_on_alone_and_says_that_it_was_resumed(begun, worked):
    resume.resume(begun.path, command_line=["/bin/fedrx", "resume"])
    assert worked == ["run"]
    (entry,) = begun.read_json("environment.json")["resumed"]
    assert entry["command_line"] == ["fedrx", "resume"]


def test_without_run_json_there_is_no_run_to_go_on_with(begun, worked):
    (begun.path / "run.json").unlink()
    with pytest.raises(UserError, match="is not a run directory: it has no run.json"):
        resume.resume(begun.path, command_line=[])
    assert worked == []


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"resumable": False}, "no run that can be resumed"),
        ({"mode": "audit", "resumable": False}, "no run that can be resumed"),
        ({"mode": "flower"}, "was made by plain `flwr run`"),
        ({"schema_version": 2}, "written by another version of FedRx; allowed: schema version 1"),
        ({"mode": "swept"}, "run.json: mode: "),
    ],
)
def test_a_run_that_cannot_be_resumed_says_so(begun, worked, keys, message):
    begun.write_json("run.json", {**begun.read_json("run.json"), **keys})
    with pytest.raises(UserError, match=message):
        resume.resume(begun.path, command_line=[])
    assert worked == []


@pytest.mark.parametrize("name", ["samples", "backbone", "a"])
def test_changed_data_backbone_or_a_is_refused(name, begun, worked):
    record, facts = begun.read_json("run.json"), begun.read_json("environment.json")
    record["inputs"][name] = "0" * 64
    begun.write_json("run.json", record)
    with pytest.raises(UserError, match=f"the run's {name} changed since it began: 0000"):
        resume.resume(begun.path, command_line=[])
    assert worked == []
    assert begun.read_json("environment.json") == facts


@pytest.mark.parametrize("mode", ["single", "federation", "flower"])
def test_a_finished_runs_summary_is_read_back(mode, tmp_path):
    run = RunDirectory.create(Config(), directory=tmp_path / "run")
    run.write_json("run.json", RunRecord(mode=mode, resumable=mode != "flower"))
    run.write_status("finished")
    run.write_json("summary.json", {"b_sha256": "0" * 64, "metrics": {"fedrx": {"f1": 0.5}}})
    assert resume.resume(run.path, command_line=[]) == run.read_json("summary.json")
    run.write_json("summary.json", {"metrics": "secret"})
    with pytest.raises(UserError, match=r"summary\.json: metrics: ") as refused:
        resume.resume(run.path, command_line=[])
    assert "secret" not in str(refused.value)


def test_a_run_that_another_process_holds_is_not_touched(begun, worked):
    before = {file.name: file.read_bytes() for file in begun.path.iterdir()}
    with exclusive(begun), pytest.raises(UserError, match="another process is at work"):
        resume.resume(begun.path, command_line=[])
    after = {file.name: file.read_bytes() for file in begun.path.iterdir()}
    assert worked == []
    assert {**after, ".lock": b""} == {**before, ".lock": b""}


@pytest.mark.parametrize("verb", [single.single, federate.federate])
def test_a_new_run_is_worked_on_alone(verb, worked, tmp_path):
    verb(from_flat(KEYS), command_line=[], run_dir=tmp_path / "run")
    assert worked == ["run"]


@pytest.mark.parametrize("still", [True, False])
@pytest.mark.parametrize("verb", [single.single, federate.federate])
def test_a_run_that_another_process_begins_meanwhile_is_its_own(
    verb, still, worked, tmp_path, monkeypatch
):
    """It came while this one read its data; it is ``still`` at work, or finished already."""
    run, other = RunDirectory(tmp_path / "run"), contextlib.ExitStack()

    def late(preparation):
        RunDirectory.create(Config(), directory=run.path)
        other.enter_context(exclusive(run))
        if not still:
            run.write_json("run.json", RunRecord(mode="single", resumable=True))
            other.close()
        return fingerprints(preparation)

    monkeypatch.setattr(sim.runs.lifecycle, "fingerprints", late)
    message = "another process is at work" if still else "is not empty"
    with other, pytest.raises(UserError, match=message):
        verb(from_flat(KEYS), command_line=[], run_dir=run.path)
    assert worked == []
    assert run.config() == Config()


def test_a_hospital_that_is_nowhere_leaves_nothing(worked, tmp_path):
    config = from_flat({**KEYS, "federation.only": "nosuch"})
    with pytest.raises(UserError, match="only=nosuch; allowed: hospital-1 to hospital-3"):
        federate.federate(config, command_line=[], run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    there = from_flat({**KEYS, "federation.only": "hospital-3"})
    federate.federate(there, command_line=[], run_dir=tmp_path / "run")
    assert worked == ["run"]


def test_names_are_those_that_hospitals_get():
    for count in (1, 3, 12):
        config = from_flat({**KEYS, "data.synthetic-patients": 120, "federation.hospitals": count})
        hospitals = prepare(config, SILENT, Worker()).data.hospitals
        assert [one.name for one in hospitals] == hospital_names(count)


def test_a_paper_run_and_its_ranks_are_worked_on_alone(worked, tmp_path, monkeypatch):
    def table(run, *_):
        worked.append("table")
        with pytest.raises(UserError, match="another process is at work"), exclusive(run):
            pass
        return Summary()

    monkeypatch.setattr(paper, "build_table", table)
    for name in ("write_table", "table_parts"):
        monkeypatch.setattr(paper, name, lambda *_: ())
    ranks = (16, 4)
    paper.paper(
        from_flat(KEYS),
        scale="small",
        ranks=ranks,
        command_line=[],
        best=False,
        run_dir=tmp_path / "run",
    )
    names = [rank_folder(rank) for rank in ranks for _ in ("trained", "answered")]
    assert worked == [*names, "table"]
