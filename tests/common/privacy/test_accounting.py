"""Accounting (specification test 9): Opacus, dp-accounting and closed forms against each other."""

import math

import pytest
from dp_accounting import dp_event
from dp_accounting.pld import pld_privacy_accountant

from common.errors import RunFailed
from common.privacy import accounting
from common.privacy.accounting import analytic_gaussian_epsilon, epsilon

GRID = [(0.1, 1.0, 100, 1e-5), (0.01, 0.8, 300, 1e-5), (0.5, 3.0, 40, 1e-6)]


def pld(rate: float, sigma: float, steps: int, delta: float) -> float:
    accountant = pld_privacy_accountant.PLDAccountant(value_discretization_interval=2e-4)
    event = dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(sigma))
    accountant.compose(dp_event.SelfComposedDpEvent(event, steps))
    return accountant.get_epsilon(delta)


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "sigma", "steps", "delta"), GRID)
def test_epsilon_equals_pld(make_plan, rate, sigma, steps, delta) -> None:
    plan = make_plan(sampling_rate=rate, noise_multiplier=sigma, steps=steps, delta=delta)
    cost, exact = epsilon(plan), pld(rate, sigma, steps, delta)
    assert cost.value == pytest.approx(exact, abs=1e-3)
    assert cost.value >= exact - 2e-4
    assert cost.value == max(cost.accountant, cost.cross_check)
    # the mutants: a fresh engine each of ten rounds, no composition, a forgotten sampling rate
    assert abs(pld(rate, sigma, steps // 10, delta) - exact) > 0.01
    assert abs(pld(rate, sigma, 1, delta) - exact) > 0.01
    assert abs(pld(min(1.0, 2 * rate), sigma, steps, delta) - exact) > 0.01


def gaussian_delta(sigma: float, value: float) -> float:
    """Delta of one Gaussian release, by numerical integration of the hockey stick."""
    from mpmath import exp, inf, mp, mpf, npdf, quad

    mp.dps = 30
    s, e = mpf(sigma), mpf(value)
    start = e * s * s + mpf(1) / 2  # where the densities' ratio is e^epsilon
    return float(
        quad(lambda x: npdf(x, 1, s) - exp(e) * npdf(x, 0, s), [start, start + 20 * s, inf])
    )


@pytest.mark.parametrize(
    ("sigma", "steps", "delta"), [(5.0, 20, 1e-5), (1.0, 1, 1e-6), (40.0, 300, 1e-5)]
)
def test_without_sampling_epsilon_is_the_analytic_gaussian(make_plan, sigma, steps, delta) -> None:
    plan = make_plan(sampling_rate=1.0, noise_multiplier=sigma, steps=steps, delta=delta)
    value = epsilon(plan).value
    single = sigma / math.sqrt(steps)
    assert value == pytest.approx(analytic_gaussian_epsilon(single, delta), abs=1e-4)
    assert gaussian_delta(single, analytic_gaussian_epsilon(single, delta)) == pytest.approx(
        delta, rel=1e-6
    )
    classic = math.sqrt(2 * math.log(1.25 / delta)) / single  # the textbook bound is no match
    assert abs(classic - value) > 0.05


def test_rdp_is_an_upper_bound_and_is_reported_as_the_larger(make_plan) -> None:
    tight, loose = epsilon(make_plan()), epsilon(make_plan(accountant="rdp"))
    assert loose.accountant > tight.value
    assert loose.value == loose.accountant
    assert loose.cross_check == tight.cross_check


def test_disagreeing_accountants_release_nothing(make_plan, monkeypatch) -> None:
    honest = accounting.prv_epsilon
    monkeypatch.setattr(accounting, "prv_epsilon", lambda *a: honest(*a) - 2e-3)
    with pytest.raises(RunFailed, match="disagree"):
        epsilon(make_plan(noise_multiplier=1.501))


def test_deterministic_noise_protects_nobody(make_plan) -> None:
    assert epsilon(make_plan(deterministic_noise=True)).value == math.inf
    assert epsilon(make_plan(deterministic_noise=True), 0).value == math.inf


def test_epsilon_grows_with_steps_from_zero(make_plan) -> None:
    costs = [epsilon(make_plan(), steps).value for steps in (0, 1, 10, 40)]
    assert costs[0] == 0.0
    assert costs == sorted(costs)
    assert len(set(costs)) == 4


def test_patient_epsilon_of_an_admission_level_claim() -> None:
    """Why the patient is the default unit: k admissions make k times the sensitivity."""
    one = analytic_gaussian_epsilon(2.5, 1e-5)
    assert analytic_gaussian_epsilon(2.5 / 5, 1e-5) > 5 * one
