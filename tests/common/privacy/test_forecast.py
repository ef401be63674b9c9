"""The forecast before a run: figures that follow from the plan alone, and advice that holds."""

import math

import pytest

from common.privacy.accounting import calibrate, epsilon
from common.privacy.forecast import alternatives, forecast, lines

P = 184_320


def test_the_forecast_tells_the_plans_own_figures(make_plan) -> None:
    plan = make_plan(expected_batch=1000.0)
    outlook = forecast(plan, P)
    assert outlook.epsilon == epsilon(plan).value
    assert outlook.noise_to_signal == pytest.approx(1.5 * math.sqrt(P) / 1000)
    assert outlook.advice == ()
    assert len(lines(outlook)) == 3


@pytest.mark.slow
def test_advice_is_true_at_equal_epsilon(make_plan) -> None:
    plan = calibrate(make_plan(noise_multiplier=None), 3.0)
    before = plan.noise_to_signal(P)
    changes = alternatives(plan, P, 3.0)
    assert [c.what.split(" ", 1)[0] for c in changes] == ["4", "4", "a", "half"]
    assert all(change.noise_to_signal < before for change in changes)
    both, _, fewer, rank = changes
    larger = make_plan(noise_multiplier=both.noise_multiplier, sampling_rate=0.4)
    assert epsilon(larger).value == pytest.approx(3.0, rel=0.005)
    shorter = make_plan(noise_multiplier=fewer.noise_multiplier, steps=10)
    assert epsilon(shorter).value == pytest.approx(3.0, rel=0.005)
    assert rank.noise_to_signal == pytest.approx(before / math.sqrt(2))


def test_reproducible_noise_is_forecast_as_no_protection(make_plan) -> None:
    outlook = forecast(make_plan(deterministic_noise=True), P)
    assert float(outlook.epsilon) == math.inf
    assert "epsilon inf" in lines(outlook)[0]
