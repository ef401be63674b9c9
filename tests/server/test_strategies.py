"""Flower's strategies behind our checks, each against its formula written out here in numpy."""

import re
from dataclasses import replace

import numpy as np
import pytest
from tampering import silent

from client.proximal import Proximal
from common.config import FederationConfig
from common.configio import choices, known_keys
from common.data.dataset import open_hospitals
from common.errors import RunFailed, UserError
from common.privacy.settings import plan_of
from common.rundir import RunDirectory
from common.training.gradients import BatchGradient
from common.training.hospital_data import encode_hospital
from common.training.worker import Worker
from common.wire.contract import Update
from server.strategies import STRATEGIES, check_strategy
from server.strategy import Aggregator
from sim.flower.deploy import deploy
from sim.runs.federate import federate
from sim.runs.sweep import plan_cells

KEY = "model.layers.0.self_attn.q_proj.lora_B"
OTHER = "model.layers.0.self_attn.v_proj.lora_B"
WEIGHTS = (3.0, 1.0, 6.0, 2.0, 5.0)
LOSSES = (0.5, 3.0, 0.0, 1.2, 0.7)


def drawn(seed):
    generator = np.random.default_rng(seed)
    return {
        KEY: generator.normal(size=(4, 2)).astype(np.float32),
        OTHER: generator.normal(size=(3, 2)).astype(np.float32),
    }


def updates(seed=0):
    return [
        Update(
            hospital=f"hospital-{i + 1}",
            b=drawn([seed, i]),
            weight=weight,
            metrics={"train-loss": LOSSES[i]},
        )
        for i, weight in enumerate(WEIGHTS)
    ]


def stacked(key, seed=0):
    return np.stack([update.b[key].astype(np.float64) for update in updates(seed)])


def mean(key, seed=0):
    return np.average(stacked(key, seed), axis=0, weights=WEIGHTS)


def start():
    return drawn(99)


@pytest.mark.parametrize("strategy", ["fedavg", "fedprox"])
def test_weighted_mean(strategy):
    result = Aggregator(FederationConfig(strategy=strategy)).aggregate(
        start(), updates(), server_round=1
    )
    for key in (KEY, OTHER):
        np.testing.assert_allclose(result[key], mean(key), rtol=1e-6)
        assert result[key].dtype == np.float32


def test_uniform_weighting():
    result = Aggregator(FederationConfig(weighting="uniform")).aggregate(
        start(), updates(), server_round=1
    )
    np.testing.assert_allclose(result[KEY], stacked(KEY).mean(axis=0), rtol=1e-6)


def test_median():
    result = Aggregator(FederationConfig(strategy="fedmedian")).aggregate(
        start(), updates(), server_round=1
    )
    np.testing.assert_allclose(result[KEY], np.sort(stacked(KEY), axis=0)[2], rtol=1e-6)


def test_trimmed_mean():
    result = Aggregator(FederationConfig(strategy="trimmed-mean", trim=0.2)).aggregate(
        start(), updates(), server_round=1
    )
    np.testing.assert_allclose(
        result[KEY], np.sort(stacked(KEY), axis=0)[1:-1].mean(axis=0), rtol=1e-6
    )


def test_krum_takes_one_update_close_to_the_others():
    """Blanchard et al. 2017: the least sum of squared distances to the n - f - 2 nearest."""
    near = updates()
    far = Update(
        hospital="hospital-0", b={k: v + 100 for k, v in drawn(5).items()}, weight=9.0, metrics={}
    )
    result = Aggregator(FederationConfig(strategy="krum", malicious=1)).aggregate(
        start(), [far, *near], server_round=1
    )
    flat = np.stack(
        [np.concatenate([u.b[KEY].ravel(), u.b[OTHER].ravel()]) for u in [far, *near]]
    ).astype(np.float64)
    squared = ((flat[:, None] - flat[None]) ** 2).sum(-1)
    scores = [np.sort(row)[1 : 1 + 6 - 1 - 2].sum() for row in squared]
    best = int(np.argmin(scores))
    assert best != 0
    np.testing.assert_allclose(result[KEY], [far, *near][best].b[KEY], rtol=1e-6)


@pytest.mark.parametrize(("q", "rate"), [(0.0, 0.0), (0.5, 0.1), (1.0, 0.0), (5.0, 0.3)])
def test_q_fedavg_is_algorithm_2(q, rate):
    """Li et al. 2020, with p_k as weights; one step of its objective's own formula, in fp64."""
    config = FederationConfig(strategy="q-fedavg", fairness=q, server_learning_rate=rate)
    result = Aggregator(config).aggregate(start(), updates(), server_round=1)
    before = np.concatenate([start()[key].ravel() for key in (KEY, OTHER)]).astype(np.float64)
    flat = np.concatenate([stacked(key).reshape(5, -1) for key in (KEY, OTHER)], axis=1)
    constant = 1 / (rate or 1.0)
    loss, share = np.array(LOSSES) + 1e-10, np.array(WEIGHTS) / sum(WEIGHTS)
    gradient = constant * (before - flat)
    h = q * loss ** (q - 1) * (gradient**2).sum(1) + constant * loss**q
    step = (share * loss**q) @ gradient / (share @ h)
    found = np.concatenate([result[key].ravel() for key in (KEY, OTHER)])
    np.testing.assert_allclose(found, before - step, rtol=1e-5, atol=1e-6)
    if q == 0:
        plain = Aggregator(FederationConfig()).aggregate(start(), updates(), server_round=1)
        np.testing.assert_allclose(result[KEY], plain[KEY], rtol=1e-6)


def test_q_fedavg_moves_towards_the_hospital_with_the_larger_loss():
    """Two hospitals that pull apart: with q above 0 the worse one wins, else nobody does."""

    def moved(q):
        pulls = [
            Update(hospital=h, b={KEY: np.full((1, 1), to)}, weight=1.0, metrics={"train-loss": f})
            for h, to, f in (("a", 1.0, 1.0), ("b", -1.0, 4.0))
        ]
        config = FederationConfig(strategy="q-fedavg", fairness=q)
        b = {KEY: np.zeros((1, 1), np.float32)}
        return float(Aggregator(config).aggregate(b, pulls, server_round=1)[KEY][0, 0])

    assert moved(0.0) == 0
    assert moved(1.0) < -0.1


def test_q_fedavg_is_refused_with_privacy(tiny_config):
    for unit in ("patient", "hospital"):
        config = tiny_config(
            federation__strategy="q-fedavg", privacy__noise_multiplier=1.0, privacy__unit=unit
        )
        with pytest.raises(UserError, match="no loss leaves a hospital"):
            plan_of(config)


def test_fedavgm_is_momentum_on_the_round_s_change():
    aggregator = Aggregator(FederationConfig(strategy="fedavgm", server_momentum=0.9))
    b, velocity = start(), 0.0
    expected = b[KEY].astype(np.float64)
    for server_round in (1, 2, 3):
        velocity = 0.9 * velocity + (expected - mean(KEY, server_round))
        expected = expected - velocity
        b = aggregator.aggregate(b, updates(server_round), server_round=server_round)
        np.testing.assert_allclose(b[KEY], expected, rtol=1e-5, atol=1e-6)


def test_fedadam_is_adam_on_the_round_s_change():
    """Reddi et al. 2021, with Flower's bias correction (exponent round + 1)."""
    aggregator = Aggregator(FederationConfig(strategy="fedadam", server_learning_rate=0.05))
    b = start()
    expected, m, v = b[KEY].astype(np.float64), 0.0, 0.0
    for server_round in (1, 2, 3):
        change = mean(KEY, server_round) - expected
        m, v = 0.9 * m + 0.1 * change, 0.99 * v + 0.01 * change**2
        rate = 0.05 * np.sqrt(1 - 0.99 ** (server_round + 1)) / (1 - 0.9 ** (server_round + 1))
        expected = expected + rate * m / (np.sqrt(v) + 1e-3)
        b = aggregator.aggregate(b, updates(server_round), server_round=server_round)
        np.testing.assert_allclose(b[KEY], expected, rtol=1e-5, atol=1e-6)


def test_fedyogi_adds_to_the_second_moment_by_sign():
    """Reddi et al. 2021, algorithm 2 (Yogi), with Flower's defaults and no bias correction."""
    aggregator = Aggregator(FederationConfig(strategy="fedyogi", server_learning_rate=0.05))
    b = start()
    expected, m, v = b[KEY].astype(np.float64), 0.0, 0.0
    for server_round in (1, 2, 3):
        change = mean(KEY, server_round) - expected
        m = 0.9 * m + 0.1 * change
        v = v - 0.01 * change**2 * np.sign(v - change**2)
        expected = expected + 0.05 * m / (np.sqrt(v) + 1e-3)
        b = aggregator.aggregate(b, updates(server_round), server_round=server_round)
        np.testing.assert_allclose(b[KEY], expected, rtol=1e-5, atol=1e-6)


def test_every_configured_strategy_has_a_spec():
    assert set(STRATEGIES) == set(choices(known_keys()["federation.strategy"]))


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_order_of_arrival_changes_nothing_and_state_comes_back(strategy):
    config = FederationConfig(strategy=strategy)
    one, other = Aggregator(config), Aggregator(config)
    b = one.aggregate(start(), updates(1), server_round=1)
    again = other.aggregate(start(), updates(1)[::-1], server_round=1)
    for key in (KEY, OTHER):
        np.testing.assert_array_equal(b[key], again[key])
    restored = Aggregator(config)
    restored.state = dict(one.state)
    goes_on = one.aggregate(b, updates(2), server_round=2)
    resumed = restored.aggregate(b, updates(2), server_round=2)
    for key in (KEY, OTHER):
        np.testing.assert_array_equal(goes_on[key], resumed[key])


def test_an_aggregate_that_is_not_finite_fails():
    huge = [
        Update(
            hospital=u.hospital, b={k: v * 0 + 3e38 for k, v in u.b.items()}, weight=1.0, metrics={}
        )
        for u in updates()
    ]
    aggregator = Aggregator(FederationConfig(strategy="fedavgm", server_momentum=0.99))
    with pytest.raises(RunFailed, match="not finite"), np.errstate(over="ignore"):
        b = start()
        for server_round in range(1, 5):
            b = aggregator.aggregate(b, huge, server_round=server_round)


def test_proximal_gradient_is_that_of_the_penalty(tiny_config):
    """Against a central difference of ``mu / 2 * |b - anchor|^2``."""
    config = tiny_config()
    session = Worker().session(config)
    data = encode_hospital(open_hospitals(config).hospitals[0], session, config)
    flat = session.adapter.flat
    flat.copy_(flat.new_tensor(np.random.default_rng(0).normal(size=flat.shape)) * 0.01)
    anchor = flat.clone() * 0.5
    plain = BatchGradient(data.train, config.train, data.name)
    plain(session, 0)
    before = session.adapter.flat_grad.clone()
    Proximal(source=plain, anchor_P=anchor, mu=0.3)(session, 0)
    added = (session.adapter.flat_grad - before).double()
    step = 1e-3
    for place in (0, 7, 100):
        ahead, behind = flat.double().clone(), flat.double().clone()
        ahead[place] += step
        behind[place] -= step
        slope = sum(
            sign * 0.15 * float(((b - anchor.double()) ** 2).sum())
            for sign, b in ((1, ahead), (-1, behind))
        ) / (2 * step)
        assert abs(float(added[place]) - slope) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("strategy", sorted(set(STRATEGIES) - {"fedavg"}))
def test_every_strategy_trains(strategy, tiny_config, in_process, caplog):
    hospitals = 5 if strategy in ("trimmed-mean", "krum") else 3
    plain = tiny_config(federation__hospitals=hospitals)
    rate = 0.05 if strategy in ("fedadam", "fedyogi") else 0.0
    robust = replace(plain.federation, strategy=strategy, server_learning_rate=rate)
    done = in_process(replace(plain, federation=robust))
    losses = done.summary["validation_loss"]
    assert losses[-1] < losses[0]
    assert done.sha != in_process(plain).sha
    assert not [line for line in caplog.messages if "withstands" in line]


WITHSTAND_NOTHING = {
    "trimmed-mean": (
        {"strategy": "trimmed-mean"},
        "cuts nothing of 3 hospitals a round; allowed: federation.trim x hospitals a round",
    ),
    "trimmed-mean of a few": (
        {"strategy": "trimmed-mean", "hospitals": 8, "fraction": 0.5},
        "cuts nothing of 4 hospitals a round",
    ),
    "a trim of 0": ({"strategy": "trimmed-mean", "hospitals": 9, "trim": 0.0}, "cuts nothing of 9"),
    "krum": ({"strategy": "krum"}, "withstands nobody among 3 hospitals a round; allowed: at leas"),
    "krum of a few": ({"strategy": "krum", "hospitals": 8, "fraction": 0.5}, "among 4 hospitals"),
    "krum of two": ({"strategy": "krum", "hospitals": 6, "malicious": 2}, "+ 3 = 7; fix: "),
}
ENOUGH = [
    {"strategy": "trimmed-mean", "hospitals": 5},
    {"strategy": "trimmed-mean", "hospitals": 3, "trim": 0.34},
    {"strategy": "trimmed-mean", "hospitals": 3, "only": "hospital-1"},
    {"strategy": "krum", "hospitals": 5},
    {"strategy": "krum", "hospitals": 10, "fraction": 0.5},
    {"strategy": "krum", "hospitals": 3, "malicious": 0},
    {"strategy": "fedmedian", "hospitals": 1},
]


@pytest.mark.parametrize("kind", WITHSTAND_NOTHING)
def test_strategy_that_withstands_nothing_is_refused(kind, tiny_config, tmp_path):
    """By every verb that starts a federation, before anything is read or written."""
    settings, reason = WITHSTAND_NOTHING[kind]
    config = tiny_config(**{f"federation__{key}": value for key, value in settings.items()})
    folder = tmp_path / "run"
    with pytest.raises(UserError, match=re.escape(reason)):
        federate(config, command_line=[], run_dir=folder)
    with pytest.raises(UserError, match=re.escape(reason)):
        plan_cells(config, arms=["fa-lora"], seeds=[0])
    hospitals = {f"h{number}": "/data" for number in range(config.federation.hospitals)}
    with pytest.raises(UserError, match=re.escape(reason)):
        deploy(config, folder, hospitals=hospitals, host="localhost", port=9092)
    assert not folder.exists()


@pytest.mark.parametrize("settings", ENOUGH)
def test_strategy_that_withstands_something_is_taken(settings):
    check_strategy(FederationConfig(**settings))


def test_server_refuses_it_too(tiny_config, in_process, tmp_path):
    """Plain ``flwr run`` never passes our launcher; the hospitals say how many they are."""
    with pytest.raises(UserError, match="cuts nothing of 3 hospitals"):
        in_process(tiny_config(federation__strategy="trimmed-mean"))
    assert RunDirectory(tmp_path / "run-1").checkpoint_names() == []


def test_round_that_lost_hospitals_says_that_it_withstands_nothing(tiny_config, in_process, caplog):
    config = tiny_config(
        federation__strategy="trimmed-mean",
        federation__hospitals=5,
        federation__rounds=1,
        federation__timeout_seconds=0.2,
    )
    done = in_process(config, tamper={0: silent("train")})
    assert "round 1: trimmed-mean withstands nothing with 4 updates" in caplog.messages
    events = [(e.round, e.value) for e in done.run.metrics("withstands-nothing")]
    assert events == [(1, 4)]
    whole = in_process(config)
    assert whole.run.metrics("withstands-nothing") == []


def test_flower_trims_and_picks_as_the_check_says():
    """One update far away: cut or not picked from five, and not so with fewer."""

    def aggregate(strategy, count):
        near = [
            Update(hospital=f"h{i}", b={KEY: np.full((2, 2), 1 + i / 100)}, weight=1.0, metrics={})
            for i in range(count - 1)
        ]
        far = Update(hospital="z", b={KEY: np.full((2, 2), 1e6)}, weight=1.0, metrics={})
        aggregator = Aggregator(FederationConfig(strategy=strategy))
        return aggregator.aggregate(start(), [*near, far], server_round=1)[KEY].max()

    assert aggregate("trimmed-mean", 4) > 1e5
    assert aggregate("trimmed-mean", 5) < 2
    assert aggregate("krum", 5) < 2


def test_lora_mode_sends_a_and_b_and_starts_from_the_drawn_a(tiny_config, in_process):
    """The baseline: its contract names A too; B alone is refused there, as A is elsewhere."""
    done = in_process(tiny_config(adapter__mode="lora"))
    kinds = {name.rsplit(".", 1)[1] for name in done.summary["wire"]["tensors"]}
    assert kinds == {"lora_A", "lora_B"}
    first = done.run.load_checkpoint("round-00000").b
    assert all(value.any() == key.endswith("lora_A") for key, value in first.items())
    losses = done.summary["validation_loss"]
    assert losses[-1] < losses[0]
    b_only = in_process(tiny_config())
    assert losses[0] == pytest.approx(b_only.summary["validation_loss"][0], rel=1e-6)
    sent = [line for line in done.run.wire() if line.tensors]
    assert {line.bytes for line in sent} == {
        sum(128 + value.nbytes for value in first.values())  # numpy's header is 128 bytes
    }
