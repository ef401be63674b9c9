"""How many workers a simulation gets, and what ``plan`` says of all of them together."""

import io
from pathlib import Path

import pytest

import sim.flower.worker_count
from common.configio import from_flat, read_config
from common.model.backbone.known_shapes import shape_of
from sim.checks import plan as plan_module
from sim.cli.runs import show_plan
from sim.cli.terminal import Terminal
from sim.flower.worker_count import (
    WORKER_START_SECONDS,
    choose_workers,
    training_footprints,
    worth_starting,
)

ROOT = Path(__file__).resolve().parents[3]
KEYS = {"train.device": "cpu", "train.dtype": "fp32", "train.recompute": "all"}


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch):
    monkeypatch.setattr(sim.flower.worker_count, "available_cpus", lambda: 8)


def each(keys):
    """Bytes of one worker."""
    footprints = training_footprints(
        from_flat(keys), shape_of("embedded"), device="cpu", value_bytes=4
    )
    return footprints[keys["train.recompute"]].total


@pytest.mark.parametrize(
    ("hospitals", "fit", "expected"),
    [(3, 100.0, 3), (20, 100.0, 8), (20, 4.5, 4), (3, 2.01, 2), (3, 1.0, 1), (3, 0.1, 1)],
)
def test_workers_by_cores_hospitals_and_memory(hospitals, fit, expected):
    config = from_flat({**KEYS, "federation.hospitals": hospitals})
    memory = int(fit * each(KEYS))
    assert (
        choose_workers(config, shape_of("embedded"), steps=10**4, memory_bytes=memory).value
        == expected
    )
    asked = from_flat({**KEYS, "federation.hospitals": hospitals, "federation.workers": 5})
    assert choose_workers(asked, shape_of("embedded"), steps=10**4, memory_bytes=memory).value == 5


def test_what_is_available_now_counts_unless_a_size_is_named(monkeypatch):
    monkeypatch.setattr(
        sim.flower.worker_count, "available_memory_bytes", lambda: int(2.5 * each(KEYS))
    )
    chosen = choose_workers(from_flat(KEYS), shape_of("embedded"), steps=10**4)
    assert chosen.value == 2
    assert chosen.reason.startswith("8 CPUs, 3 hospitals, ")


def test_a_worker_that_would_not_pay_for_its_start_is_not_started():
    """The tiny demo trains for seconds, and another process takes longer to come up."""
    config = read_config(ROOT / "configs" / "demo-tiny.toml", ["train.device=cpu"])
    memory = 10**12
    chosen = choose_workers(config, shape_of("tiny"), steps=72, memory_bytes=memory)
    assert chosen.value == 1
    assert "more would not pay for their start" in chosen.reason
    enough = choose_workers(config, shape_of("tiny"), steps=10**4, memory_bytes=memory)
    assert enough.value == 3
    assert "pay" not in enough.reason
    larger = choose_workers(config, shape_of("embedded"), steps=72, memory_bytes=memory)
    assert larger.value == 3


@pytest.mark.parametrize("seconds", [0, 7, 15.9, 16, 100, 1e4])
def test_the_last_worker_saves_its_start_and_one_more_would_not(seconds):
    number = worth_starting(seconds)
    if number > 1:
        assert seconds / (number - 1) - seconds / number >= WORKER_START_SECONDS - 1e-9
    assert seconds / number - seconds / (number + 1) < WORKER_START_SECONDS


def test_a_larger_step_gets_fewer_workers():
    memory = int(3.1 * each(KEYS))
    for keys, expected in ((KEYS, 3), ({**KEYS, "train.recompute": "none"}, 1)):
        chosen = choose_workers(
            from_flat(keys), shape_of("embedded"), steps=10**4, memory_bytes=memory
        )
        assert chosen.value == expected == min(3, max(1, memory // each(keys)))


def test_plan_counts_all_workers_that_share_the_memory():
    plan = plan_module.plan
    found = plan(from_flat(KEYS), card_bytes=int(3.5 * each(KEYS)))
    total = found.memory_bytes["total"]
    assert (found.workers.value, found.fits) == (3, True)
    assert found.spare_bytes == found.card_bytes - 3 * total
    asked = plan(from_flat({**KEYS, "federation.workers": 4}), card_bytes=int(3.5 * each(KEYS)))
    assert (asked.workers.value, asked.fits) == (4, False)
    out = io.StringIO()
    show_plan(Terminal(file=out, width=200), asked)
    assert f"4 workers (federation.workers): {4 * total / 1e9:.1f} GB together" in out.getvalue()
    alone = plan(from_flat({**KEYS, "federation.hospitals": 1}), card_bytes=10**12)
    assert alone.workers.value == 1
