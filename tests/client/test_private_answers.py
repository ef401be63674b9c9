"""Each answer that leaves a hospital has its own release, and a ledger that forgot is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from privacy_fixtures import PRIVATE_TINY

import client.private_update
from client.kept_state import load_state
from client.local_update import LocalRound
from client.private_update import private_update
from common.configio import from_flat
from common.privacy.budget.guard import LEDGER, RECEIPT, Guard
from common.privacy.budget.ledger import Ledger, LedgerDoubtful
from common.privacy.settings import plan_of
from common.tensor_files import Altered
from common.training.hospital_data import HospitalData
from common.wire.contract import Tensors

STEPS = 2
KEYS = {**PRIVATE_TINY, "federation.rounds": 4, "federation.local-steps": STEPS}


class Killed(BaseException):
    """The hospital's process ends here."""


class Hospital:
    """One hospital's disk, and a fresh process for every round."""

    def __init__(self, folder: Path, session: Any, data: HospitalData) -> None:
        self.folder, self.session, self.data = folder, session, data
        self.left: list[Tensors] = []
        """Every answer that has left, once each."""

    def ask(self, b: Tensors | None = None, *, server_round: int = 1) -> Tensors:
        start = b or {key: np.zeros_like(v) for key, v in self.session.adapter.state().items()}
        state = load_state(self.folder, before_round=server_round)
        task = LocalRound(self.session, self.data, start, state, from_flat(KEYS), server_round)
        result = private_update(task, self.folder)
        if not any(same(result.b, earlier) for earlier in self.left):
            self.left.append(result.b)
        assert result.metrics["steps"] == self.ledger[-1]["total_steps"]
        return result.b

    @property
    def ledger(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / LEDGER).read_text().splitlines()]

    def paid(self) -> bool:
        """Whether every answer that left has a release of its own, charged for."""
        releases = [entry for entry in self.ledger if entry["event"] == "release"]
        last = self.ledger[-1]
        return len(releases) >= len(self.left) and last["total_steps"] >= last[
            "released_steps"
        ] >= STEPS * len(self.left)


def same(one: Tensors, other: Tensors) -> bool:
    return all(np.array_equal(one[key], other[key]) for key in one)


@pytest.fixture
def hospital(open_tiny, samples_of, tmp_path) -> Hospital:
    samples = tuple(samples_of((17, 5, 33, 8), (1, 2, 1, 3)))
    data = HospitalData(name="hospital-1", train=samples, validation=())
    return Hospital(tmp_path, open_tiny(), data)


def killed_before_release(hospital: Hospital, b: Tensors, monkeypatch, **asked: Any) -> Path:
    """Ask, and kill the hospital between writing the answer and recording its release."""

    def kill(*args: Any, **kwargs: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Guard, "release", kill)
        with pytest.raises(Killed):
            hospital.ask(b, **asked)
    (answer,) = hospital.folder.glob("answer-*")
    return answer


@pytest.mark.slow
def test_one_release_never_pays_for_two_answers(hospital, monkeypatch) -> None:
    """Round 1 from one B is released; from another B the hospital dies before it records that."""
    first = hospital.ask()
    answer = killed_before_release(hospital, first, monkeypatch)
    unpaid = client.private_update.read_tensors(answer)
    again = hospital.ask(first)
    assert not same(again, unpaid)
    assert hospital.ledger[-1]["released_steps"] == 2 * STEPS
    assert same(hospital.ask(first), again)  # the recorded one is served as often as it is asked
    hospital.ask(again, server_round=2)
    assert len(hospital.left) == 3
    assert hospital.paid()


def test_the_check_rejects_answers_that_are_not_bound_to_their_release(
    hospital, monkeypatch
) -> None:
    """The mutant: any release of the round lets the stored answer out."""

    def of_the_round(self: Ledger, round_number: int, result: str) -> bool:
        return any(e.event == "release" and e.round == round_number for e in self.entries())

    monkeypatch.setattr(Ledger, "released", of_the_round)
    first = hospital.ask()
    killed_before_release(hospital, first, monkeypatch)
    hospital.ask(first)
    assert not hospital.paid()


def test_an_answer_that_was_changed_on_the_disk_is_not_served(hospital) -> None:
    b = hospital.ask()
    (answer,) = hospital.folder.glob("answer-*")
    client.private_update.write_tensors(answer, {key: value + 1 for key, value in b.items()})
    assert not same(hospital.ask(), {key: value + 1 for key, value in b.items()})
    assert hospital.paid()


@pytest.mark.parametrize("kind", ["answer", "state"])
def test_one_flipped_bit_in_what_a_private_hospital_keeps_is_refused(hospital, kind) -> None:
    """Nothing is charged, trained or sent for it."""
    hospital.ask()
    charged, left = hospital.ledger, len(hospital.left)
    (file,) = hospital.folder.glob(f"{kind}-*")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(Altered, match=rf"^{file.name} is damaged"):
        hospital.ask()
    assert (hospital.ledger, len(hospital.left)) == (charged, left)


@pytest.mark.parametrize("evidence", ["receipt", "state", "answer", "all"])
@pytest.mark.parametrize("kept_entries", [0, 1, 3, 4])
def test_a_ledger_behind_other_files_releases_nothing(
    hospital, monkeypatch, evidence, kept_entries
) -> None:
    b = hospital.ask(hospital.ask(), server_round=2)
    ledger = hospital.folder / LEDGER
    lines = ledger.read_text().splitlines(keepends=True)
    assert len(lines) == 5
    ledger.unlink()
    if kept_entries:
        ledger.write_text("".join(lines[:kept_entries]))
    patterns = {"receipt": RECEIPT, "state": "state-*", "answer": "answer-*", "all": "*"}
    for file in hospital.folder.iterdir():
        if not file.match(patterns[evidence]) and file != ledger:
            file.unlink()
    trained: list[int] = []
    monkeypatch.setattr(client.private_update, "update", lambda *a, **k: trained.append(1) or 1 / 0)
    if evidence == "answer" and kept_entries >= 3:
        # an answer proves that something was charged, not how much: the server's account does;
        # and without its release it is what a crash before the release leaves
        with pytest.raises(ZeroDivisionError):
            hospital.ask(b, server_round=3)
        return
    for _ in range(2):
        with pytest.raises(LedgerDoubtful, match="older copy; nothing is released"):
            hospital.ask(b, server_round=3)
    assert trained == []


def test_honest_evidence_never_exceeds_the_ledger(hospital, monkeypatch) -> None:
    """A hospital that died can go on, and nothing of the unpaid steps goes with it."""
    b = hospital.ask()
    killed_before_release(hospital, b, monkeypatch, server_round=2)
    assert load_state(hospital.folder, before_round=3).step == STEPS
    b = hospital.ask(b, server_round=3)
    (hospital.folder / RECEIPT).unlink()
    hospital.ask(b, server_round=4)
    assert hospital.paid()
    assert hospital.ledger[-1]["total_steps"] == 3 * STEPS < plan_of(from_flat(KEYS)).steps
