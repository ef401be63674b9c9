"""What one measured step of the GPU benchmark is, on a tiny backbone."""

import sys
from pathlib import Path

import pytest
import torch

from common.model.adapter.falora import AdapterSpec
from common.model.backbone.load import resolve_backbone
from common.model.kernels import attention
from common.model.session import open_session
from common.training import gradients

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
STEPS = 3


@pytest.fixture
def load(monkeypatch):
    """Import modules of the benchmark, which lie beside each other."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield __import__
    for name in [name for name in sys.modules if name.startswith("gpu_")]:
        del sys.modules[name]


@pytest.fixture
def session():
    return open_session(
        resolve_backbone("tiny"), AdapterSpec(rank=4), device="cpu", dtype="fp32", threads=1
    )


def counted(monkeypatch, where, name) -> list[tuple]:
    """Return the arguments of each call of ``where.name`` from now on."""
    calls, own = [], getattr(where, name)

    def note(*arguments, **options):
        calls.append(arguments)
        return own(*arguments, **options)

    monkeypatch.setattr(where, name, note)
    return calls


def test_a_step_packs_the_next_one_and_waits_for_the_card(load, session, monkeypatch):
    """All steps are of one loop: only the first step packs its own batch."""
    measure = load("gpu_measure")
    data = measure.samples([24, 16], session.spec.shape.vocabulary)
    events = []
    pack = gradients.pack
    monkeypatch.setattr(gradients, "pack", lambda batch: events.append("pack") or pack(batch))
    monkeypatch.setattr(measure, "wait", lambda device: events.append("wait"))
    found = measure.train_times(session, data, STEPS)
    assert events == ["pack", *["pack", "wait"] * (2 + STEPS)]
    assert set(found) == {"seconds", "spread", "first_seconds", "peak_bytes"}


def test_the_first_step_and_a_second_are_no_part_of_the_median(load):
    measure = load("gpu_measure")
    found = measure._found([0.0, 9.0, 16.0, 17.0, 19.0, 22.0], torch.device("cpu"))
    assert found == {"seconds": 2.0, "spread": 3.0, "first_seconds": 9.0, "peak_bytes": None}


@pytest.mark.parametrize("one_pass", [True, False])
def test_a_private_step_draws_clips_and_releases(load, session, monkeypatch, one_pass):
    """Everybody, in one pass or each in one of their own, and then the optimizer."""
    measure, private = load("gpu_measure"), load("gpu_private")
    data = measure.samples([24, 16], session.spec.shape.vocabulary)
    passes = counted(monkeypatch, private.gradients, "add_unit_gradients")
    releases = counted(monkeypatch, private.gradients.GaussianMechanism, "release")
    private.private(session, data, STEPS, one_pass=one_pass)
    segments = [batch.segments for _, batch, *_ in passes]
    assert segments == ([2] if one_pass else [1, 1]) * (2 + STEPS)
    assert len(releases) == 2 + STEPS
    assert bool(session.adapter.flat.count_nonzero() == session.adapter.flat.numel())


def test_attention_alone_runs_on_the_kernel_that_is_named(load, session, monkeypatch):
    """Whatever the product's own rule says of short segments, and for the whole batch at once."""
    by_length = load("gpu_attention")

    class Run:
        options = type("Options", (), {"length": 32, "batch": 2, "steps": 1})
        shape, device, dtype = session.spec.shape, torch.device("cpu"), "fp32"

    calls = []
    measured = ("cudnn", "flash-attn-3", "torch-flash")
    for name in measured:

        def call(q, k, v, scaling, packing, name=name):
            calls.append((name, packing.bounds, attention.CUDNN_TOKENS))
            return attention._sdpa(q, k, v, scaling, packing)

        monkeypatch.setitem(attention._KERNEL_FUNCTIONS, name, call)
    here = (*measured, "sdpa", "eager")
    monkeypatch.setattr(attention, "obstacle", lambda name, *_: "" if name in here else "absent")
    found = by_length.by_length(Run())
    assert [row["length"] for row in found["seconds"]] == [8, 16, 32]
    assert found["CUDNN_TOKENS"] == attention.CUDNN_TOKENS == 1024
    assert "cudnn wins from" in found
    for name in measured:
        seen = {bounds: rule for one, bounds, rule in calls if one == name}
        assert {len(bounds) - 1 for bounds in seen} == {8, 4, 2}
        assert set(seen.values()) == {0}


def test_a_contestant_wins_from_where_it_never_loses_again(load):
    wins_from = load("gpu_attention").wins_from
    assert wins_from([(1, 1.0, 2.0), (2, 2.0, 1.0), (4, 1.0, 2.0), (8, 1.0, 3.0)]) == 4
    assert wins_from([(1, 1.0, 2.0), (2, 2.0, 1.0)]) is None
