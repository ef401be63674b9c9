"""The source tag: by content, and credentialed whenever in doubt."""

import gzip
import json
import shutil

import pytest

from common.config import DataConfig
from common.data.mimic.source import DEMO_SHA256
from common.data.mimic.tables import COLUMNS, PAIRED
from common.data.prepare import load_samples
from common.data.sources import source_for, titles_of
from common.data.synthetic.write import MANIFEST_NAME
from common.data.tables import SUFFIXES


def tag(folder, cache):
    return load_samples(DataConfig(path=str(folder)), cache_dir=cache).source


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return source_for("synthetic").folder(DataConfig(synthetic_patients=20), cache)


@pytest.fixture
def copy(synthetic, tmp_path):
    return shutil.copytree(synthetic, tmp_path / "copy")


def test_unknown_tables_are_credentialed(write_tables, tmp_path):
    assert tag(write_tables(), tmp_path) == "credentialed"


def test_the_generators_tables_are_synthetic_wherever_they_lie(copy, tmp_path):
    assert tag(copy, tmp_path) == "synthetic"


def test_without_its_manifest_nothing_is_synthetic(copy, tmp_path):
    (copy / MANIFEST_NAME).unlink()
    assert tag(copy, tmp_path) == "credentialed"


@pytest.mark.parametrize("table", ["prescriptions", "services"])
def test_one_changed_table_makes_it_credentialed(copy, tmp_path, table):
    path = copy / "hosp" / f"{table}.csv.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()), 1, mtime=1))
    assert tag(copy, tmp_path) == "credentialed"


def test_a_manifest_moved_to_other_tables_proves_nothing(synthetic, write_tables, tmp_path):
    folder = write_tables()
    shutil.copy(synthetic / MANIFEST_NAME, folder)
    assert tag(folder, tmp_path) == "credentialed"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"tables": {}}', '{"tables": 3}', "null"])
def test_a_forged_manifest_proves_nothing(write_tables, tmp_path, content):
    folder = write_tables()
    (folder / MANIFEST_NAME).write_text(content)
    assert tag(folder, tmp_path) == "credentialed"


def test_a_manifest_that_says_synthetic_proves_nothing(synthetic, write_tables, tmp_path):
    folder = write_tables()
    manifest = json.loads((synthetic / MANIFEST_NAME).read_text())
    manifest["tables"] = {}
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    assert tag(folder, tmp_path) == "credentialed"


def test_demo_is_known_zipped_and_unzipped(mimic_demo, tmp_path):
    plain = tmp_path / "plain" / "hosp"
    plain.mkdir(parents=True)
    for name in COLUMNS:
        content = gzip.decompress((mimic_demo / "hosp" / f"{name}.csv.gz").read_bytes())
        (plain / f"{name}.csv").write_bytes(content)
    cache = tmp_path / "cache"
    assert tag(mimic_demo, cache) == "demo"
    assert tag(plain.parent, cache) == "demo"
    (plain / "omr.csv").write_bytes((plain / "omr.csv").read_bytes().replace(b"\n", b"\r\n"))
    assert tag(plain.parent, cache) == "credentialed"


def test_hashes_are_those_that_physionet_publishes(mimic_demo):
    lines = (mimic_demo / "SHA256SUMS.txt").read_text().splitlines()
    published = {path: digest for digest, path in (line.split() for line in lines)}
    names = set(COLUMNS).union(*PAIRED.values())
    assert set(DEMO_SHA256) == {f"{name}{suffix}" for name in names for suffix in SUFFIXES}
    for name in names:
        assert published[f"hosp/{name}.csv.gz"] == DEMO_SHA256[f"{name}.csv.gz"]


def test_the_synthetic_source_has_no_titles_beyond_its_samples():
    """It has no folder of its own to read them from: ``data.path`` is a name."""
    assert titles_of(DataConfig()) == []
