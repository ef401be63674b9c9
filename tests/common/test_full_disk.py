"""A full disk at every writer of files: one line that names the file, and nothing is lost.

A limit on the size of this process's files (RLIMIT_FSIZE) stands for the disk: the kernel refuses
the write itself, within it, as a full disk does.
"""

import ast
import contextlib
import errno
import json
import resource

import numpy as np
import pytest
import torch
from line_fixtures import prediction_line

from client.epsilon_limit import Promise, _promises
from client.kept_state import own_folder, save_state
from common.config import Config
from common.errors import DiskFull
from common.evaluation.answers_file import Prediction, read_answers, write_answers
from common.evaluation.judge.cache import Exchanges, UnansweredCall
from common.files import (
    BLOCK_BYTES,
    append_json_line,
    needing_room,
    read_json_lines,
    write_bytes_or_over,
    write_json,
    write_text,
)
from common.privacy.budget.ledger import Ledger
from common.privacy.plan import PrivacyPlan
from common.provenance import source_root
from common.records.run import SavedFacts
from common.rundir import RunDirectory
from common.tensor_files import read_tensors, write_tensors
from common.training.optimiser import TrainState

BIG = {"layer.lora_B": np.ones((64, 64), np.float32)}
PLAN = PrivacyPlan(
    clip_norm=1.0,
    noise_multiplier=1.5,
    sampling_rate=0.1,
    steps=40,
    expected_batch=8.0,
    max_admissions_per_patient=4,
    delta=1e-5,
)


@contextlib.contextmanager
def room(size):
    """Let no file of this process grow beyond a size, in bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def one_line(error, name, folder):
    text = str(error)
    assert text.startswith(f"{name} cannot be written: File too large; fix: ")
    assert "\n" not in text
    assert str(folder) not in text
    return True


def write_answers_of(folder, number):
    run = RunDirectory(folder)
    nobody = {"sex": "F", "age": "1", "height_cm": None, "weight_kg": None, "bmi": None}
    line = prediction_line("c", "m", None, patient=nobody, text="x" * 3000 * number)
    rows = [Prediction.model_validate(line)]
    run.write_json("summary.json", {"evaluation": {"answers_sha256": write_answers(run, rows)}})


WHOLE_FILES = {
    "x.txt": lambda file, n: write_text(file, f"{n}" * 3000 * n),
    "x.json": lambda file, n: write_json(file, [n] * 1000 * n),
    "x.safetensors": lambda file, n: write_tensors(file, {"b": np.full(1000 * n, n)}),
    "predictions.jsonl": lambda file, n: write_answers_of(file.parent, n),
}


@pytest.mark.parametrize("name", WHOLE_FILES)
def test_a_file_that_finds_no_room_stays_as_it_was(tmp_path, name):
    file = tmp_path / name
    WHOLE_FILES[name](file, 1)
    before = file.read_bytes()
    others = sorted(tmp_path.iterdir())
    with room(len(before) + 100), pytest.raises(DiskFull) as caught:
        WHOLE_FILES[name](file, 2)
    assert one_line(caught.value, name, tmp_path)
    assert file.read_bytes() == before
    assert sorted(tmp_path.iterdir()) == others
    if name == "x.safetensors":
        assert len(read_tensors(file)["b"]) == 1000
    if name == "predictions.jsonl":  # its digest went first
        assert len(read_answers(RunDirectory(tmp_path))) == 1


@pytest.mark.parametrize("spare", [0, 1, 20])
def test_a_line_that_finds_no_room_leaves_those_before_it(tmp_path, spare):
    """Also where a part of it was written."""
    file = tmp_path / "metrics.jsonl"
    append_json_line(file, {"number": 1})
    with room(file.stat().st_size + spare), pytest.raises(DiskFull) as caught:
        append_json_line(file, {"text": "x" * 5000})
    assert one_line(caught.value, "metrics.jsonl", tmp_path)
    assert read_json_lines(file) == [{"number": 1}]
    append_json_line(file, {"number": 2})
    assert read_json_lines(file) == [{"number": 1}, {"number": 2}]


def test_a_checkpoint_that_finds_no_room_leaves_the_ones_before_it(tmp_path):
    run = RunDirectory.create(Config(), directory=tmp_path / "run")
    small = {"layer.lora_B": np.ones((2, 2), np.float32)}
    run.save_checkpoint("round-00001", small, facts=SavedFacts(round=1))
    files = {"b.safetensors": (BIG, {}), "extra.safetensors": (small, BIG)}
    for name, (b, extra) in files.items():
        with room(4000), pytest.raises(DiskFull) as caught:
            run.save_checkpoint("round-00002", b, facts=SavedFacts(round=2), extra=extra)
        assert one_line(caught.value, name, tmp_path)
    with room(4000), pytest.raises(DiskFull) as caught:
        run.save_checkpoint(
            "round-00002", small, facts=SavedFacts(round=2, hospitals=("x" * 5000,))
        )
    assert one_line(caught.value, "facts.json", tmp_path)
    assert [one.name for one in (run.path / "checkpoints").iterdir()] == ["round-00001"]
    assert run.load_checkpoint().facts == SavedFacts(round=1)


def test_a_hospital_s_files_name_themselves_and_no_folder(tmp_path):
    state = TrainState(step=1, optimizer={"exp_avg": torch.zeros(5000)})
    with room(4000), pytest.raises(DiskFull) as caught:
        save_state(tmp_path, state, server_round=3)
    assert one_line(caught.value, "state-00003.safetensors", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_ledger_that_finds_no_room_charges_nothing(tmp_path):
    ledger = Ledger(tmp_path / "privacy-ledger.jsonl", PLAN)
    ledger.charge(1, 10)
    with room(ledger.path.stat().st_size), pytest.raises(DiskFull) as caught:
        ledger.release(1, "digest")
    assert one_line(caught.value, "privacy-ledger.jsonl", tmp_path)
    with room(ledger.path.stat().st_size), pytest.raises(DiskFull):
        ledger.charge(2, 20)
    assert [entry.event for entry in Ledger(ledger.path, PLAN).entries()] == ["open", "charge"]


def test_a_promise_that_finds_no_room_is_not_made(tmp_path):
    file = tmp_path / "promises.jsonl"
    one = Promise(run="a", plan="p", epsilon=1.0, delta=1e-5)
    with room(0), pytest.raises(DiskFull), _promises(file) as (_, append):
        append(one)
    with _promises(file) as (known, append):
        assert known == {}
        append(one)
    with _promises(file) as (known, _):
        assert known == {"a": one}


def test_a_judge_s_answer_that_finds_no_room_is_one_line(tmp_path):
    made = Exchanges(tmp_path / "exchanges.jsonl")
    with room(0), pytest.raises(DiskFull, match="^exchanges.jsonl cannot be written"):
        made.put(UnansweredCall(input_tokens=1, output_tokens=1))
    made.put(UnansweredCall(input_tokens=2, output_tokens=2))
    lines = (tmp_path / "exchanges.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"lost": True, "input_tokens": 2, "output_tokens": 2}
    ]
    assert [one.input_tokens for one in Exchanges(tmp_path / "exchanges.jsonl").unanswered] == [2]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_each_way_of_having_no_room_is_one(number):
    with pytest.raises(DiskFull), needing_room("x"):
        raise OSError(number, "no")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ENOENT])
def test_other_failures_are_not_a_full_disk(number):
    with pytest.raises(OSError, match="no"), needing_room("x"):
        raise OSError(number, "no")


def test_a_folder_that_finds_no_room_is_one_line(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pathlib.Path.mkdir", full)
    with pytest.raises(DiskFull, match="No space left on device") as caught:
        own_folder(tmp_path / "secret")
    assert "secret" not in str(caught.value)


WRITERS = {
    # here a full disk becomes a line
    *("common/files.py", "common/privacy/budget/synced.py"),
    *("client/kept_state.py", "common/evaluation/judge/cache.py"),
    # these say it themselves, or go on without: a form's answer, two logs
    *("sim/assist/server.py", "client/handlers.py", "sim/process/failures.py"),
    # before or beside a run, where the command line makes a line of any OSError
    *("common/data/synthetic/write.py", "common/model/backbone/embedded.py"),
    *("sim/flower/superlink.py", "sim/flower/run_config.py"),
}


def writes(node):
    """Tell whether a call opens a file for writing, or writes one."""
    if not isinstance(node, ast.Call):
        return False
    method, name = isinstance(node.func, ast.Attribute), ast.unparse(node.func)
    if method and node.func.attr in ("write_bytes", "write_text", "touch"):
        return True
    if name in ("os.write", "os.open", "os.fdopen"):
        return name == "os.write" or "O_CREAT" in ast.unparse(node)
    modes = [one.value for one in node.args if isinstance(one, ast.Constant)]
    opens = name == "open" or (method and node.func.attr == "open")
    return opens and any(set(str(mode)) & set("wax+") for mode in modes)


def test_no_other_file_of_the_product_writes_by_itself():
    found = {
        path.relative_to(source_root()).as_posix()
        for package in ("common", "client", "server", "sim")
        for path in (source_root() / package).rglob("*.py")
        if any(map(writes, ast.walk(ast.parse(path.read_text(encoding="utf-8")))))
    }
    assert found == WRITERS


def test_what_takes_no_more_room_is_written_over_what_is_there(tmp_path, monkeypatch):
    """A short document over a longer one; nothing longer than a block, and no new file."""
    file = tmp_path / "status.json"
    file.write_bytes(b"x" * 100)

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    write_bytes_or_over(file, b"short")
    assert file.read_bytes() == b"short"
    for place, content in ((file, b"y" * (BLOCK_BYTES + 1)), (tmp_path / "new", b"short")):
        with pytest.raises(DiskFull, match="No space left on device"):
            write_bytes_or_over(place, content)
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]
    assert file.read_bytes() == b"short"
