"""A hospital's own limit holds over runs, whatever the server asks for."""

import json

import pytest

from client.epsilon_limit import MAX_EPSILON, PROMISE, LimitReached, keep_to_limit
from common.configio import from_flat
from common.privacy.accounting import epsilon
from common.privacy.settings import plan_of, with_calibrated_noise

KEYS = {
    "model.backbone": "tiny",
    "federation.rounds": 2,
    "federation.local-steps": 5,
    "privacy.target-epsilon": 3.0,
    "privacy.sampling-rate": 0.2,
}


def config_of(**changes):
    changed = {key.replace("__", ".").replace("_", "-"): v for key, v in changes.items()}
    return with_calibrated_noise(from_flat({**KEYS, **changed}))


def joins(config, place, limit=7.0):
    place.mkdir(exist_ok=True)
    keep_to_limit(config, {MAX_EPSILON: limit}, place)


def test_runs_add_up_and_the_first_beyond_the_limit_is_refused(tmp_path):
    config = config_of()
    cost = epsilon(plan_of(config)).value
    assert 2.9 < cost <= 3.0
    for _ in range(3):  # every message of a run asks, and a run counts once
        joins(config, tmp_path / "first")
    joins(config_of(train__seed=1), tmp_path / "second")
    for _ in range(2):
        with pytest.raises(LimitReached, match="limit is epsilon 7 over all runs"):
            joins(config_of(train__seed=2), tmp_path / "third")
    assert not (tmp_path / "third" / PROMISE).exists()
    joins(config_of(privacy__target_epsilon=0.9), tmp_path / "small")
    promised = [json.loads(file.read_text()) for file in tmp_path.glob(f"*/{PROMISE}")]
    assert sum(one["epsilon"] for one in promised) <= 7


def test_a_lower_limit_holds_for_a_run_under_way_and_forgets_nothing(tmp_path):
    joins(config_of(), tmp_path / "run")
    with pytest.raises(LimitReached, match="limit is epsilon 1 "):
        joins(config_of(), tmp_path / "run", limit=1.0)
    assert (tmp_path / "run" / PROMISE).exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"privacy__target_epsilon": 0.0},
        {"privacy__unit": "admission"},
        {"privacy__unit": "hospital"},
        {"privacy__deterministic_noise": True},
    ],
)
def test_only_runs_that_protect_patients_are_joined(tmp_path, changes):
    with pytest.raises(LimitReached, match="only in runs that protect every patient"):
        joins(config_of(**changes), tmp_path / "run", limit=100.0)


def test_a_useless_noise_multiplier_is_no_protection(tmp_path):
    config = config_of(privacy__target_epsilon=0.0, privacy__noise_multiplier=0.3)
    with pytest.raises(LimitReached, match="this one may spend"):
        joins(config, tmp_path / "run", limit=10.0)


def test_a_damaged_promise_costs_the_unknown(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / PROMISE).write_text("{}")
    for _ in range(2):
        with pytest.raises(LimitReached, match="damaged"):
            joins(config_of(), tmp_path / "run", limit=100.0)


def test_without_a_limit_any_run_is_joined(tmp_path):
    keep_to_limit(config_of(privacy__target_epsilon=0.0), {}, tmp_path / "run")
    assert not any(tmp_path.iterdir())
