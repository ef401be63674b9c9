"""The cached sample table: same samples, private, atomic, keyed by content and settings."""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from common.config import DataConfig
from common.data.cache import cache_key, load
from common.data.prepare import load_samples
from common.data.samples import Admission
from common.errors import UserError


def entries(cache: Path) -> list[Path]:
    return sorted(path for path in (cache / "samples").iterdir())


def test_the_cache_gives_the_same_samples(write_tables, tmp_path, monkeypatch):
    config = DataConfig(path=str(write_tables()))
    first = load_samples(config, cache_dir=tmp_path)
    monkeypatch.setattr("common.data.mimic.source.prepare_tables", None)
    assert load_samples(config, cache_dir=tmp_path) == first
    assert isinstance(first.admissions[0], Admission)


def test_the_cache_is_for_its_owner_alone(write_tables, tmp_path):
    load_samples(DataConfig(path=str(write_tables())), cache_dir=tmp_path / "new")
    (entry,) = entries(tmp_path / "new")
    assert stat.S_IMODE(entry.stat().st_mode) == 0o600
    assert stat.S_IMODE(entry.parent.stat().st_mode) == 0o700


def test_content_and_settings_key_the_cache(write_tables, small, tmp_path):
    folder = write_tables(**small)
    load_samples(DataConfig(path=str(folder)), cache_dir=tmp_path)
    load_samples(DataConfig(path=str(folder), split_seed=5), cache_dir=tmp_path)
    assert len(entries(tmp_path)) == 1
    load_samples(DataConfig(path=str(folder), drop_flushes=False), cache_dir=tmp_path)
    assert len(entries(tmp_path)) == 2
    small["prescriptions"][0]["drug"] = "Torsemide"
    changed = load_samples(
        DataConfig(path=str(write_tables(folder=folder, **small))), cache_dir=tmp_path
    )
    assert "Torsemide" in changed.admissions[0].drugs
    assert len(entries(tmp_path)) == 3


def test_new_code_reads_anew(tmp_path, monkeypatch):
    before = cache_key({"a": 1})
    (tmp_path / "cache.py").write_text("changed")
    monkeypatch.setattr("common.data.cache.__file__", str(tmp_path / "cache.py"))
    assert cache_key({"a": 1}) != before


@pytest.mark.parametrize("damage", [b"", b"PAR1 nothing", None])
def test_a_damaged_entry_is_written_again(write_tables, tmp_path, damage):
    config = DataConfig(path=str(write_tables()))
    first = load_samples(config, cache_dir=tmp_path)
    (entry,) = entries(tmp_path)
    whole = entry.read_bytes()
    entry.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    assert load_samples(config, cache_dir=tmp_path) == first
    assert load(entry).frame.height == len(first.admissions)


@pytest.mark.slow
def test_no_changed_bit_is_served(write_tables, tmp_path):
    load_samples(DataConfig(path=str(write_tables())), cache_dir=tmp_path)
    (entry,) = entries(tmp_path)
    whole = entry.read_bytes()
    assert load(entry) is not None
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        entry.write_bytes(changed)
        assert load(entry) is None, place


def test_a_decoder_that_panics_means_that_there_is_no_entry(write_tables, tmp_path, monkeypatch):
    def panic(*_, **__):
        raise pl.exceptions.PanicException("index out of bounds")

    load_samples(DataConfig(path=str(write_tables())), cache_dir=tmp_path)
    (entry,) = entries(tmp_path)
    monkeypatch.setattr(pl, "read_parquet", panic)
    assert load(entry) is None


def refused_write(config, cache):
    with pytest.raises(UserError, match="cannot be written") as raised:
        load_samples(config, cache_dir=cache)
    assert str(cache) in raised.value.what
    assert "FEDRX_CACHE" in raised.value.fix
    assert "\n" not in str(raised.value)
    return raised.value


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), None])
def test_a_failed_write_is_one_line_and_leaves_nothing(write_tables, tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error or pl.exceptions.ComputeError("cannot encode")

    if error is None:
        monkeypatch.setattr(pl.DataFrame, "write_parquet", fail)
    else:
        monkeypatch.setattr("os.fsync", fail)
    found = refused_write(DataConfig(path=str(write_tables())), tmp_path)
    assert ("No space left on device" in found.what) == (error is not None)
    assert entries(tmp_path) == []


def test_full_disk_under_synthetic_tables_is_one_line(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("common.data.synthetic.source.write_tables", fail)
    assert "No space left" in refused_write(DataConfig(synthetic_patients=12), tmp_path).what
    assert list((tmp_path / "synthetic").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_told_before_the_reading(
    write_tables, tmp_path, monkeypatch
):
    prepared: list[object] = []
    monkeypatch.setattr(
        "common.data.mimic.source.prepare_tables", lambda *a, **k: prepared.append(a)
    )
    (tmp_path / "cache").write_text("a file where the folder should be")
    refused_write(DataConfig(path=str(write_tables())), tmp_path / "cache")
    assert prepared == []


SMALL_DISK = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))
from sim.cli.main import main
main()
"""


@pytest.mark.process
def test_the_command_line_says_what_to_do_about_a_full_disk(write_tables, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SMALL_DISK, "data", "prepare", str(write_tables())],
        env=os.environ | {"FEDRX_CACHE": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("fedrx: the cache folder")
    assert entries(tmp_path) == []


LOAD = """
import sys
from pathlib import Path
from common.config import DataConfig
from common.data.prepare import load_samples
config = DataConfig(path=sys.argv[1], synthetic_patients=12)
print(load_samples(config, cache_dir=Path(sys.argv[2])).digest)
"""


@pytest.mark.process
@pytest.mark.parametrize("path", ["synthetic", None])
def test_processes_may_prepare_at_once(write_tables, tmp_path, path):
    folder = path or str(write_tables())
    command = [sys.executable, "-c", LOAD, folder, str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    digests = {process.communicate(timeout=120)[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(digests) == 1
    assert len(entries(tmp_path)) == 1
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith(".")]


def test_synthetic_seed_and_size_decide_the_tables(tmp_path):
    def digest(**changed):
        config = DataConfig(**{"synthetic_patients": 12, **changed})
        return load_samples(config, cache_dir=tmp_path).digest

    digests = [digest(), digest(synthetic_seed=1), digest(synthetic_patients=13)]
    assert len(set(digests)) == 3
    assert digest() == digests[0]


def test_progress_is_told(write_tables, tmp_path):
    lines = []
    config = DataConfig(path=str(write_tables()))
    load_samples(config, cache_dir=tmp_path, progress=lines.append)
    assert "streaming prescriptions: 4 rows" in lines
    load_samples(config, cache_dir=tmp_path, progress=lines.append)
    assert lines[-1] == "samples are in the cache"
