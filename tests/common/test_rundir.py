"""The run directory: nothing half-written looks finished."""

import ast
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common.config import Config
from common.errors import UserError
from common.files import append_json_line, atomic_path, read_json_lines, write_json, write_text
from common.provenance import source_digest, source_root, tensors_sha256
from common.records.run import RunRecord, SavedFacts
from common.records.summary import Summary
from common.rundir import RunDirectory
from common.tensor_files import Altered


def b_of(value):
    return {"layer.lora_B": np.full((2, 3), value, np.float32)}


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path):
    target = tmp_path / "x.json"
    write_json(target, {"a": 1})
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert json.loads(target.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(target, {"a": float("nan")})
    assert json.loads(target.read_text()) == {"a": 1}


def test_a_torn_last_line_is_left_out(tmp_path):
    file = tmp_path / "x.jsonl"
    append_json_line(file, {"a": 1})
    with file.open("a") as lines:
        lines.write('{"a": 2')
    assert read_json_lines(file) == [{"a": 1}]
    assert read_json_lines(tmp_path / "absent.jsonl") == []


@pytest.mark.parametrize("kept", [1, 8, 12, 13, 17])
def test_a_record_after_a_torn_line_is_whole(kept, tmp_path):
    """Torn anywhere, also within a letter of two bytes; the records around it stay."""
    file = tmp_path / "x.jsonl"
    append_json_line(file, {"a": 1})
    torn = json.dumps({"name": "größe"}, ensure_ascii=False).encode()
    with file.open("ab") as lines:
        lines.write(torn[:kept])
    assert read_json_lines(file) == [{"a": 1}]
    append_json_line(file, {"a": 2})
    append_json_line(file, {"a": 3})
    assert read_json_lines(file) == [{"a": 1}, {"a": 2}, {"a": 3}]
    only = tmp_path / "only.jsonl"
    only.write_bytes(torn[:kept])
    append_json_line(only, {"a": 1})
    assert read_json_lines(only) == [{"a": 1}]


def test_text_with_exotic_line_breaks_stays_one_line(tmp_path):
    record = {"text": "a\u2028b\u0085c\x0cd"}
    append_json_line(tmp_path / "x.jsonl", record)
    assert read_json_lines(tmp_path / "x.jsonl") == [record]


def test_text_that_utf8_cannot_hold_is_written_and_reads_back(tmp_path):
    """In JSON the escape is the character itself; in other text it is what a person sees."""
    record = {"na\udc80me": "half \ud83d, whole \U0001f600"}
    append_json_line(tmp_path / "x.jsonl", record)
    assert read_json_lines(tmp_path / "x.jsonl") == [record]
    write_json(tmp_path / "x.json", record)
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == record
    write_text(tmp_path / "x.md", "half \ud83d")
    assert (tmp_path / "x.md").read_text(encoding="utf-8") == r"half \ud83d"


def test_one_function_turns_text_into_bytes():
    """Everywhere else text is handed to it: what UTF-8 cannot hold is a case of one place."""
    found = {
        f"{path.relative_to(source_root())}:{node.lineno}"
        for package in ("common", "client", "server", "sim")
        for path in (source_root() / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr == "write_text"
    }
    assert found == set()


def test_a_run_is_rerunnable_from_its_configuration(tmp_path):
    run = RunDirectory.create(Config(), directory=tmp_path / "run")
    assert RunDirectory(run.path).config() == Config()
    assert run.status().state == "started"


def test_a_run_is_for_its_owner_alone(tmp_path):
    run = RunDirectory.create(Config(), directory=tmp_path / "run")
    assert stat.S_IMODE(run.path.stat().st_mode) == 0o700
    before = os.umask(0o022)
    try:
        run.metric("train-loss", 1.0, step=1)
        run.append("wire.jsonl", {"bytes": 1})
    finally:
        os.umask(before)
    for file in ("config.toml", "status.json", "metrics.jsonl", "wire.jsonl"):
        assert stat.S_IMODE((run.path / file).stat().st_mode) == 0o600, file


def test_files_of_the_user_are_never_written_over(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        RunDirectory.create(Config(), directory=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["precious.txt"]
    with pytest.raises(UserError, match="not a run directory"):
        RunDirectory.open(tmp_path)


def test_what_was_killed_before_any_work_is_in_nobodys_way(tmp_path):
    """A run has begun once its run.json says so; what was killed before may be begun again."""
    (tmp_path / ".status.json.x1.part").write_text("{")
    run = RunDirectory.create(Config(), directory=tmp_path)
    assert RunDirectory.create(Config(), directory=tmp_path) == run
    run.write_status("running")
    with pytest.raises(UserError, match="not empty"):
        RunDirectory.create(Config(), directory=tmp_path)
    run.write_status("started")
    run.write_json("run.json", RunRecord(mode="single", resumable=True))
    with pytest.raises(UserError, match="not empty"):
        RunDirectory.create(Config(), directory=tmp_path)


def test_a_folder_of_runs_names_them(tmp_path):
    record = RunRecord(mode="sweep", resumable=False, cells=("lora-seed-0", "lora-seed-1"))
    RunDirectory(tmp_path).write_json("run.json", record)
    with pytest.raises(UserError, match=r"runs of one sweep; allowed: .*/lora-seed-0; fix: name"):
        RunDirectory.open(tmp_path)


def test_two_runs_in_one_second_get_two_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = {RunDirectory.create(Config()).path for _ in range(3)}
    assert len(paths) == 3
    assert all(path.parent == tmp_path / "runs" for path in paths)


def test_a_name_that_another_run_takes_meanwhile_is_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, taken = Path.mkdir, []

    def late(path, *args, **options):
        if path.parent.name == "runs" and not taken:
            taken.append(path)
            make(path, parents=True)
        make(path, *args, **options)

    monkeypatch.setattr(Path, "mkdir", late)
    path = RunDirectory.create(Config()).path
    assert [path] == [one.with_name(f"{one.name}-2") for one in taken]


NO_OBJECT = ('{"a": [1,\n', "[]", "", "[" * 100_000, "[1]\n", "5\n", "null\n", "[" * 100_000 + "\n")


@pytest.mark.parametrize("content", NO_OBJECT)
def test_a_damaged_file_of_a_run_is_one_line_with_its_name(tmp_path, content):
    run = RunDirectory.create(Config(), directory=tmp_path / "run")
    readers = {
        "status.json": run.status,
        "summary.json": lambda: run.read_json("summary.json"),
        **({"metrics.jsonl": lambda: run.metrics("loss")} if content.endswith("\n") else {}),
    }
    for name, reader in readers.items():
        (run.path / name).write_text(content)
        with pytest.raises(UserError, match=f"{name} is damaged"):
            reader()


def test_checkpoints_sort_in_time_and_half_written_ones_do_not_count(tmp_path):
    run = RunDirectory.create(Config(), directory=tmp_path / "run")
    for number in (2, 10, 1):
        facts = SavedFacts(round=number)
        run.save_checkpoint(f"round-{number:05d}", b_of(number), facts=facts, extra=b_of(-1))
    (run.path / "checkpoints" / ".round-00011.part").mkdir()
    last = run.load_checkpoint()
    assert (last.name, last.facts.round) == ("round-00010", 10)
    np.testing.assert_array_equal(last.b["layer.lora_B"], b_of(10)["layer.lora_B"])
    np.testing.assert_array_equal(last.extra["layer.lora_B"], b_of(-1)["layer.lora_B"])
    with pytest.raises(UserError, match="round-00001, round-00002, round-00010"):
        run.load_checkpoint("round-00003")


def test_another_checkpoint_never_stands_for_the_last_of_a_finished_run(tmp_path):
    run = RunDirectory.create(Config(), directory=tmp_path / "run")
    for number in (1, 2):
        run.save_checkpoint(f"round-{number:05d}", b_of(number), facts=SavedFacts(round=number))
    assert run.load_checkpoint().name == "round-00002"
    run.write_json("summary.json", Summary(b_sha256=tensors_sha256(b_of(2))))
    assert run.load_checkpoint().name == "round-00002"
    run.remove_checkpoint("round-00002")
    with pytest.raises(UserError, match=r"ended with another B than .* round-00001; fix: bring"):
        run.load_checkpoint()
    assert run.load_checkpoint("round-00001").facts == SavedFacts(round=1)


@pytest.mark.parametrize("missing", ["b.safetensors", "facts.json"])
def test_a_checkpoint_without_one_of_its_files_does_not_count(missing, tmp_path):
    run = RunDirectory.create(Config(), directory=tmp_path / "run")
    for number in (1, 2):
        run.save_checkpoint(f"round-{number:05d}", b_of(number), facts=SavedFacts(round=number))
    (run.path / "checkpoints" / "round-00002" / missing).unlink()
    assert run.checkpoint_names() == ["round-00001"]
    assert run.load_checkpoint().facts == SavedFacts(round=1)


def test_any_flipped_bit_of_the_facts_is_refused(tmp_path):
    """A bit of every byte, spaces and capitals (1e-05, 1E-05) included; both readers."""
    run = RunDirectory.create(Config(), directory=tmp_path / "run")
    told = {"round": 1, "seconds": 1e-05, "hospitals": ["größe"], "paces": {"train": {}}}
    facts = SavedFacts.read(told, what="facts.json")
    folder = run.save_checkpoint("round-00001", b_of(1), facts=facts, extra=b_of(-1))
    assert run.load_checkpoint().facts == run.checkpoint_facts("round-00001") == facts
    file = folder / "facts.json"
    content = file.read_bytes()
    for place, byte in enumerate(content):
        flipped = bytearray(content)
        flipped[place] = byte ^ (32 if byte in b"eg " else 1 << place % 8)
        file.write_bytes(flipped)
        with pytest.raises(Altered, match="^checkpoint round-00001 is damaged"):
            run.checkpoint_facts("round-00001")
    with pytest.raises(Altered, match="^checkpoint round-00001 is damaged"):
        run.load_checkpoint()


def test_a_checkpoint_that_is_written_again_is_never_half_there(tmp_path, monkeypatch):
    """Only what is out of sight is removed file by file."""
    run = RunDirectory.create(Config(), directory=tmp_path / "run")
    run.save_checkpoint("round-00001", b_of(1), facts=SavedFacts(round=1), extra=b_of(-1))
    removed = []
    remove = shutil.rmtree

    def watched(path, **options):
        removed.append(path.name)
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", watched)
    run.save_checkpoint("round-00001", b_of(2), facts=SavedFacts(round=1))
    monkeypatch.undo()
    assert removed
    assert all(name.startswith(".") for name in removed)
    np.testing.assert_array_equal(run.load_checkpoint().b["layer.lora_B"], b_of(2)["layer.lora_B"])
    assert run.load_checkpoint().extra == {}
    assert sorted(p.name for p in (run.path / "checkpoints").iterdir()) == ["round-00001"]


def test_the_hash_of_b_sees_values_keys_and_shapes_but_not_the_order():
    a, b = np.ones((1, 2), np.float32), np.zeros((2, 1), np.float32)
    base = tensors_sha256({"a": a, "b": b})
    assert base == tensors_sha256({"b": b, "a": a})
    assert base == tensors_sha256({"a": a.astype(np.float64), "b": b})
    assert base != tensors_sha256({"a": a.T, "b": b})
    assert base != tensors_sha256({"a": b.T, "b": a.T})
    assert base != tensors_sha256({"a": a + 1e-6, "b": b})


def test_the_source_digest_sees_one_changed_byte(tmp_path):
    for package in ("client", "common", "server", "sim"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "m.py").write_text("x = 1\n")
    before = source_digest(tmp_path)
    source_digest.cache_clear()
    (tmp_path / "common" / "m.py").write_text("x = 2\n")
    assert source_digest(tmp_path) != before
    source_digest.cache_clear()


_PARENT = """
import subprocess, sys
held = b"1" * (400 << 20)
ask = "from common.provenance import peak_rss_bytes; print(peak_rss_bytes())"
print(subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True).stdout)
"""


@pytest.mark.process
def test_the_peak_of_the_process_that_started_this_one_is_not_its_own():
    done = subprocess.run(
        [sys.executable, "-c", _PARENT],
        capture_output=True,
        text=True,
        check=True,
        cwd=source_root(),
    )
    assert 2**20 < int(done.stdout) < 200 * 2**20


def test_a_run_directory_that_cannot_be_made_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Not a directory"):
        RunDirectory.require_new(Config(), directory=tmp_path / "file" / "run")
    with pytest.raises(UserError, match="Not a directory"):
        RunDirectory.require_new(Config(), directory=tmp_path / "file")
    RunDirectory.require_new(Config(), directory=tmp_path / "new" / "run")
    assert not (tmp_path / "new").exists()
