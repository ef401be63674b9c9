"""A run reads tables and weights once, from its first check to its last answer."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

import common.data.prepare
import sim.runs.preparation
from common.configio import from_flat
from common.errors import UserError
from common.model.backbone.reading import Destination, Reading
from common.model.backbone.tiny import tiny_model, tiny_tokenizer
from common.records.summary import Summary
from common.training import worker
from common.training.worker import Worker
from sim.runs.lifecycle import Kind, Run, resume
from sim.runs.paper import paper
from sim.runs.single import Single, single
from sim.runs.sweep import Sweep, plan_cells
from sim.runs.sweep import sweep as run_sweep

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


@pytest.fixture
def prepared(monkeypatch):
    """List the data settings with which tables are hashed and read."""
    seen, prepare_source = [], common.data.prepare.prepare_source

    def counted(config, **keys):
        seen.append(config)
        return prepare_source(config, **keys)

    monkeypatch.setattr(common.data.prepare, "prepare_source", counted)
    return seen


@pytest.fixture
def sweep_twice(monkeypatch, tmp_path, prepared):
    """Return how often two sweeps, one after the other in this process, have read tables.

    Nothing is trained: a run begins, and has a summary.
    """
    shared = Worker()
    monkeypatch.setattr("client.app.worker", lambda: shared)
    monkeypatch.setattr(Run, "_answered", lambda run: Summary())
    monkeypatch.setattr(Sweep, "train", lambda kind, run: kind.finish(run) or Summary())
    for kind in (Kind, Sweep):
        for name in ("report", "show"):
            monkeypatch.setattr(kind, name, lambda *_: None)

    def sweep(vary, arms=("fa-lora", "fedmedian")):
        found = []
        config = from_flat(KEYS | {"run.backend": "in-process", "federation.rounds": 1})
        cells = plan_cells(config, arms=arms, seeds=[0], vary=vary)
        assert len(cells) > 1
        for folder in ("first", "second"):
            run_sweep(cells, tmp_path / folder, command_line=())
            found.append(len(prepared) - sum(found))
        return found

    return sweep


@pytest.mark.slow
@pytest.mark.parametrize("best", [False, True])
def test_a_papers_ranks_share_its_data(tmp_path, prepared, best):
    """The best settings, too: only what is written of the drugs differs there."""
    config = from_flat(KEYS | {"train.steps": 1, "evaluation.max-new-tokens": 32})
    told = {"command_line": (), "run_dir": tmp_path / "run"}
    table = paper(config, scale="small", ranks=(2, 4), best=best, **told)
    assert len(table.rows) == 2
    assert len(prepared) == 1


def test_cells_in_one_process_share_their_data(sweep_twice):
    """Another sweep reads again: files may have changed since."""
    assert sweep_twice([]) == [1, 1]


def test_settings_of_the_text_and_the_score_share_data(sweep_twice):
    assert sweep_twice(["data.drug-order=name,set", "train.seed=1,2"]) == [1, 1]


@pytest.mark.parametrize(
    "vary", ["data.synthetic-seed=1,2", "data.train-samples=3,4", "partition.seed=1,2"]
)
def test_a_cell_of_other_data_opens_it_anew(sweep_twice, vary):
    """The cells that share it follow each other: four of them, in two pairs."""
    assert sweep_twice([vary, "train.learning-rate=0.1,0.2"], ["fa-lora"]) == [2, 2]


def test_the_node_that_holds_everything_is_dealt_its_own(sweep_twice):
    assert sweep_twice([], ["fa-lora", "centralised"]) == [2, 2]


@pytest.mark.slow
def test_single_hashes_the_tables_once(tmp_path, monkeypatch):
    hashed = []
    hash_files = common.data.prepare.hash_files

    def counted(files):
        hashed.append(len(files))
        return hash_files(files)

    monkeypatch.setattr(common.data.prepare, "hash_files", counted)
    config = from_flat(KEYS)
    summary = single(config, command_line=(), run_dir=tmp_path / "run").result
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
    monkeypatch.setattr(Run, "live", lambda run, inside: run.worker.session(run.config))
    config = from_flat(KEYS | {"model.backbone": str(folder)})
    single(config, command_line=(), run_dir=tmp_path / "run")
    assert events == ["read", "check"]
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    monkeypatch.setattr(Run, "live", lambda run, inside: pytest.fail("worked"))
    with pytest.raises(UserError, match="backbone changed since it began"):
        resume(tmp_path / "run", kinds=[Single], command_line=())
