"""The ledger (specification test 10): charged before release, and never less than was released."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import RunFailed, UserError
from common.privacy.accounting import epsilon
from common.privacy.budget.ledger import BudgetExhausted, Ledger
from common.privacy.plan import PrivacyPlan

PLAN = """
from common.privacy.plan import PrivacyPlan
PLAN = PrivacyPlan(clip_norm=1.0, noise_multiplier=1.5, sampling_rate=0.1, steps=40,
    expected_batch=8.0, max_admissions_per_patient=4, delta=1e-5)
"""
HOSPITAL = """
import os, signal, sys, time
from pathlib import Path
from common.privacy.budget.ledger import Ledger
folder = Path(sys.argv[1])
def killed(moment):
    if moment == sys.argv[2]:
        os.kill(os.getpid(), signal.SIGKILL)
def send(round_number):
    with (folder / "sent").open("a") as file:
        file.write(f"{round_number}\\n")
ledger = Ledger(folder / "ledger.jsonl", PLAN)
first = int(sys.argv[3])
for round_number in range(first, first + int(sys.argv[4])):
    BODY
"""
HONEST = """
    killed("before charge")
    ledger.charge(round_number, 10)
    killed("after charge")
    ledger.release(round_number)
    killed("after release")
    send(round_number)
    killed("after send")
"""
CHARGED_LATE = """
    send(round_number)
    killed("after send")
    ledger.charge(round_number, 10)
    ledger.release(round_number)
"""
IN_MEMORY = """
    sent = globals().setdefault("charged", [])
    sent.append(10)
    killed("after charge")
    send(round_number)
    killed("after send")
    ledger.path.write_text("")
"""
MOMENTS = ("before charge", "after charge", "after release", "after send")


def hospital(
    folder: Path, body: str, moment: str = "never", first: int = 1, rounds: int = 2
) -> int:
    script = PLAN + HOSPITAL.replace("    BODY\n", body)
    command = [
        sys.executable,
        "-c",
        textwrap.dedent(script),
        str(folder),
        moment,
        str(first),
        str(rounds),
    ]
    return subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(Path.cwd())}, check=False
    ).returncode


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch) -> None:
    monkeypatch.chdir(Path(__file__).resolve().parents[3])


def spent(folder: Path, plan: PrivacyPlan) -> int:
    return Ledger(folder / "ledger.jsonl", plan).steps


def covered(folder: Path, plan: PrivacyPlan) -> bool:
    """Whether everything that left had been charged: the property that a kill must not break."""
    sent = (folder / "sent").read_text().split() if (folder / "sent").exists() else []
    return spent(folder, plan) >= 10 * len(sent)


@pytest.mark.process
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_any_moment_the_ledger_covers_what_was_sent(tmp_path, make_plan, moment) -> None:
    plan = make_plan()
    assert hospital(tmp_path, HONEST, moment) == -signal.SIGKILL
    assert covered(tmp_path, plan)
    before = epsilon(plan, spent(tmp_path, plan)).value
    assert hospital(tmp_path, HONEST, first=1) == 0  # resumed
    assert covered(tmp_path, plan)
    assert epsilon(plan, spent(tmp_path, plan)).value >= before


@pytest.mark.process
@pytest.mark.parametrize("mutant", [CHARGED_LATE, IN_MEMORY])
def test_the_check_rejects_charging_late_and_charging_in_memory(
    tmp_path, make_plan, mutant
) -> None:
    assert hospital(tmp_path, mutant, "after send") == -signal.SIGKILL
    assert not covered(tmp_path, make_plan())


@pytest.mark.process
def test_rounds_in_one_process_cost_what_they_cost_in_many(tmp_path, make_plan) -> None:
    plan, one, many = make_plan(), tmp_path / "one", tmp_path / "many"
    for folder in (one, many):
        folder.mkdir()
    hospital(one, HONEST, rounds=4)
    for first in range(1, 5):
        hospital(many, HONEST, first=first, rounds=1)
    assert spent(one, plan) == spent(many, plan) == 40
    assert epsilon(plan, 40).value > 1.5 * epsilon(plan, 10).value  # the mutant: fresh each round


def test_over_budget_nothing_is_charged_or_released(tmp_path, make_plan) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl", make_plan(steps=25))
    for round_number in (1, 2):
        assert ledger.charge(round_number, 10) == 10 * round_number
        ledger.release(round_number)
    before = ledger.path.read_bytes()
    with pytest.raises(BudgetExhausted, match="5 of 25 are left; nothing is released"):
        ledger.charge(3, 10)
    with pytest.raises(RunFailed, match="was not charged"):
        ledger.release(3)
    assert ledger.path.read_bytes() == before
    assert ledger.charge(3, 5) == 25


def test_what_was_not_released_pays_for_the_second_attempt(tmp_path, make_plan) -> None:
    path, plan = tmp_path / "ledger.jsonl", make_plan()
    assert Ledger(path, plan).charge(1, 10) == 10
    second = Ledger(path, plan)  # the first process died before it released
    assert second.charge(1, 10) == 10
    second.release(1)
    assert second.charge(1, 10) == 20  # what was released is paid again
    second.release(1)
    with pytest.raises(RunFailed, match="was not charged"):
        second.release(1)


def test_one_process_cannot_use_a_charge_twice(tmp_path, make_plan) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl", make_plan())
    assert [ledger.charge(1, 10), ledger.charge(1, 10)] == [10, 20]


def test_an_interrupted_stretch_leaves_its_unused_steps(tmp_path, make_plan) -> None:
    path, plan = tmp_path / "ledger.jsonl", make_plan(steps=20)
    ledger = Ledger(path, plan)
    ledger.charge(20, 20)
    ledger.record_release(13, 13)
    ledger.record_release(13, 13)
    with pytest.raises(RunFailed, match="21 steps were not charged"):
        ledger.record_release(21, 21)
    resumed = Ledger(path, plan)
    with pytest.raises(BudgetExhausted):
        resumed.charge(20, 8)
    assert resumed.charge(20, 7) == 20
    resumed.release(20)
    with pytest.raises(BudgetExhausted):
        Ledger(path, plan).charge(21, 1)


def test_two_processes_cannot_release_on_one_charge(tmp_path, make_plan) -> None:
    path, plan = tmp_path / "ledger.jsonl", make_plan()
    Ledger(path, plan).charge(1, 10)
    first, second = Ledger(path, plan), Ledger(path, plan)
    first.charge(1, 10)
    second.charge(1, 10)
    first.release(1)
    with pytest.raises(RunFailed, match="another process"):
        second.release(1)
    with pytest.raises(RunFailed, match="another process"):
        second.charge(2, 10)


def test_a_torn_line_is_no_charge_and_does_not_hide_the_next(tmp_path, make_plan) -> None:
    path, plan = tmp_path / "ledger.jsonl", make_plan()
    ledger = Ledger(path, plan)
    ledger.charge(1, 10)
    ledger.release(1)
    whole = path.read_bytes()
    Ledger(path, plan).charge(2, 10)
    added = path.read_bytes()[len(whole) :]
    for cut in range(1, len(added)):
        path.write_bytes(whole + added[:cut])
        reopened = Ledger(path, plan)
        assert reopened.steps == (20 if cut == len(added) - 1 else 10)
        reopened.charge(3, 5)
        assert reopened.steps == (20 if cut == len(added) - 1 else 15)


def damage_line(lines: list[str], place: int) -> list[str]:
    return [*lines[:place], lines[place][:-9] + "\n", *lines[place + 1 :]]


@pytest.mark.parametrize(
    "damage",
    [
        lambda lines: lines[1:],
        lambda lines: [lines[0], *lines[2:]],
        lambda lines: damage_line(lines, 1),
        lambda lines: damage_line(lines, len(lines) - 1),
        lambda lines: [line.replace('"total_steps": 10', '"total_steps": 5') for line in lines],
        lambda lines: [*lines, lines[-1]],
        lambda lines: [*lines, '{"number": 9}\n'],
    ],
)
def test_a_damaged_ledger_releases_nothing(tmp_path, make_plan, damage: Callable) -> None:
    path, plan = tmp_path / "ledger.jsonl", make_plan()
    ledger = Ledger(path, plan)
    ledger.charge(1, 10)
    ledger.release(1)
    path.write_text("".join(damage(path.read_text().splitlines(keepends=True))))
    with pytest.raises(RunFailed, match="damaged"):
        Ledger(path, plan)


def test_another_plan_is_refused(tmp_path, make_plan) -> None:
    Ledger(tmp_path / "ledger.jsonl", make_plan())
    with pytest.raises(UserError, match="another privacy plan"):
        Ledger(tmp_path / "ledger.jsonl", make_plan(noise_multiplier=0.5))


def test_every_entry_is_synced_before_the_call_returns(tmp_path, make_plan, monkeypatch) -> None:
    synced: list[int] = []
    real = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda handle: (synced.append(os.fstat(handle).st_size), real(handle))[1]
    )
    ledger = Ledger(tmp_path / "ledger.jsonl", make_plan())
    for act in (lambda: ledger.charge(1, 10), lambda: ledger.release(1)):
        act()
        assert synced[-1] == ledger.path.stat().st_size
    assert ledger.path.stat().st_mode & 0o777 == 0o600
    events = [json.loads(line)["event"] for line in ledger.path.read_text().splitlines()]
    assert events == ["open", "charge", "release"]
