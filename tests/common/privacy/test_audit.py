"""The audits (specification tests 5, 12 and 13), each on the real code and on broken variants."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from common.privacy import audit
from common.privacy.audit import (
    Guesses,
    chance_limit,
    inversion_test,
    lower_bound,
    noise_test,
    one_run_audit,
    p_value,
    single_release,
)
from common.privacy.canaries import area_with_deviation
from common.privacy.mechanism.gradients import PrivateGradient
from common.privacy.mechanism.noise import NoiseSource
from common.privacy.mechanism.release import GaussianMechanism
from common.text.batches import pack
from common.training.gradients import StepLoss, add_unit_gradients

M = 5000


@pytest.mark.slow
def test_one_run_audit_believes_the_real_mechanism(make_plan) -> None:
    for sigma in (1.0, 1.5, 4.0):
        finding = one_run_audit(make_plan(noise_multiplier=sigma), canaries=M)
        assert finding.passed
        assert finding.figure <= finding.limit
    strong = one_run_audit(make_plan(noise_multiplier=1.0), canaries=M)
    assert strong.figure > 0.2 * strong.limit  # the audit has power
    assert strong.has_power
    powerless = one_run_audit(make_plan(noise_multiplier=0.5), canaries=M)
    assert powerless.passed
    assert not powerless.has_power
    assert "no power" in powerless.verdict


@pytest.mark.slow
@pytest.mark.parametrize("sigma", [1.0, 1.5])
def test_one_run_audit_refutes_broken_mechanisms(make_plan, sigma) -> None:
    plan = make_plan(noise_multiplier=sigma)
    quarter = GaussianMechanism(
        single_release(plan).with_noise(sigma / 4), M, NoiseSource()
    ).release
    no_noise = one_run_audit(plan, canaries=M, release=lambda sums: sums / plan.expected_batch)
    weak = one_run_audit(plan, canaries=M, release=quarter)
    no_clip = one_run_audit(plan, canaries=M, clip=lambda rows, _: rows.sum(0))
    for finding in (no_noise, weak, no_clip):
        assert not finding.passed
        assert finding.figure > finding.limit


def test_every_release_without_noise_is_guessed_alike(make_plan) -> None:
    """The control has to be caught always, however the coins fall."""
    plan = make_plan(noise_multiplier=1.1, delta=1e-4)
    bare = [
        one_run_audit(plan, canaries=M, release=lambda sums: sums / plan.expected_batch, repeats=1)
        for _ in range(5)
    ]
    assert len({finding.figure for finding in bare}) == 1
    assert bare[0].figure == pytest.approx(4.583, abs=0.01)  # everyone guessed rightly


def test_a_claim_is_refuted_by_every_run_or_not_at_all(make_plan) -> None:
    plan = make_plan(noise_multiplier=1.0)
    honest = GaussianMechanism(single_release(plan), M, NoiseSource()).release
    for leaks, passed in (((True, True, False), True), ((True, True, True), False)):
        runs = iter(leaks)

        def release(sums: torch.Tensor, runs=runs) -> torch.Tensor:
            return sums / plan.expected_batch if next(runs) else honest(sums)

        finding = one_run_audit(plan, canaries=M, release=release)
        assert finding.passed is passed
        assert (finding.figure <= finding.limit) is passed


def test_p_value_is_binomial_without_delta_and_grows_with_it() -> None:
    guesses = Guesses(1000, 400, 300)
    success = math.e / (1 + math.e)
    assert p_value(guesses, 1.0, 0.0) == pytest.approx(stats.binom.sf(299, 400, success))
    assert p_value(guesses, 1.0, 1e-5) > p_value(guesses, 1.0, 0.0)
    assert p_value(guesses, 0.5, 1e-5) < p_value(guesses, 1.0, 1e-5)


def test_lower_bound_covers_randomised_response() -> None:
    """Oracle: for randomised response of a known epsilon the bound may exceed it in 5% of runs."""
    rng, true = np.random.default_rng(0), 1.0
    correct = rng.binomial(1000, math.e / (1 + math.e), size=200)
    bounds = [lower_bound(Guesses(1000, 1000, int(c)), 0.0) for c in correct]
    assert np.mean(np.array(bounds) > true) < 0.1
    assert np.median(bounds) > 0.8


@pytest.mark.slow
def test_noise_test_passes_the_real_noise_and_no_other(make_plan) -> None:
    plan = make_plan()
    assert noise_test(plan).passed

    def scaled(factor: float):
        honest = GaussianMechanism(plan, 250_000, NoiseSource()).release
        return lambda sums: honest(sums) * factor

    frozen = GaussianMechanism(plan, 250_000, NoiseSource()).release(torch.zeros(250_000))

    def uniform(sums: torch.Tensor) -> torch.Tensor:
        return (torch.rand(len(sums)) - 0.5) * math.sqrt(12) * plan.noise_std

    for mutant in (scaled(0.5), scaled(0.99), lambda _: frozen, uniform):
        assert not noise_test(plan, release=mutant).passed


@pytest.mark.slow
def test_noise_test_knows_that_the_grid_widens_large_noise(make_plan) -> None:
    """At sigma 100 rounding 250,000 coordinates costs more than a per cent of the width."""
    plan = make_plan(noise_multiplier=100.0)
    honest = GaussianMechanism(plan, 250_000, NoiseSource()).release
    assert noise_test(plan, release=honest).passed
    assert not noise_test(plan, release=lambda sums: honest(sums) * 0.99).passed


class WithoutPrivacy(PrivateGradient):
    """The mutant: the bare gradient."""

    def __call__(self, session, step: int) -> StepLoss:
        rows = torch.zeros(1, session.adapter.trainable_parameters)
        add_unit_gradients(session, pack(self.dataset), (0,), rows)
        session.adapter.flat_grad.copy_(rows[0])
        return StepLoss(None, 0, 0)


class OnlyClipped(WithoutPrivacy):
    """The mutant: clipped, not noised."""

    def __call__(self, session, step: int) -> StepLoss:
        result = super().__call__(session, step)
        session.adapter.flat_grad.mul_(1e-3)
        return result


class FaintNoise(PrivateGradient):
    """The mutant: a thousandth of the noise."""

    def __init__(self, dataset, plan, noise, **choices) -> None:
        super().__init__(dataset, plan.with_noise(plan.sigma / 1000), noise, **choices)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [8, 32])
def test_inversion_reads_tokens_without_privacy_and_nothing_with_it(
    open_tiny, samples_of, make_plan, rank
) -> None:
    session, plan = open_tiny(rank=rank), make_plan(noise_multiplier=1.0)
    records = samples_of((rank // 2 + 1,) * 12, range(12))
    finding = inversion_test(session, records, plan)
    assert finding.passed
    assert finding.limit < 0.75
    for mutant in (WithoutPrivacy, OnlyClipped, FaintNoise):
        broken = inversion_test(session, records, plan, kind=mutant)
        assert not broken.passed
        assert broken.verdict == "tokens are disclosed"
    for mutant in (WithoutPrivacy, OnlyClipped):
        power = inversion_test(session, records, plan, kind=mutant, expect_private=False)
        assert power.passed
        assert power.figure > 0.99


def test_the_inversion_is_decided_on_the_figure_it_shows(
    open_tiny, samples_of, make_plan, monkeypatch
) -> None:
    session, records = open_tiny(rank=8), samples_of((5,) * 12, range(12))
    limit = chance_limit([4] * 12, 1024)
    for mean, passed in ((limit - 0.001, True), (limit + 0.001, False)):
        areas = iter([1.0] * 4 + [(12 * mean - 4) / 8] * 8)  # single records disclose, or seem to
        monkeypatch.setattr(audit, "disclosure", lambda *_, areas=areas: next(areas))
        finding = inversion_test(session, records, make_plan())
        assert (finding.figure, finding.limit) == (pytest.approx(mean), limit)
        assert finding.passed is passed


def test_too_few_records_are_refused(open_tiny, samples_of, make_plan) -> None:
    with pytest.raises(ValueError, match="1 records are too few"):
        inversion_test(open_tiny(rank=8), samples_of((5,), (1,)), make_plan())


@pytest.mark.parametrize("tokens", [1, 4, 16])
def test_chance_stays_below_its_limit_as_often_as_it_says(monkeypatch, tokens) -> None:
    """Oracle: ranks drawn at random, at false alarms frequent enough to be counted."""
    monkeypatch.setattr(audit, "FALSE_ALARM", 0.01)
    rng, limit = np.random.default_rng(2), chance_limit([tokens] * 12, 200)
    order = rng.permuted(np.tile(np.arange(200), (24_000, 1)), axis=1)[:, :tokens]
    areas = (order.sum(1) - tokens * (tokens - 1) / 2) / (tokens * (200 - tokens))
    assert 0.006 < np.mean(areas.reshape(2000, 12).mean(1) > limit) < 0.014


def test_roc_area_equals_counting_pairs() -> None:
    rng = np.random.default_rng(1)
    high, low = rng.integers(0, 9, 40), rng.integers(0, 7, 60)
    pairs = [(h > n) + 0.5 * (h == n) for h in high for n in low]
    assert area_with_deviation(high, low).value == pytest.approx(np.mean(pairs))
