"""The plan is frozen, complete, checked, and useless until it is calibrated."""

import dataclasses
import math

import pytest

from common.errors import UserError
from common.privacy.accounting import calibrate, epsilon
from common.privacy.budget.ledger import Ledger
from common.privacy.mechanism.noise import NoiseSource
from common.privacy.mechanism.release import GaussianMechanism


def test_an_uncalibrated_plan_raises_wherever_it_is_used(make_plan, tmp_path) -> None:
    plan = make_plan(noise_multiplier=None)
    for use in (
        lambda: plan.sigma,
        lambda: plan.noise_std,
        lambda: plan.noise_to_signal(100),
        lambda: epsilon(plan),
        lambda: GaussianMechanism(plan, 100, NoiseSource()),
        lambda: Ledger(tmp_path / "ledger.jsonl", plan),
    ):
        with pytest.raises(UserError, match="not calibrated"):
            use()
    assert not (tmp_path / "ledger.jsonl").exists()


def test_the_plan_is_frozen(make_plan) -> None:
    plan = make_plan()
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.clip_norm = 2.0


@pytest.mark.parametrize(
    "change",
    [
        {"clip_norm": 0.0},
        {"clip_norm": math.inf},
        {"clip_norm": math.nan},
        {"noise_multiplier": 0.0},
        {"noise_multiplier": -1.0},
        {"sampling_rate": 0.0},
        {"sampling_rate": 1.01},
        {"steps": 0},
        {"expected_batch": 0.0},
        {"max_admissions_per_patient": -1},
        {"delta": 0.0},
        {"delta": 1.0},
        {"unit": "ward"},
        {"relation": "replace-one"},
        {"accountant": "moments"},
    ],
)
def test_values_that_void_the_guarantee_are_refused(make_plan, change) -> None:
    with pytest.raises(UserError, match=next(iter(change))):
        make_plan(**change)


def test_every_field_changes_the_fingerprint(make_plan) -> None:
    others = {
        "unit": "admission",
        "clip_norm": 2.0,
        "noise_multiplier": 2.0,
        "sampling_rate": 0.2,
        "steps": 41,
        "expected_batch": 9.0,
        "max_admissions_per_patient": 5,
        "delta": 1e-6,
        "accountant": "rdp",
        "deterministic_noise": True,
    }
    prints = {make_plan(**{name: value}).fingerprint for name, value in others.items()}
    assert len(prints | {make_plan().fingerprint}) == len(others) + 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rate", "steps", "target"),
    [(0.1, 40, 3.0), (1.0, 10, 2.0), (0.01, 100, 0.1), (0.01, 100, 0.105), (0.01, 100, 0.03)],
)
def test_calibration_reaches_the_target_and_no_more_noise_than_needed(
    make_plan, rate, steps, target
) -> None:
    plan = make_plan(noise_multiplier=None, sampling_rate=rate, steps=steps)
    calibrated = calibrate(plan, target)
    assert epsilon(calibrated).value <= target
    assert epsilon(calibrated.with_noise(calibrated.sigma * 0.997)).value > target


def test_a_target_out_of_reach_is_refused(make_plan) -> None:
    plan = make_plan(noise_multiplier=None, sampling_rate=1.0, steps=10**6)
    with pytest.raises(UserError, match="target-epsilon"):
        calibrate(plan, 0.01)


def test_noise_to_signal_is_sigma_sqrt_p_over_d(make_plan) -> None:
    plan = make_plan(noise_multiplier=2.0, expected_batch=50.0)
    assert plan.noise_to_signal(2_621_440) == pytest.approx(2 * 1619.086 / 50, rel=1e-6)


def test_a_small_target_needs_no_more_noise_than_pld_says(make_plan) -> None:
    """RDP's orders end above epsilon 0.1, where PLD needs a multiplier of 3.3."""
    keys = {"noise_multiplier": None, "sampling_rate": 0.01, "steps": 100, "delta": 1e-5}
    assert calibrate(make_plan(**keys), 0.1).sigma == pytest.approx(3.303, abs=0.005)
    with pytest.raises(UserError, match="up to 1000 with privacy.accountant=rdp.*accountant=prv"):
        calibrate(make_plan(**keys, accountant="rdp"), 0.1)
