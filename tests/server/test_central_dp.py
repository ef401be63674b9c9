"""Hospital-level privacy: the option, its accounting, its noise and its warning."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from common.configio import from_flat
from common.errors import RunFailed, UserError
from common.privacy.accounting import analytic_gaussian_epsilon, epsilon
from common.privacy.budget.ledger import BudgetExhausted, Ledger
from common.privacy.settings import hospital_warning, is_private, plan_of, protects
from common.wire.contract import Update
from server.central_dp import HospitalPrivacyAggregator
from server.roster import Roster
from sim.runs.single import one_node

KEYS = {
    "privacy.unit": "hospital",
    "privacy.noise-multiplier": 2.0,
    "privacy.clip-norm": 0.5,
    "federation.hospitals": 4,
    "federation.rounds": 3,
    "federation.weighting": "uniform",
}
SIZE = 400_000


def b_of(value: float = 0.0) -> dict[str, np.ndarray]:
    return {
        "model.layers.0.self_attn.q_proj.lora_B": np.full((SIZE // 8, 4), value, np.float32),
        "model.layers.0.self_attn.v_proj.lora_B": np.full((SIZE // 8, 4), value, np.float32),
    }


def flat(b: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([b[key].ravel() for key in sorted(b)]).astype(np.float64)


def updates_of(norms: list[float], start: dict[str, np.ndarray]) -> list[Update]:
    rng = np.random.default_rng(0)
    found = []
    for place, norm in enumerate(norms):
        change = {key: rng.standard_normal(value.shape) for key, value in start.items()}
        factor = norm / max(np.linalg.norm(flat(change)), 1e-30)
        b = {key: (start[key] + factor * change[key]).astype(np.float32) for key in start}
        found.append(Update(hospital=f"hospital-{place}", b=b, weight=1.0, metrics={}))
    return found


@pytest.fixture
def aggregator(tmp_path):
    config = from_flat(KEYS)
    plan = plan_of(config)
    ledger = Ledger(tmp_path / "ledger.jsonl", plan)
    return HospitalPrivacyAggregator(config.federation, plan, ledger)


def test_the_plan_counts_rounds_and_hospitals() -> None:
    config = from_flat(KEYS)
    plan = plan_of(config)
    assert protects(config)
    assert not is_private(config)
    assert (plan.unit, plan.steps, plan.expected_batch, plan.sampling_rate) == ("hospital", 3, 4, 1)
    exact = analytic_gaussian_epsilon(2.0 / math.sqrt(3), 1e-5)
    assert epsilon(plan).value == pytest.approx(exact, abs=1e-4)


def test_each_update_is_clipped_and_the_mean_is_noised(aggregator) -> None:
    start = b_of(0.01)
    norms = [0.1, 0.5, 50.0, 0.0]
    updates = updates_of(norms, start)
    released = flat(aggregator.aggregate(start, updates, server_round=1)) - flat(start)
    clipped = sum(
        (flat(u.b) - flat(start)) * min(1.0, 0.5 / max(norm, 1e-9))
        for u, norm in zip(updates, norms, strict=True)
    )
    noise = released - clipped / 4
    claimed = 2.0 * 0.5 / 4
    assert noise.std() == pytest.approx(claimed, rel=0.01)
    assert abs(noise.mean()) < 5 * claimed / math.sqrt(SIZE)
    # the mutant: without clipping the third hospital stands out of the noise
    unclipped = sum(flat(u.b) - flat(start) for u in updates) / 4
    assert np.linalg.norm(unclipped - clipped / 4) > 10


def test_the_ledger_pays_for_every_round_and_no_more(aggregator, tmp_path) -> None:
    start = b_of()
    for number in (1, 2):
        aggregator.aggregate(start, updates_of([1.0] * 4, start), server_round=number)
    config, plan = aggregator.config, aggregator.plan
    # a server that died before its checkpoint of round 2 aggregates that round again, for free
    again = HospitalPrivacyAggregator(config, plan, Ledger(tmp_path / "ledger.jsonl", plan))
    again.aggregate(start, updates_of([1.0] * 4, start), server_round=2)
    assert again.ledger.steps == 2
    again.aggregate(start, updates_of([1.0] * 4, start), server_round=3)
    with pytest.raises(BudgetExhausted):
        again.aggregate(start, updates_of([1.0] * 4, start), server_round=4)


def test_a_missing_hospital_stops_the_round(aggregator) -> None:
    with pytest.raises(RunFailed, match="3 of 4 hospitals answered"):
        aggregator.aggregate(b_of(), updates_of([1.0] * 3, b_of()), server_round=1)


def test_other_strategies_and_the_single_node_are_refused(tmp_path) -> None:
    config = from_flat({**KEYS, "federation.strategy": "fedmedian"})
    plan = plan_of(config)
    with pytest.raises(RunFailed, match="fedavg"):
        HospitalPrivacyAggregator(config.federation, plan, Ledger(tmp_path / "l.jsonl", plan))
    with pytest.raises(UserError, match="hospital"):
        one_node(from_flat(KEYS))


def test_few_hospitals_come_with_a_warning() -> None:
    """The specification's figure: 869 at epsilon 8, 20 rounds, 5 hospitals, 2,621,440 values."""
    keys = {**KEYS, "federation.hospitals": 5, "federation.rounds": 20}
    plan = plan_of(from_flat({**keys, "privacy.noise-multiplier": 0, "privacy.target-epsilon": 8}))
    assert plan.noise_to_signal(2_621_440) == pytest.approx(869, rel=0.01)
    assert "nothing will be learnt" in hospital_warning(plan, 2_621_440)
    many = plan_of(from_flat({**keys, "federation.hospitals": 5000}))
    assert hospital_warning(many, 2_621_440) == ""


@pytest.mark.parametrize("fraction", [0.5, 0.99])
def test_a_share_of_the_hospitals_is_refused(fraction) -> None:
    """The sampler draws a fixed number of all names: others come in when one hospital leaves."""
    with pytest.raises(UserError, match="one hospital that leaves changes which others") as error:
        plan_of(from_flat({**KEYS, "federation.fraction": fraction}))
    assert "federation.fraction = 1" in str(error.value)
    # with patients as the unit nothing is claimed for the sampling of hospitals
    keys = {**KEYS, "privacy.unit": "patient", "federation.fraction": fraction}
    whole = {**keys, "federation.fraction": 1.0}
    assert plan_of(from_flat(keys)) == plan_of(from_flat(whole))


def others_changed(pick: Callable[[list[str], int], set[str]], hospitals: int = 20) -> int:
    """How many of 200 rounds ask other hospitals when hospital-01 was never there."""
    names = [f"hospital-{number:02d}" for number in range(1, hospitals + 1)]
    return sum(
        pick(names, number) - {names[0]} != pick(names[1:], number) - {names[0]}
        for number in range(200)
    )


def test_why_a_share_is_refused() -> None:
    """The roster's own choice against everyone, as the neighbouring relation asks."""

    def chosen(fraction: float) -> Callable[[list[str], int], set[str]]:
        def pick(names: list[str], number: int) -> set[str]:
            fingerprints: Any = None
            count = len(names)
            roster = Roster(
                fingerprints, remembered=frozenset(names), known_before=count, federation_size=count
            )
            federation = from_flat({**KEYS, "federation.fraction": fraction}).federation
            nodes, _ = roster.choose(federation, number, {n: i for i, n in enumerate(names)})
            return {names[node] for node in nodes}

        return pick

    assert others_changed(chosen(1.0)) == 0
    assert others_changed(chosen(0.5)) > 190
