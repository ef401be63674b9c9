"""The checks on watched draws: false alarms as often as is said, and wrong samplers named."""

import numpy as np
import pytest

from common.privacy import loop_checks
from common.privacy.loop_checks import _dispersion, pass_check, records_of
from common.privacy.watch import Step
from common.text.batches import pack

SHAPES = {0.25: (20, 32), 0.01: (24, 200), 0.9: (6, 16)}


def poisson(rng: np.random.Generator, rate: float) -> list[np.ndarray]:
    steps, units = SHAPES[rate]
    return [rng.random((steps, size)) < rate for size in (units, units, 300)]


@pytest.mark.parametrize("rate", list(SHAPES))
def test_poisson_draws_are_accused_as_often_as_is_said(monkeypatch, rate) -> None:
    """Oracle: a thousand drawn tables, at false alarms frequent enough to be counted."""
    monkeypatch.setattr(loop_checks, "FALSE_ALARM", 0.02)
    monkeypatch.setattr(loop_checks, "_SIGMAS", 2.576)
    rng = np.random.default_rng(3)
    found = [_dispersion(poisson(rng, rate), rate) for _ in range(1000)]
    for complaint, expected in (
        ("independence of steps", 0.01),
        ("independence of patients", 0.02),
    ):
        share = np.mean([complaint in complaints for complaints in found])
        assert share < expected + 5 * np.sqrt(expected / 1000)


@pytest.mark.parametrize("rate", list(SHAPES))
def test_wrong_samplers_are_named(rate) -> None:
    rng = np.random.default_rng(4)
    honest = poisson(rng, rate)
    assert _dispersion(honest, rate) == []
    once = [np.broadcast_to(table[:1], table.shape) for table in honest]
    assert "independence of steps" in _dispersion(once, rate)
    fixed_size = [
        np.argsort(rng.random(table.shape), axis=1) < round(rate * table.shape[1])
        for table in [*honest, *poisson(rng, rate)]
    ]
    together = [np.repeat(rng.random((800, 1)) < rate, 40, axis=1)]
    assert "independence of patients" in _dispersion(together, rate)
    if sum(map(len, fixed_size)) > 60:  # fewer steps cannot show that batches never differ
        assert "independence of patients" in _dispersion(fixed_size, rate)


def test_records_come_back_from_a_packed_batch(samples_of) -> None:
    records = samples_of((7, 5, 9), (2, 1, 2))
    assert records_of(pack(records)) == records


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_no_pass_may_mix_patients(open_tiny, dtype):
    session = open_tiny(dtype=dtype)
    assert not pass_check([Step(mixed=4)], session).passed
    assert pass_check([Step(mixed=1)], session).passed
