"""Private replies that break the contract, are lost, or forget what was spent."""

import json
import re
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, MetricRecord, RecordDict
from tampering import Killed, killed_in, on, round_of, silent

import client.handlers
import server.rounds
from common.errors import RunFailed, UserError
from common.privacy.budget.guard import LEDGER, RECEIPT
from common.privacy.budget.ledger import BudgetExhausted, LedgerDoubtful
from common.privacy.budget.receipts import ledger_line
from common.privacy.settings import plan_of
from common.rundir import RunDirectory
from common.training.worker import Worker
from common.wire.contract import ContractError, Update, read_train_reply, train_reply
from server.privacy_account import PrivacyAccount

PRIVATE: dict[str, Any] = {
    "federation__local_steps": 2,
    "federation__mismatch": "refuse",
    "privacy__noise_multiplier": 1.5,
    "privacy__sampling_rate": 0.25,
    "privacy__delta": 1e-4,
}
LYING, NAME = 1, "hospital-2"


def on_round(server_round: int | None, **scalars: float):
    """Replace scalars in the replies to a round's train messages; None is every round."""

    def tamper(message: Message, reply: Message) -> Message:
        if server_round not in (None, round_of(message)):
            return reply
        metrics = MetricRecord({**reply.content["metrics"], **scalars})
        content = RecordDict({"arrays": reply.content["arrays"], "metrics": metrics})
        return Message(content, reply_to=message)

    return on("train", tamper)


def spent(run: RunDirectory) -> dict[str, int]:
    """What the run's summary says that each hospital has spent, in steps."""
    claim = run.read_json("summary.json")["privacy"]
    return {entry["hospital"]: entry["steps"] for entry in claim["per_hospital"]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scalars", "reason"),
    [
        ({"steps": 0.0}, "steps charged"),
        ({"steps": -1.0}, "steps charged"),
        ({"steps": 1.0}, "steps charged"),  # fewer than the round's own
        ({"steps": 2.5}, "steps charged"),
        ({"steps": 5.0}, "steps charged"),  # more than the plan's four
        ({"steps": 1e15}, "steps charged"),
        ({"weight": 1e9}, "weight is not 1"),
        ({"weight": 0.5}, "weight is not 1"),
    ],
)
def test_a_lying_private_reply_is_refused_by_name(tiny_config, in_process, scalars, reason) -> None:
    done = in_process(tiny_config(**PRIVATE), tamper={LYING: on_round(None, **scalars)})
    assert [(number, name) for number, name, _ in done.refused()] == [(1, NAME), (2, NAME)]
    assert all(reason in text for _, _, text in done.refused())
    assert done.run.status().state == "finished"
    assert spent(done.run) == {"hospital-1": 4, NAME: 4, "hospital-3": 4}


def test_the_weight_and_steps_that_a_private_reply_may_have() -> None:
    b = {"m.lora_B": np.zeros((2, 2), np.float32)}

    def read(**scalars: float) -> Update:
        metrics = {"round": 1.0, "weight": 1.0, "steps": 3.0, **scalars}
        content = train_reply(b, metrics, private=True)
        return read_train_reply(
            content, {"m.lora_B": (2, 2)}, hospital="h", server_round=1, charged=(3, 6)
        )

    assert [read(steps=steps).metrics["steps"] for steps in (3.0, 6.0)] == [3.0, 6.0]
    for bad in ({"steps": 2.0}, {"steps": 7.0}, {"steps": 3.5}, {"weight": 1 + 1e-6}):
        with pytest.raises(ContractError):
            read(**bad)


@pytest.mark.slow
def test_a_private_federation_aggregates_uniformly(tiny_config, in_process, monkeypatch) -> None:
    """Whatever federation.weighting says, and even if weights got past the check."""
    aggregator_of = server.rounds.aggregator_for
    means = []

    def watched(*chosen_by: Any) -> Any:
        aggregator = aggregator_of(*chosen_by)
        b = {key: np.zeros((4, 2), np.float32) for key in "pq"}
        one = {key: value + 1 for key, value in b.items()}
        updates = [
            Update(hospital="a", b=b, weight=1.0, metrics={}),
            Update(hospital="b", b=one, weight=3.0, metrics={}),
        ]
        mean = type(aggregator)(aggregator.config).aggregate(b, updates, server_round=1)
        means.append(float(next(iter(mean.values()))[0, 0]))
        return aggregator

    monkeypatch.setattr(server.rounds, "aggregator_for", watched)
    short = {**PRIVATE, "federation__rounds": 1, "federation__weighting": "samples"}
    in_process(tiny_config(**short))
    in_process(tiny_config(**{**short, "privacy__noise_multiplier": 0.0}))
    assert means == [0.5, 0.75]  # the second: without privacy the weights count


@pytest.mark.slow
@pytest.mark.parametrize("lost_round", [1, 2])
def test_a_lost_reply_is_accounted_at_its_worst(tiny_config, in_process, lost_round) -> None:
    config = tiny_config(**PRIVATE)
    done = in_process(config, tamper={LYING: on_round(lost_round, weight=0.0)})
    lines = [line for line in done.run.lines("privacy.jsonl") if line["hospital"] == NAME]
    assert [(line["round"], line["steps"]) for line in lines] == [(1, 2), (2, 4)]
    assert [line["round"] for line in lines if "least_steps" in line] == [lost_round]
    receipt = done.run.read_json(f"hospitals/{NAME}/{RECEIPT}")
    claim = done.summary["privacy"]
    told = {entry["hospital"]: entry["epsilon"] for entry in claim["per_hospital"]}
    assert told[NAME] == receipt["epsilon"] == claim["epsilon"]


@pytest.mark.slow
def test_a_hospital_that_was_asked_once_and_left_is_accounted(tiny_config, in_process) -> None:
    config = tiny_config(**PRIVATE, federation__timeout_seconds=0.3)
    tamper = {2: silent("train")}
    done = in_process(config, tamper=tamper, online=lambda index, seen: index < 2 or seen < 1)
    assert spent(done.run) == {"hospital-1": 4, NAME: 4, "hospital-3": 2}


def interrupted(config, in_process, tmp_path, *, server_round: int) -> RunDirectory:
    """Run until the last message of a round has been sent, and the server dies."""
    before = set(tmp_path.iterdir())
    with pytest.raises(Killed):
        in_process(config, on_message=killed_in(server_round, 2))
    (folder,) = set(tmp_path.iterdir()) - before
    return RunDirectory(folder)


def test_who_was_asked_by_a_server_that_died_is_accounted(
    tiny_config, in_process, tmp_path
) -> None:
    config = tiny_config(**PRIVATE, federation__min_hospitals=2)
    run = interrupted(config, in_process, tmp_path, server_round=2)
    assert max(line["round"] for line in run.lines("privacy.jsonl")) == 1
    done = in_process(config, resume=run, online=lambda index, seen: index != LYING)
    assert spent(done.run) == {"hospital-1": 4, NAME: 4, "hospital-3": 4}
    receipt = done.run.read_json(f"hospitals/{NAME}/{RECEIPT}")
    assert receipt["steps"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("kept_lines", [0, 3])
def test_a_ledger_that_forgot_is_refused_by_a_resumed_server(
    tiny_config, in_process, tmp_path, kept_lines
) -> None:
    """Deleted, or restored from a backup, with everything else that the hospital had."""
    config = tiny_config(**PRIVATE, federation__rounds=4)
    run = interrupted(config, in_process, tmp_path, server_round=3)
    ledger = run.path / "hospitals" / NAME / LEDGER
    kept = "".join(ledger.read_text().splitlines(keepends=True)[:kept_lines])
    for file in ledger.parent.iterdir():
        file.unlink()
    if kept:
        ledger.write_text(kept)
    done = in_process(config, resume=run)
    assert [(number, name) for number, name, _ in done.refused()] == [(3, NAME), (4, NAME)]
    assert all("its ledger has lost entries" in text for _, _, text in done.refused())
    assert spent(done.run) == {"hospital-1": 8, NAME: 8, "hospital-3": 8}


@pytest.mark.slow
def test_bounds_come_from_what_was_told_and_never_from_what_was_assumed(
    tiny_config, tmp_path
) -> None:
    plan = plan_of(tiny_config(**PRIVATE, federation__rounds=8))
    run = RunDirectory(tmp_path)
    account = PrivacyAccount(run, plan)
    assert account.bounds("h", 1, 2) == (2, 16)
    account.record_missing("h", 1, 2)
    assert account.bounds("h", 2, 2) == (2, 16)  # the message may never have reached it
    account.record_reply("h", 2, 4)
    account.record_missing("h", 3, 2)  # nothing came back
    for known in (account, PrivacyAccount(run, plan)):  # and after a restart
        assert known.bounds("h", 4, 2) == (6, 16)
        assert known.bounds("h", 2, 2) == (4, 16)  # asked again: the same answer, for free
    account.record_missing("h", 4, 2, answered=True)  # what came back was refused
    assert PrivacyAccount(run, plan).bounds("h", 5, 2) == (8, 16)
    for number in range(5, 12):
        account.record_missing("h", number, 2)
    last = json.loads((tmp_path / "privacy.jsonl").read_text().splitlines()[-1])
    assert last == {**ledger_line(plan, "h", 11, 16).as_json(), "least_steps": 6}


def count_error() -> None:
    raise UserError("hospital-2 has 7 of 40 patients")


def value_error() -> None:
    raise ValueError("patient 10023 weighs 81.5 kg")


def budget() -> None:
    raise BudgetExhausted("privacy budget: 0 of 8 are left; nothing is released")


def doubt() -> None:
    raise LedgerDoubtful("privacy ledger is damaged: nothing is released")


@pytest.mark.parametrize("unit", ["patient", "hospital"])
@pytest.mark.parametrize("fail", [count_error, value_error])
def test_no_error_text_leaves_a_private_hospital(
    tiny_config, in_process, tmp_path, monkeypatch, fail, unit
) -> None:
    monkeypatch.setattr(Worker, "tokens", lambda *a: fail())
    with pytest.raises(RunFailed) as error:
        in_process(tiny_config(**PRIVATE, privacy__unit=unit))
    assert "hospital-2: failed: the reason stays in the hospital, in errors.txt" in str(error.value)
    assert not re.search("7 of|40 patients|10023|81.5|ValueError|conftest", str(error.value))
    (errors,) = tmp_path.glob("run-*/hospitals/errors.txt")
    assert ("7 of 40 patients" if fail is count_error else "81.5 kg") in errors.read_text()


def test_without_privacy_a_type_and_a_place_are_told_and_no_value(
    tiny_config, in_process, monkeypatch
) -> None:
    monkeypatch.setattr(Worker, "tokens", lambda *a: count_error())
    with pytest.raises(RunFailed, match="UserError at test_private_contract.py") as error:
        in_process(tiny_config())
    assert "40" not in str(error.value)
    monkeypatch.setattr(Worker, "tokens", lambda *a: value_error())
    with pytest.raises(RunFailed, match="ValueError at test_private_contract.py") as error:
        in_process(tiny_config())
    assert "81.5" not in str(error.value)


@pytest.mark.parametrize("fail", [budget, doubt])
def test_a_refusal_without_data_is_told(tiny_config, in_process, monkeypatch, fail) -> None:
    monkeypatch.setattr(Worker, "tokens", lambda *a: fail())
    with pytest.raises(RunFailed, match="nothing is released"):
        in_process(tiny_config(**PRIVATE))


def test_the_partitions_counts_stay_in_a_private_hospital(tiny_config, in_process) -> None:
    """In the handshake too."""
    few = {"partition__min_patients": 30, "federation__mismatch": "stop"}
    with pytest.raises(RunFailed, match="in the handshake: the reason stays") as error:
        in_process(tiny_config(**{**PRIVATE, **few}))
    assert "patients" not in str(error.value)
    with pytest.raises(RunFailed, match="patients"):
        in_process(tiny_config(**few))


def test_a_private_hospital_evaluates_nothing(tiny_config, tmp_path) -> None:
    config = tiny_config(**PRIVATE, run__directory=str(tmp_path))
    with pytest.raises(ContractError, match="no loss leaves"):
        client.handlers.HANDLERS["evaluate"](config, None, None, None)
