"""The release and its receipt (specification tests 5, 6 and 8 at the mechanism's level)."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from common.configio import from_flat
from common.errors import RunFailed, UserError
from common.privacy.budget.ledger import Ledger
from common.privacy.budget.receipts import ledger_line, receipt
from common.privacy.mechanism.noise import NoiseSource
from common.privacy.mechanism.release import GaussianMechanism, grid_for

P = 1_000_000


@pytest.mark.slow
def test_released_noise_is_sigma_c_over_d(make_plan) -> None:
    plan = make_plan(clip_norm=0.3, noise_multiplier=2.5, expected_batch=20.0)
    signal = torch.linspace(-0.1, 0.1, P)
    released = GaussianMechanism(plan, P, NoiseSource()).release(signal)
    noise = (released.double() - signal.double() / 20.0) / (2.5 * 0.3 / 20.0)
    assert released.dtype == torch.float32
    assert stats.kstest(noise.numpy(), "norm").pvalue > 1e-6
    # the grid adds 0.15%; both bounds are five to six standard deviations away
    assert 0.997 < float(noise.std()) < 1.005
    for mutant in (noise / 2, noise * math.sqrt(2), noise * 20.0):
        assert stats.kstest(mutant.numpy(), "norm").pvalue < 1e-6


@pytest.mark.parametrize("parameters", [1, 1000, 5_242_880])
@pytest.mark.parametrize("sigma", [0.3, 1.0, 20.0])
@pytest.mark.parametrize("clip_norm", [1e-4, 1.0, 300.0])
def test_grid_covers_rounding_and_is_a_power_of_two(
    make_plan, parameters, sigma, clip_norm
) -> None:
    """Two neighbouring sums, rounded, differ by at most C / D + step sqrt(P)."""
    plan = make_plan(noise_multiplier=sigma, clip_norm=clip_norm, expected_batch=7.0)
    grid = grid_for(plan, parameters)
    sensitivity = clip_norm / 7.0 + grid.step * math.sqrt(parameters)
    assert grid.std >= sigma * sensitivity
    assert grid.std < 1.013 * plan.noise_std
    assert math.frexp(grid.step)[0] == 0.5
    assert 2**22 <= grid.std_steps <= 2**24


@pytest.mark.parametrize("clip_norm", [1e-6, 1e6])
def test_every_noise_that_a_configuration_allows_can_be_drawn(make_plan, clip_norm) -> None:
    """At the bounds, and at the parameters of all projections of an 8B model (rank 32)."""
    bounds = {"privacy.clip-norm": clip_norm, "privacy.noise-multiplier": 2000.0}
    most = from_flat(bounds).privacy
    plan = make_plan(clip_norm=most.clip_norm, noise_multiplier=most.noise_multiplier)
    GaussianMechanism(plan, 84_000_000, NoiseSource())
    assert grid_for(plan, 3).std_steps > 2**22
    for key, value in bounds.items():
        with pytest.raises(UserError, match=key):
            from_flat({key: value * (0.5 if value < 1 else 50)})
    with pytest.raises(ValueError, match="standard deviation"):
        GaussianMechanism(plan.with_noise(1e5), 84_000_000, NoiseSource())


def test_a_sum_that_is_not_finite_is_never_released(make_plan) -> None:
    mechanism = GaussianMechanism(make_plan(), 3, NoiseSource())
    for value in (math.inf, math.nan):
        with pytest.raises(RunFailed):
            mechanism.release(torch.tensor([0.0, value, 0.0]))
    with pytest.raises(RunFailed):
        mechanism.release(torch.zeros(4))


def test_noise_is_drawn_before_the_sum_is_looked_at(make_plan, monkeypatch) -> None:
    """So that the host does not first wait for a GPU: here the sum is there only with the noise."""
    sum_P, plan = torch.full((3,), math.nan), make_plan(expected_batch=2.0)
    mechanism = GaussianMechanism(plan, 3, NoiseSource())

    def late(count, _std):
        sum_P.copy_(torch.tensor([1.0, 0.5, 0.0]))
        return np.zeros(count, dtype=np.int64)

    monkeypatch.setattr(mechanism.noise, "gaussian", late)
    assert mechanism.release(sum_P).tolist() == [0.5, 0.25, 0.0]


def test_receipt_and_ledger_line_say_what_ran(make_plan, tmp_path) -> None:
    plan = make_plan()
    ledger = Ledger(tmp_path / "ledger.jsonl", plan)
    ledger.charge(1, 10)
    paper = receipt(
        "hospital-1", ledger, GaussianMechanism(plan, 100, NoiseSource()), "digest"
    ).as_json()
    line = ledger_line(plan, "hospital-1", 1, 10).as_json()
    assert set(line) == {
        *("hospital", "round", "sampling_rate", "noise_multiplier", "clip_norm", "steps"),
        *("epsilon", "delta", "unit", "accountant"),
    }
    assert paper["epsilon"] == line["epsilon"] < 2
    assert (paper["steps"], paper["private"], paper["source_digest"]) == (10, True, "digest")
    needed = {"mechanism", "unit", "relation", "sampling_rate", "noise_multiplier", "clip_norm"}
    needed |= {"expected_batch", "steps", "epsilon", "delta", "accountant", "noise"}
    assert needed <= set(paper)


def test_reproducible_noise_makes_every_receipt_infinite(make_plan, tmp_path) -> None:
    fixed = NoiseSource(deterministic=b"0")
    marked = make_plan(deterministic_noise=True)
    ledger = Ledger(tmp_path / "marked.jsonl", marked)
    assert float(receipt("h", ledger, GaussianMechanism(marked, 9, fixed), "").epsilon) == math.inf
    assert float(ledger_line(marked, "h", 1, 1).epsilon) == math.inf
    # a plan that hides it is found out by its source
    hidden = make_plan()
    ledger = Ledger(tmp_path / "hidden.jsonl", hidden)
    ledger.charge(1, 1)
    paper = receipt("h", ledger, GaussianMechanism(hidden, 9, fixed), "")
    assert (float(paper.epsilon), paper.private) == (math.inf, False)
