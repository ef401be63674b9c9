"""The full-size benchmark at a tiny size: what it writes and what it prints."""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from common.config import DataConfig
from common.data.prepare import load_samples
from common.data.sources import source_for

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    config = DataConfig(synthetic_patients=15)
    return source_for("synthetic").folder(config, tmp_path_factory.mktemp("cache"))


@pytest.mark.process
def test_contenders_agree_at_tiny_size(source, tmp_path):
    figures = tmp_path / "figures.json"
    script = ROOT / "benchmarks" / "data_full_size.py"
    command = [sys.executable, str(script), "--data", str(source), "--rows", "2000"]
    done = subprocess.run(
        [*command, "--json", str(figures)], capture_output=True, text=True, check=True
    )
    assert "faster" in done.stdout
    assert "prescriptions: 2,000 rows" in done.stdout
    found = json.loads(figures.read_text())
    pandas, lists, prepare = found["results"]
    assert pandas["rows"] == 2000
    assert lists["pairs"] == prepare["pairs"] > 0
    rows = len(pd.read_csv(source / "hosp" / "prescriptions.csv.gz"))
    assert found["copies"] == -(-2000 // rows)
    assert all(one["seconds"] > 0 and one["peak_bytes"] > 1e6 for one in found["results"])


def test_copies_are_new_patients_with_the_same_lists(source, tmp_path):
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from data_full_size import replicate
    finally:
        sys.path.pop(0)
    rows = len(pd.read_csv(source / "hosp" / "prescriptions.csv.gz"))
    assert replicate(source, tmp_path / "copies", 3 * rows) == 3
    one = load_samples(DataConfig(path=str(source)), cache_dir=tmp_path)
    three = load_samples(DataConfig(path=str(tmp_path / "copies")), cache_dir=tmp_path)
    assert three.counts.as_json()["samples"] == 3 * one.counts.as_json()["samples"]
    assert three.counts.as_json()["patients"] == 3 * one.counts.as_json()["patients"]
    assert three.counts.as_json()["pairs_clean"] == 3 * one.counts.as_json()["pairs_clean"]
    assert three.source == "credentialed"
