"""The audit of the whole loop: a sound loop passes, and every broken variant of it is caught."""

import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from common.choice import Choice
from common.configio import from_flat
from common.privacy import loop_checks
from common.privacy.canaries import (
    RoundSeen,
    area_with_deviation,
    ideal_areas,
    likelihood_ratios,
)
from common.privacy.loop_checks import opened
from common.privacy.mechanism import gradients
from common.privacy.settings import plan_of
from sim.checks import audit_loop
from sim.checks.audit_page import QUESTIONS

SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks" / "audit_power.py"
KEYS: dict[str, Any] = {
    "model.backbone": "tiny",
    "train.optimizer": "adamw",
    "train.learning-rate": 0.005,
    "federation.rounds": 2,
    "federation.local-steps": 3,
    "privacy.noise-multiplier": 1.0,
    "privacy.delta": 1e-4,
    "privacy.sampling-rate": 0.4,
    "privacy.max-admissions-per-patient": 2,
}


def power() -> Any:
    spec = importlib.util.spec_from_file_location("audit_power", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def refuted(session: Any, canaries: int = 24, **keys: Any) -> dict[str, str]:
    config = from_flat({**KEYS, **keys})
    findings = audit_loop.audit_loop(session, config, canaries=canaries)
    assert {finding.audit for finding in findings} < set(QUESTIONS)
    assert all(finding.false_alarm < 1e-4 for finding in findings)
    return {finding.audit: finding.verdict for finding in findings if not finding.passed}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("unit", ["patient", "admission"])
def test_a_sound_loop_passes(open_tiny, dtype, unit) -> None:
    assert refuted(open_tiny(dtype=dtype), **{"privacy.unit": unit}) == {}


@pytest.mark.slow
def test_a_pass_that_keeps_patients_apart_is_sound(open_tiny, monkeypatch) -> None:
    """As on a GPU: four patients at once, each by calls of its own; not so if they only share."""

    def apart(session: Any) -> Choice[str]:
        return Choice("apart", "")

    monkeypatch.setattr(gradients, "choose_passes", apart)
    monkeypatch.setattr(loop_checks, "choose_passes", apart)
    assert refuted(open_tiny(dtype="bf16")) == {}
    honest = gradients.add_unit_gradients
    monkeypatch.setattr(gradients, "add_unit_gradients", lambda *a, apart: honest(*a, apart=False))
    assert "patients in one pass" in refuted(open_tiny(dtype="bf16"))


@pytest.mark.slow
def test_everyone_takes_part_at_rate_one(open_tiny) -> None:
    assert refuted(open_tiny(), **{"privacy.sampling-rate": 1.0}) == {}


CAUGHT_BY = {
    "noise halved": "noise in the loop",
    "noise reused": "noise in the loop",
    "clip off": "releases taken apart",
    "clip per admission": "releases taken apart",
    "admissions added": "releases taken apart",
    "sampling fixed": "draws",
    "sampling known to the server": "draws",
    "rate x 1.2": "draws",
    "wrong divisor": "releases taken apart",
    "micro-batch noised twice": "releases taken apart",
    "empty draw without noise": "releases taken apart",
    "ledger one step short": "ledger",
    "bf16 passes shared": "patients in one pass",
    "clipped sum sent along": "what is sent",
}


def test_every_mutant_of_the_benchmark_is_here() -> None:
    assert set(power().MUTANTS) == set(CAUGHT_BY)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", list(CAUGHT_BY))
def test_a_broken_loop_is_caught(open_tiny, monkeypatch, mutant) -> None:
    module = power()
    module.MUTANTS[mutant](monkeypatch.setattr)
    session = open_tiny(dtype="bf16" if mutant in module.BF16 else "fp32")
    assert CAUGHT_BY[mutant] in refuted(session)


@pytest.mark.slow
def test_draws_from_a_public_seed_are_caught_by_their_secrecy_too(open_tiny, monkeypatch) -> None:
    """Whatever the source is asked: two runs with the same seeds must not draw alike."""
    power().sampling_known(monkeypatch.setattr)
    assert "two runs with the same seeds draw alike" in refuted(open_tiny())["draws"]


@pytest.mark.slow
def test_without_noise_the_attack_itself_refutes_the_mechanism(open_tiny, monkeypatch) -> None:
    from common.privacy.mechanism.noise import NoiseSource

    def silent(self: NoiseSource, count: int, std: float) -> np.ndarray:
        return np.zeros(count, dtype=np.int64)

    monkeypatch.setattr(NoiseSource, "gaussian", silent)
    found = refuted(open_tiny(), canaries=100)
    assert found["membership in the loop"] == "more than the claimed mechanism discloses"


@pytest.mark.slow
def test_the_rest_of_an_opened_release_is_the_noise(open_tiny) -> None:
    """Oracle: a hospital of nobody releases noise alone."""
    session, config = open_tiny(), from_flat(KEYS)
    run = audit_loop.watch_run(session, config, ())
    plan = plan_of(config)
    for step in run.steps:
        found = opened(session, step, plan)
        assert found.deviation < 1e-6
        expected = step.release_P * plan.expected_batch / plan.clip_norm
        np.testing.assert_allclose(found.rest_P.numpy(), expected.numpy())


def seen(gram: np.ndarray, releases: np.ndarray) -> RoundSeen:
    return RoundSeen(gram_MM=gram, releases_SM=releases, bare_SM=releases)


def test_one_canary_alone_is_judged_by_its_exact_likelihood_ratio(make_plan) -> None:
    """Oracle: Gaussian densities at 0 and 1, mixed with the sampling rate."""
    plan = make_plan(noise_multiplier=1.3, sampling_rate=0.3)
    values = np.array([[-0.4], [0.9], [2.2]])
    ratio = likelihood_ratios([seen(np.eye(1), values)], plan)
    density = stats.norm(scale=1.3).pdf
    exact = np.log(0.7 + 0.3 * density(values - 1) / density(values)).sum()
    assert ratio[0] == pytest.approx(exact, rel=1e-9)


def test_the_simulated_null_is_the_analytic_one(make_plan) -> None:
    """Oracle: at q = 1 two unit normals 1 / sigma apart, area Phi(1 / sigma sqrt 2)."""
    plan = make_plan(noise_multiplier=1.5, sampling_rate=1.0)
    rounds = [seen(np.eye(300), np.zeros((1, 300)))]
    areas = ideal_areas(rounds, plan, np.random.default_rng(0), runs=40)
    assert areas.mean() == pytest.approx(stats.norm.cdf(1 / 1.5 / math.sqrt(2)), abs=0.01)


def test_the_areas_deviation_is_that_of_repeated_samples() -> None:
    rng = np.random.default_rng(0)
    drawn = [area_with_deviation(rng.normal(1, 1, 60), rng.normal(0, 1.5, 80)) for _ in range(400)]
    values, deviations = np.array(drawn).T
    assert deviations.mean() == pytest.approx(values.std(), rel=0.1)
    high, low = rng.normal(1, 1, 60), rng.normal(0, 1, 80)
    pairs = (high[:, None] > low).mean()
    assert area_with_deviation(high, low).value == pytest.approx(pairs)
