"""A run reads tables and weights once, from its first check to its last answer."""

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import LlamaForCausalLM

import common.data.prepare
import sim.runs.preparation
from common.configio import from_flat
from common.errors import UserError
from common.model.backbone.reading import Destination, Reading
from common.model.backbone.tiny import tiny_model, tiny_tokenizer
from common.training import worker
from sim.runs.lifecycle import resume
from sim.runs.single import Single, single

KEYS = {
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


@pytest.mark.slow
def test_single_hashes_the_tables_once(tmp_path, monkeypatch):
    hashed = []
    hash_files = common.data.prepare.hash_files

    def counted(files):
        hashed.append(len(files))
        return hash_files(files)

    monkeypatch.setattr(common.data.prepare, "hash_files", counted)
    config = from_flat(KEYS)
    summary = single(
        config, console=Console(file=io.StringIO()), command_line=(), run_dir=tmp_path / "run"
    ).result
    assert summary.metrics["fedrx"].samples == 2
    assert len(hashed) == 1


def test_a_gpus_weights_are_read_once_and_before_the_checks(tmp_path, monkeypatch):
    """With the CPU in the GPU's place; changed weights are refused before anything is trained."""
    folder, events = tmp_path / "llama", []
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    destination = Destination(device=torch.device("cpu"), dtype=torch.float32)
    monkeypatch.setattr(worker, "early_destination", lambda *asked: destination)
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("twice"))
    read, check = Reading._read, sim.runs.preparation.check_settings

    def reading(self, path: Path):
        events.append("read")
        return read(self, path)

    def checking(config):
        events.append("check")
        return check(config)

    monkeypatch.setattr(Reading, "_read", reading)
    monkeypatch.setattr(sim.runs.preparation, "check_settings", checking)
    monkeypatch.setattr(Single, "work", lambda kind, run: run.worker.session(run.config))
    console = Console(file=io.StringIO())
    config = from_flat(KEYS | {"model.backbone": str(folder)})
    single(config, console=console, command_line=(), run_dir=tmp_path / "run")
    assert events == ["read", "check"]
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    monkeypatch.setattr(Single, "work", lambda kind, run: pytest.fail("worked"))
    with pytest.raises(UserError, match="backbone changed since it began"):
        resume(tmp_path / "run", kinds=[Single], console=console, command_line=())
