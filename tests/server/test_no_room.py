"""A federation whose disk is full: one line about the file, and a status that says failed."""

import errno
import json
from pathlib import Path

import pytest

import common.files
from common.errors import DiskFull, RunFailed
from common.privacy.budget.guard import LEDGER
from common.rundir import RunDirectory

PRIVATE = {
    "privacy__noise_multiplier": 1.5,
    "privacy__sampling_rate": 0.25,
    "privacy__delta": 1e-4,
}


@pytest.fixture
def full_at(monkeypatch):
    """Let the disk be full for files of some names, from the n-th time on that one is written."""

    def start(*names, after=0):
        count = 0
        write, torn = Path.write_bytes, common.files._is_torn

        def check(name):
            nonlocal count
            if any(one in name for one in names):
                count += 1
                if count > after:
                    raise OSError(errno.ENOSPC, "No space left on device", name)

        def write_bytes(self, content):
            check(self.name)
            return write(self, content)

        def is_torn(file):
            check(Path(file.name).name)
            return torn(file)

        monkeypatch.setattr(Path, "write_bytes", write_bytes)
        monkeypatch.setattr(common.files, "_is_torn", is_torn)

    return start


@pytest.mark.parametrize(
    ("file", "after"),
    [
        ("metrics.jsonl", 0),
        ("metrics.jsonl", 7),
        ("wire.jsonl", 3),
        ("b.safetensors", 1),
        ("extra.safetensors", 1),
        ("facts.json", 1),
        ("summary.json", 0),
    ],
)
def test_a_server_without_room_fails_in_one_line(
    file, after, tiny_config, run_main, full_at, tmp_path
):
    folder = tmp_path / "run"
    full_at(file, after=after)
    with pytest.raises(DiskFull) as caught:
        run_main(tiny_config(run__directory=str(folder), federation__strategy="fedadam"))
    line = str(caught.value)
    assert line == f"{file} cannot be written: No space left on device; fix: make room on the disk"
    run = RunDirectory(folder)
    assert (run.status().state, run.status().error) == ("failed", line)
    assert not list(folder.rglob("*.part"))
    for name in run.checkpoint_names():
        run.load_checkpoint(name)


def test_where_the_status_finds_no_new_room_it_is_written_over_the_old_one(
    tiny_config, run_main, full_at, tmp_path
):
    folder = tmp_path / "run"
    full_at("metrics.jsonl", "status.json", after=2)  # the status was written twice
    with pytest.raises(DiskFull, match=r"^metrics.jsonl cannot be written: No space left"):
        run_main(tiny_config(run__directory=str(folder)))
    assert RunDirectory(folder).status().state == "failed"


@pytest.mark.parametrize("file", ["state-00001.safetensors", "steps.jsonl"])
def test_a_hospital_without_room_tells_the_server_in_one_line(
    file, tiny_config, run_main, full_at, tmp_path
):
    """The file's own name, no folder of the hospital's."""
    folder = tmp_path / "run"
    full_at(file)
    with pytest.raises(RunFailed) as caught:
        run_main(tiny_config(run__directory=str(folder)))
    line = str(caught.value)
    assert f"hospital-2: failed: {file} cannot be written: No space left on device" in line
    assert str(tmp_path) not in line
    assert "\n" not in line
    assert RunDirectory(folder).status().state == "failed"


def test_a_private_hospital_without_room_releases_nothing(
    tiny_config, run_main, full_at, tmp_path, quick_accounting
):
    folder = tmp_path / "run"
    full_at("answer-")
    with pytest.raises(RunFailed, match="hospital-1: failed: answer-00001-[0-9a-f]{16}"):
        run_main(tiny_config(run__directory=str(folder), **PRIVATE))
    ledger = (folder / "hospitals" / "hospital-1" / LEDGER).read_text().splitlines()
    assert [json.loads(line)["event"] for line in ledger] == ["open", "charge"]
    assert not list(folder.rglob("answer-*"))
