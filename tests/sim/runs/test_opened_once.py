"""A run reads and hashes its tables once, from its first check to its last answer."""

import io

import pytest
from rich.console import Console

import common.data.prepare
from common.configio import from_flat
from sim.runs.single import single


@pytest.mark.slow
def test_single_hashes_the_tables_once(tmp_path, monkeypatch):
    keys = {
        "data.synthetic-patients": 30,
        "model.backbone": "tiny",
        "adapter.rank": 4,
        "train.steps": 2,
        "train.batch-size": 2,
        "train.max-length": 192,
        "train.dtype": "fp32",
        "train.device": "cpu",
        "train.threads": 1,
        "evaluation.samples": 2,
        "evaluation.max-new-tokens": 8,
        "evaluation.bootstrap": 100,
    }
    hashed = []
    hash_files = common.data.prepare.hash_files

    def counted(files):
        hashed.append(len(files))
        return hash_files(files)

    monkeypatch.setattr(common.data.prepare, "hash_files", counted)
    config = from_flat(keys)
    summary = single(
        config, console=Console(file=io.StringIO()), command_line=(), run_dir=tmp_path / "run"
    ).result
    assert summary.metrics["fedrx"].samples == 2
    assert len(hashed) == 1
