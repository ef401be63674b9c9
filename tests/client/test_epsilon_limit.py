"""A hospital's own limit holds over runs, whatever the server asks for."""

import contextlib
import json
import multiprocessing
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

import client.epsilon_limit
import client.handlers
from client.epsilon_limit import LARGEST_DELTA, PROMISES, LimitReached, keep_to_limit
from client.node import local_config
from client.policy import POLICY, Policy
from common.configio import config_digest, flatten, from_flat, run_digest
from common.errors import RunFailed
from common.privacy.accounting import epsilon
from common.privacy.budget.guard import LEDGER
from common.privacy.settings import plan_of, with_calibrated_noise
from common.training.worker import Worker
from common.wire.contract import ContractError, train_message

KEYS = {
    "model.backbone": "tiny",
    "federation.rounds": 2,
    "federation.local-steps": 5,
    "privacy.target-epsilon": 3.0,
    "privacy.sampling-rate": 0.2,
}


def policy(**keys):
    return Policy.model_validate({key.replace("_", "-"): value for key, value in keys.items()})


def config_of(*, calibrated=True, **changes):
    changed = {key.replace("__", ".").replace("_", "-"): v for key, v in changes.items()}
    config = from_flat({**KEYS, **changed})
    return with_calibrated_noise(config) if calibrated else config


def stated(**changes):
    """A configuration whose noise is given: to search it takes seconds."""
    noise = {"privacy__target_epsilon": 0.0, "privacy__noise_multiplier": 2.0}
    return config_of(calibrated=False, **{**noise, **changes})


def cost_of(config):
    return epsilon(plan_of(config)).value


def joins(config, folder, limit=7.0, max_delta=1e-3, patients=lambda: 100, **keys):
    keys |= {"max_delta": max_delta} if max_delta else {}
    keep(config, policy(max_epsilon=limit, **keys), folder, patients)


def keep(config, own, folder, patients=lambda: 1 / 0):
    ledger = folder / "runs" / run_digest(config) / LEDGER
    keep_to_limit(config, own, folder, ledger=ledger, patients=patients)


def promised(folder):
    return [json.loads(line) for line in (folder / PROMISES).read_text().splitlines()]


def test_runs_add_up_and_the_first_beyond_the_limit_is_refused(tmp_path):
    limit = round(2.5 * cost_of(stated()), 1)
    for _ in range(3):  # every message of a run asks, and a run counts once
        joins(stated(), tmp_path, limit)
    joins(stated(train__seed=1), tmp_path, limit)
    for _ in range(2):
        with pytest.raises(LimitReached, match=f"limit is epsilon {limit:g} over all runs"):
            joins(stated(train__seed=2), tmp_path, limit)
    assert len(promised(tmp_path)) == 2  # what was refused counts for nothing
    joins(stated(privacy__noise_multiplier=8.0), tmp_path, limit)
    assert sum(one["epsilon"] for one in promised(tmp_path)) <= limit


def test_deltas_add_up_too(tmp_path):
    """A delta of 0.1 pays for whole patients: epsilon alone would call forty such runs free."""
    trick = config_of(
        calibrated=False,
        federation__rounds=1,
        federation__local_steps=1,
        privacy__target_epsilon=0.0,
        privacy__noise_multiplier=0.5,
        privacy__delta=0.1,
        data__path="/tables",  # how many patients they hold is not public
        privacy__sampling_rate=0.0999,
    )
    assert epsilon(plan_of(trick)).value < 0.01
    with pytest.raises(LimitReached, match=r"privacy.delta = 0.1; .* 1e-10 to 1e-05"):
        joins(trick, tmp_path, max_delta=None)
    with pytest.raises(LimitReached, match="privacy.delta = 0.1"):
        joins(trick, tmp_path)
    small = {"privacy__delta": 4e-6, "privacy__noise_multiplier": 3.0}
    for seed in (1, 2):
        joins(stated(train__seed=seed, **small), tmp_path, max_delta=None)
    with pytest.raises(LimitReached, match="limit is delta 1e-05 over all runs: 8e-06 is promised"):
        joins(stated(train__seed=3, **small), tmp_path, max_delta=None)


def test_the_delta_of_a_large_hospital_is_below_a_tenth_of_a_patient(tmp_path):
    with pytest.raises(LimitReached, match="1e-10 to 1e-07"):
        joins(stated(privacy__delta=1e-6), tmp_path, max_delta=None, patients=lambda: 364_627)
    for patients in (1, 99, 10_000, 10_001, 364_627):
        bound = client.epsilon_limit.default_delta(patients)
        assert bound <= min(LARGEST_DELTA, 1 / (10 * patients)) * (1 + 1e-9)
        assert np.log10(bound) == round(np.log10(bound))  # no more than the size's power of ten


def test_a_lower_limit_holds_for_a_run_under_way_and_forgets_nothing(tmp_path):
    joins(stated(), tmp_path)
    before = (tmp_path / PROMISES).read_bytes()
    with pytest.raises(LimitReached, match=r"limit is epsilon 0\.5 "):
        joins(stated(), tmp_path, limit=0.5)
    assert (tmp_path / PROMISES).read_bytes() == before


def test_promises_are_kept_by_the_whole_digest(tmp_path, monkeypatch):
    """With a short hash that is the same for everybody, nothing is overwritten."""
    monkeypatch.setattr("common.configio.config_hash", lambda config: "0" * 8)
    large, small = stated(), stated(privacy__noise_multiplier=8.0)
    node = {"hospital": "north", "data": "/x", "folder": str(tmp_path)}
    folders = [Path(local_config(one, node, 1).run.directory) for one in (large, small)]
    assert [folder.name for folder in folders] == [run_digest(large), run_digest(small)]
    joins(large, tmp_path)
    joins(small, tmp_path)
    joins(large, tmp_path)
    assert [one["run"] for one in promised(tmp_path)] == [run_digest(large), run_digest(small)]
    assert len(config_digest(large)) == len(run_digest(large)) == 64
    costs = [one["epsilon"] for one in promised(tmp_path)]
    assert costs == pytest.approx([cost_of(large), cost_of(small)], rel=1e-3)


def test_a_promise_under_another_plan_is_neither_lowered_nor_joined(tmp_path):
    joins(stated(), tmp_path)
    line = promised(tmp_path)[0]
    (tmp_path / PROMISES).write_text(json.dumps({**line, "plan": "other", "epsilon": 6.5}) + "\n")
    with pytest.raises(LimitReached, match="under another privacy plan"):
        joins(stated(), tmp_path)
    assert promised(tmp_path)[0]["epsilon"] == 6.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"privacy__noise_multiplier": 0.0}, "only in runs that protect every patient"),
        ({"privacy__unit": "admission"}, "only in runs that protect every patient"),
        ({"privacy__unit": "hospital"}, "only in runs that protect every patient"),
        ({"privacy__deterministic_noise": True}, "only in runs that protect every patient"),
        ({"privacy__expected_batch": 1.0}, "expected-batch = 1; .* 2 and more"),
        ({"privacy__delta": 1e-30}, "privacy.delta"),
    ],
)
def test_only_runs_that_protect_patients_are_joined(tmp_path, changes, message):
    with pytest.raises(LimitReached, match=message):
        joins(stated(**changes), tmp_path, limit=100.0)
    assert not (tmp_path / PROMISES).exists()


@pytest.mark.parametrize("sigma", [0.0, 1e-9, 0.49])
def test_noise_below_the_floor_is_no_protection(tmp_path, sigma, no_accounting):
    """Without a stated multiplier the hospital would have to calibrate: that costs, and is asked
    of the server."""
    config = config_of(calibrated=False, privacy__noise_multiplier=sigma)
    with pytest.raises(LimitReached, match="noise-multiplier = .* allows 0.5 and more"):
        joins(config, tmp_path, limit=1e6)


@pytest.mark.parametrize("limited", [True, False])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"federation__rounds": 10**9}, "federation.rounds = 1e.09; .* at most 1000"),
        ({"federation__local_steps": 10**9}, "optimizer steps"),
        ({"train__steps": 10**9}, "optimizer steps"),
        ({"train__epochs": 1e9}, "optimizer steps"),
        ({"train__learning_rate": 999.0}, "train.learning-rate = 999"),
        ({"adapter__alpha": 1e6}, "alpha / adapter.rank"),
    ],
)
def test_absurd_runs_are_refused_before_anything_is_computed(
    tmp_path, changes, message, limited, no_accounting
):
    own = policy(max_epsilon=7.0) if limited else Policy()
    with pytest.raises(LimitReached, match=message):
        keep(config_of(calibrated=False, **changes), own, tmp_path)


@pytest.fixture
def no_accounting(monkeypatch):
    """Nothing dear may be asked."""

    def asked(*args):
        raise AssertionError("accounting was asked")

    for name in ("epsilon", "rdp_epsilon", "plan_of"):
        monkeypatch.setattr(client.epsilon_limit, name, asked)


def test_a_dear_plan_is_refused_by_a_cheap_bound(tmp_path, monkeypatch):
    """The exact accountants took minutes for such a plan; Renyi's bound takes milliseconds."""
    monkeypatch.setattr(client.epsilon_limit, "epsilon", lambda plan: 1 / 0)
    config = config_of(
        calibrated=False,
        privacy__target_epsilon=0.0,
        privacy__noise_multiplier=0.5,
        privacy__sampling_rate=0.9,
        federation__rounds=500,
        federation__local_steps=20,
    )
    with pytest.raises(LimitReached, match="by Renyi's bound"):
        joins(config, tmp_path)


def test_a_damaged_promise_costs_the_unknown(tmp_path):
    for text in ("{}\n", "x\n", '{"run": "a", "plan": "b", "epsilon": "x", "delta": 0}\n'):
        (tmp_path / PROMISES).write_text(text)
        with pytest.raises(LimitReached, match="damaged"):
            joins(stated(), tmp_path, limit=100.0)
        assert (tmp_path / PROMISES).read_text() == text


def test_a_torn_last_line_never_paid_for_anything(tmp_path):
    joins(stated(), tmp_path)
    first = (tmp_path / PROMISES).read_text()
    (tmp_path / PROMISES).write_text(first + first[:40])
    joins(stated(train__seed=1), tmp_path)
    assert promised(tmp_path)[0]["run"] == run_digest(stated())
    assert len(promised(tmp_path)) == 2


def _join(folder, seed, limit, answers, meeting) -> None:
    checked = client.epsilon_limit._check_sum

    def meet(*args):
        """Wait for the other run where both have checked and neither has written."""
        checked(*args)
        with contextlib.suppress(threading.BrokenBarrierError):
            meeting.wait(2)  # with the lock the other one cannot come

    client.epsilon_limit._check_sum = meet
    try:
        joins(stated(train__seed=seed), folder, limit)
        answers.put("joined")
    except LimitReached:
        answers.put("refused")


@pytest.mark.process
def test_of_runs_that_begin_together_one_is_joined(tmp_path):
    context = multiprocessing.get_context("fork")
    answers, meeting = context.Queue(), context.Barrier(2)
    limit = 1.5 * cost_of(stated())  # and the accountants are warm before the race
    started = [
        context.Process(target=_join, args=(tmp_path, n, limit, answers, meeting)) for n in (1, 2)
    ]
    for one in started:
        one.start()
    assert sorted(answers.get(timeout=120) for _ in started) == ["joined", "refused"]
    for one in started:
        one.join()


def test_without_a_limit_any_run_is_joined(tmp_path):
    keep(config_of(privacy__target_epsilon=0.0), Policy(), tmp_path)
    assert not any(tmp_path.iterdir())


def test_only_agreed_configurations_are_joined(tmp_path):
    agreed, other = stated(), stated(train__seed=5)
    own = policy(max_epsilon=50.0, max_delta=0.01, allowed_configurations=[config_digest(agreed)])
    keep(agreed, own, tmp_path)
    with pytest.raises(LimitReached, match=f"configuration {config_digest(other)} is none that"):
        keep(other, own, tmp_path)


@pytest.mark.parametrize("gone", [shutil.rmtree, lambda place: (place / LEDGER).write_text("")])
def test_a_run_whose_ledger_is_gone_is_not_joined_again(tmp_path, gone):
    """Whoever clears the folder of a run away takes what it has spent with it."""
    for _ in range(2):
        joins(stated(), tmp_path)
    gone(tmp_path / "runs" / run_digest(stated()))
    for _ in range(2):
        with pytest.raises(LimitReached, match="ledger is gone"):
            joins(stated(), tmp_path)
    assert len(promised(tmp_path)) == 1
    joins(stated(train__seed=1), tmp_path)


# What the handlers make of it


def ask(config, folder, kind="query", server_round=0, content=None, **node):
    node = {"hospital": "north", "data": "synthetic", "folder": str(folder), **node}
    content = content or RecordDict({"config": ConfigRecord({"round": server_round})})
    context = Context(1, 1, node, RecordDict(), flatten(config))
    return client.handlers.answer(kind, Message(content, 1, kind), context, Worker())


@pytest.mark.parametrize("text", [None, "max-epsilom = 1\n", "max-epsilon = 0\n"])
def test_a_policy_that_cannot_be_read_lets_nobody_in(tmp_path, text):
    if text is not None:
        (tmp_path / POLICY).write_text(text)
    with pytest.raises(LimitReached, match="missing or broken"):
        ask(stated(), tmp_path)


def test_a_run_whose_folder_was_removed_spends_nothing_more(tmp_path):
    (tmp_path / POLICY).write_text("max-epsilon = 7\n")
    config = stated(privacy__delta=1e-6)
    ask(config, tmp_path)
    ask(config, tmp_path)
    assert (tmp_path / "runs" / run_digest(config) / "hospitals" / "north" / LEDGER).is_file()
    shutil.rmtree(tmp_path / "runs")
    with pytest.raises(LimitReached, match="ledger is gone"):
        ask(config, tmp_path)


@pytest.mark.parametrize("key", ["max-epsilon", "max-epsilom", "polciy"])
def test_a_mistyped_key_of_the_node_is_refused(tmp_path, key):
    (tmp_path / POLICY).write_text("")
    with pytest.raises(RunFailed, match=f"unknown key '{key}'"):
        ask(stated(), tmp_path, **{key: 1.0})


@pytest.mark.parametrize(("kind", "number"), [("train", 3), ("train", 0), ("evaluate", 10**6)])
def test_a_round_that_the_run_does_not_have_costs_nothing(tmp_path, monkeypatch, kind, number):
    (tmp_path / POLICY).write_text("")
    monkeypatch.setattr(client.handlers, "hospital_of", lambda *args: 1 / 0)
    config = config_of(privacy__target_epsilon=0.0, train__keep_state=False)
    with pytest.raises(ContractError, match="the round is none of this run's"):
        ask(config, tmp_path, kind, number)


def test_a_b_that_would_overflow_is_refused(tmp_path, tiny_shapes):
    (tmp_path / POLICY).write_text("")
    config = config_of(privacy__target_epsilon=0.0)
    b = {key: np.full(shape, 1e6, np.float32) for key, shape in tiny_shapes(config).items()}
    content = train_message(b, server_round=1)
    with pytest.raises(ContractError, match="beyond 10000"):
        ask(config, tmp_path, "train", content=content)


def test_epochs_do_not_pass_the_most_steps(tmp_path, tiny_shapes, monkeypatch):
    """How many steps an epoch has the hospital alone knows: it counts before it trains."""
    (tmp_path / POLICY).write_text("max-steps = 60\n")
    monkeypatch.setattr(client.handlers, "update", lambda *args, **keys: 1 / 0)
    config = config_of(privacy__target_epsilon=0.0, train__epochs=50.0, data__synthetic_patients=20)
    b = {key: np.zeros(shape, np.float32) for key, shape in tiny_shapes(config).items()}
    with pytest.raises(LimitReached, match=r"train.epochs = 50 .* allows \(60\)$"):
        ask(config, tmp_path, "train", content=train_message(b, server_round=1))


@pytest.fixture
def tiny_shapes():
    from common.model.adapter.layout import adapter_spec, meta_adapter
    from common.model.backbone.load import resolve_backbone

    return lambda config: (
        meta_adapter(resolve_backbone("tiny"), adapter_spec(config.adapter)).shapes
    )
