"""A whole private federation in one process (specification tests 8, 10, 11 and 14)."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federation_fixtures import FakeGrid
from flwr.app import Message
from privacy_fixtures import PRIVATE_TINY

import client.app
import client.private_update
import common.wire.contract
from client.local_update import LocalRound
from client.private_update import private_update
from common.config import Config, PrivacyConfig
from common.configio import from_flat
from common.errors import RunFailed, UserError
from common.privacy.budget.guard import LEDGER, RECEIPT, Guard
from common.privacy.budget.ledger import BudgetExhausted
from common.privacy.mechanism.gradients import PrivateGradient
from common.privacy.settings import plan_of
from common.rundir import RunDirectory
from common.training.gradients import StepLoss
from common.training.hospital_data import HospitalData
from common.training.optimiser import TrainState
from common.training.worker import Worker
from server.app import federate

ROUNDS, STEPS = 2, 2
SETTINGS: dict[str, Any] = {
    **PRIVATE_TINY,
    "data.path": "synthetic",
    "data.synthetic-patients": 24,
    "adapter.rank": 4,
    "train.max-length": 512,
    "federation.hospitals": 2,
    "federation.rounds": ROUNDS,
    "federation.local-steps": STEPS,
}
PUBLIC_SCALARS = {
    *("round", "weight", "steps", "hospital", "of", "a-sha256", "backbone-sha256"),
    *("source-sha256", "privacy-plan-sha256", "device", "dtype", "dtype-reason"),
    *("attention", "attention-reason"),
}


def run_federation(
    folder: Path, **changes: Any
) -> tuple[list[tuple[str, Message]], RunDirectory, dict[str, np.ndarray]]:
    config = from_flat({**SETTINGS, "run.directory": str(folder), **changes})
    run = RunDirectory.create(config, directory=folder)
    grid = FakeGrid(config)
    federate(grid, config, run)
    seen = [(way, message) for way in ("down", "up") for _, message in grid.wire(way)]
    return seen, run, run.load_checkpoint().b


def scalars(message: Message) -> dict[str, Any]:
    content = message.content
    records = [*content.metric_records.values(), *content.config_records.values()]
    return {key: value for record in records for key, value in record.items()}


def leaks(seen: list[tuple[str, Message]], shapes: dict[str, tuple[int, ...]]) -> set[str]:
    """What decoded messages hold besides B and public constants."""
    found = set()
    for direction, message in seen:
        for record in message.content.array_records.values():
            for key, array in record.items():
                if shapes.get(key) != tuple(array.shape) or not key.endswith("lora_B"):
                    found.add(key)
        for key, value in scalars(message).items():
            number = scalars(message).get("round", 0)
            constants = {"weight": 1.0, "steps": number * STEPS}
            if key not in PUBLIC_SCALARS or value != constants.get(key, value):
                found.add(key)
        if direction == "up" and message.metadata.message_type == "evaluate":
            found.add("evaluate")
    return found


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    return run_federation(tmp_path_factory.mktemp("runs") / "honest")


def test_only_b_and_public_constants_are_on_the_wire(honest) -> None:
    seen, _, b = honest
    kinds = [(direction, m.metadata.message_type) for direction, m in seen]
    assert kinds.count(("up", "train")) == 2 * ROUNDS
    assert kinds.count(("up", "query")) == 2
    assert leaks(seen, {key: value.shape for key, value in b.items()}) == set()


@pytest.mark.slow
def test_the_wire_check_finds_counts_and_losses(tmp_path, honest, monkeypatch) -> None:
    shapes = {key: value.shape for key, value in honest[2].items()}
    with monkeypatch.context() as patch:
        for side in (client.private_update, common.wire.contract):
            patch.setattr(side, "PUBLIC_WEIGHT", 37.0)  # the number of samples
        assert leaks(run_federation(tmp_path / "weight")[0], shapes) == {"weight"}
    plain = run_federation(tmp_path / "plain", **{"privacy.noise-multiplier": 0.0})[0]
    assert {"train-loss", "samples", "patients", "loss", "evaluate"} <= leaks(plain, shapes)
    with monkeypatch.context() as patch:
        chatty = frozenset({"round", "weight", "steps", "train-loss"})
        honest_result = client.private_update._result
        patch.setattr(common.wire.contract, "PRIVATE_TRAIN_REPLY", chatty)
        patch.setattr(
            client.private_update,
            "_result",
            lambda b, steps: dataclasses.replace(
                honest_result(b, steps),
                metrics={**honest_result(b, steps).metrics, "train-loss": 2.5},
            ),
        )
        assert leaks(run_federation(tmp_path / "chatty")[0], shapes) == {"train-loss"}


def test_a_reply_with_more_is_refused_on_both_sides(honest) -> None:
    b = honest[2]
    reply = {"round": 1.0, "weight": 1.0, "steps": 2.0}
    content = common.wire.contract.train_reply(b, reply, private=True)
    shapes = {key: value.shape for key, value in b.items()}
    update = common.wire.contract.read_train_reply(
        content, shapes, hospital="h", server_round=1, charged=(2, 2)
    )
    assert update.weight == 1.0
    for extra in ("train-loss", "num-examples", "seconds"):
        with pytest.raises(common.wire.contract.ContractError, match=extra):
            common.wire.contract.train_reply(b, {**reply, extra: 1.0}, private=True)
        content["metrics"][extra] = 1.0
        with pytest.raises(common.wire.contract.ContractError, match=extra):
            common.wire.contract.read_train_reply(
                content, shapes, hospital="h", server_round=1, charged=(2, 2)
            )
        del content["metrics"][extra]


def test_scalars_on_the_wire_are_the_same_without_one_patient(
    tmp_path, honest, monkeypatch
) -> None:
    whole = Worker.data
    gone: list[int] = []

    def without_one(*args: Any) -> Any:
        data = whole(*args)
        first, *rest = data.hospitals
        patient = first.train[0].patient
        gone.append(patient)
        kept = tuple(one for one in first.train if one.patient != patient)
        return dataclasses.replace(data, hospitals=(dataclasses.replace(first, train=kept), *rest))

    monkeypatch.setattr(Worker, "data", without_one)
    client.app.worker.cache_clear()
    seen = run_federation(tmp_path / "neighbour")[0]
    assert gone
    for (_, one), (_, other) in zip(honest[0], seen, strict=True):
        assert scalars(one) == scalars(other)
    plain = {"privacy.noise-multiplier": 0.0}
    counts = [scalars(m).get("samples") for _, m in run_federation(tmp_path / "mutant", **plain)[0]]
    monkeypatch.setattr(Worker, "data", whole)
    client.app.worker.cache_clear()
    others = [scalars(m).get("samples") for _, m in run_federation(tmp_path / "again", **plain)[0]]
    assert counts != others


def test_account_of_the_run(honest) -> None:
    _, run, _ = honest
    lines, summary = run.lines("privacy.jsonl"), run.read_json("summary.json")
    names = ["hospital-1", "hospital-2"]
    assert [(line["round"], line["hospital"], line["steps"]) for line in lines] == [
        (number, name, number * STEPS) for number in (1, 2) for name in names
    ]
    claim = summary["privacy"]
    assert (claim["unit"], claim["relation"]) == ("patient", "add-or-remove-one")
    assert claim["epsilon"] == max(line["epsilon"] for line in lines) > lines[0]["epsilon"]
    assert [entry["hospital"] for entry in claim["per_hospital"]] == names
    assert summary["validation_loss"] == []
    assert [h["samples"] for h in summary["hospitals"]] == [None, None]
    for name in names:
        paper = run.read_json(f"hospitals/{name}/{RECEIPT}")
        assert (paper["epsilon"], paper["steps"], paper["private"]) == (claim["epsilon"], 4, True)
        steps = run.lines(f"hospitals/{name}/steps.jsonl")
        assert [step["loss"] for step in steps] == [None] * 4


def moved(b: dict[str, np.ndarray], session: Any) -> bool:
    """Whether B moved, and saved and loaded again gives logits unlike the bare backbone's."""
    if max(np.abs(value).max() for value in b.values()) == 0:
        return False
    ids = torch.arange(2, 40)[None]
    adapter = session.adapter
    with torch.no_grad():
        adapter.flat.zero_()
        bare = session.model(input_ids=ids).logits
        adapter.load(b)
        first = session.model(input_ids=ids).logits
    return not torch.allclose(bare, first, atol=1e-4)


def test_the_adapter_moved_and_survives_saving(honest, open_tiny, monkeypatch, tmp_path) -> None:
    _, run, b = honest
    session, other = open_tiny(), open_tiny()
    assert moved(b, session)
    ids = torch.arange(2, 40)[None]
    other.adapter.load(run.load_checkpoint("round-00002").b)
    with torch.no_grad():
        torch.testing.assert_close(
            session.model(input_ids=ids).logits, other.model(input_ids=ids).logits, rtol=0, atol=0
        )

    # the mutant: the release goes into a copy, so epsilon is spent and B never moves
    def into_a_copy(self: Any, session: Any, step: int) -> StepLoss:
        released = self.mechanism_for(session).release(torch.zeros_like(session.adapter.flat))
        session.adapter.flat_grad.zero_().clone().copy_(released)
        return StepLoss(None, 0, 0)

    monkeypatch.setattr(PrivateGradient, "__call__", into_a_copy)
    stuck = run_federation(tmp_path / "stuck")
    assert stuck[1].read_json("summary.json")["privacy"]["epsilon"] > 0
    assert not moved(stuck[2], session)


def test_hospital_level_runs_whole_and_tells_only_b(tmp_path, honest) -> None:
    keys = {"privacy.unit": "hospital", "federation.weighting": "uniform"}
    seen, run, b = run_federation(tmp_path / "hospital", **keys)
    found = {key for _, message in seen for key in scalars(message)} - PUBLIC_SCALARS
    assert found == set()
    claim = run.read_json("summary.json")["privacy"]
    assert (claim["unit"], claim["planned_steps"], claim["expected_batch"]) == ("hospital", 2, 2)
    assert "nothing will be learnt" in claim["warning"]
    assert [line["steps"] for line in run.lines("privacy.jsonl")] == [1, 1, 2, 2]
    assert max(np.abs(value).max() for value in b.values()) > 0.1  # noise, clip norm 1 over 2


@pytest.fixture
def hospital(samples_of):
    samples = tuple(samples_of((17, 5, 33, 8), (1, 2, 1, 3)))
    return HospitalData(name="hospital-1", train=samples, validation=())


def one_round(session, hospital, folder, *, b=None, server_round=1, **privacy: Any):
    config = from_flat({**SETTINGS, **{f"privacy.{k}": v for k, v in privacy.items()}})
    start = b or {key: np.zeros_like(v) for key, v in session.adapter.state().items()}
    task = LocalRound(session, hospital, start, TrainState(), config, server_round)
    return private_update(task, folder)


def test_the_same_round_asked_again_gets_the_same_answer_for_free(
    open_tiny, hospital, tmp_path
) -> None:
    session = open_tiny()
    first = one_round(session, hospital, tmp_path)
    again = one_round(session, hospital, tmp_path)
    assert first.metrics == again.metrics == {"weight": 1.0, "steps": float(STEPS)}
    for key in first.b:
        np.testing.assert_array_equal(first.b[key], again.b[key])
    other = one_round(session, hospital, tmp_path, b=first.b)  # another B: another release
    assert other.metrics["steps"] == 2 * STEPS


def test_over_budget_nothing_is_trained_or_sent(open_tiny, hospital, tmp_path, monkeypatch) -> None:
    session = open_tiny()
    b = one_round(session, hospital, tmp_path).b
    b = one_round(session, hospital, tmp_path, b=b, server_round=2).b
    called: list[int] = []
    monkeypatch.setattr(client.private_update, "update", lambda *a, **k: called.append(1))
    with pytest.raises(BudgetExhausted, match="nothing is released"):
        one_round(session, hospital, tmp_path, b=b, server_round=3)
    assert called == []


def test_charged_before_trained_and_released_before_sent(
    open_tiny, hospital, tmp_path, monkeypatch
) -> None:
    """Order of events, observed; a crash after training leaves the charge."""
    events: list[str] = []
    for name in ("charge", "release"):
        original = getattr(Guard, name)

        def watched(self, *args, _name=name, _original=original, **keywords):
            events.append(_name)
            return _original(self, *args, **keywords)

        monkeypatch.setattr(Guard, name, watched)
    honest_update = client.private_update.update

    def crash(*args: Any, **kwargs: Any) -> Any:
        events.append("train")
        honest_update(*args, **kwargs)
        raise RunFailed("killed here")

    monkeypatch.setattr(client.private_update, "update", crash)
    with pytest.raises(RunFailed, match="killed here"):
        one_round(open_tiny(), hospital, tmp_path)
    assert events == ["charge", "train"]
    assert (tmp_path / LEDGER).read_text().count('"charge"') == 1
    monkeypatch.setattr(client.private_update, "update", honest_update)
    assert one_round(open_tiny(), hospital, tmp_path).metrics["steps"] == STEPS
    assert events == ["charge", "train", "charge", "release"]


def test_deterministic_noise_repeats_and_says_epsilon_is_infinite(
    open_tiny, hospital, tmp_path
) -> None:
    fixed: dict[str, Any] = {"deterministic-noise": True}
    results = [
        one_round(open_tiny(), hospital, tmp_path / name, **(fixed if name != "c" else {}))
        for name in "abc"
    ]
    for key in results[0].b:
        np.testing.assert_array_equal(results[0].b[key], results[1].b[key])
        assert not np.array_equal(results[0].b[key], results[2].b[key])
    text = (tmp_path / "a" / RECEIPT).read_text()
    assert '"epsilon": "infinity"' in text
    assert '"private": false' in text


@pytest.mark.slow
def test_settings_refuse_what_voids_the_claim() -> None:
    with pytest.raises(UserError, match="depend on the number of samples"):
        plan_of(from_flat({**SETTINGS, "train.epochs": 1.0}))
    with pytest.raises(UserError, match="gives epsilon"):
        plan_of(from_flat({**SETTINGS, "privacy.target-epsilon": 0.5}))
    plan = plan_of(Config(privacy=PrivacyConfig(target_epsilon=3.0)))
    assert plan.steps == 40
    assert math.isfinite(plan.sigma)
