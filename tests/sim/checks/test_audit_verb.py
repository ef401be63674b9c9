"""``fedrx audit``: findings with figure and verdict, and a broken mechanism is caught."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from privacy_fixtures import PRIVATE_TINY

from common.configio import from_flat
from common.errors import RunFailed, UserError
from common.privacy.mechanism.release import GaussianMechanism
from common.records.checks import Finding
from common.rundir import RunDirectory
from sim.checks.audit import audit, one_run_control
from sim.checks.audit_page import NOT_COVERED, QUESTIONS
from sim.cli.terminal import Terminal

KEYS = {**PRIVATE_TINY, "adapter.rank": 32, "privacy.sampling-rate": 0.1}


def run_audit(folder: Path, printed: io.StringIO | None = None, **keys: Any) -> dict[str, Any]:
    console = Terminal(file=printed or io.StringIO())
    config = from_flat({**KEYS, **keys})
    command = ["fedrx", "audit"]
    found = audit(config, console=console, command_line=command, run_dir=folder, canaries=40)
    return found.as_json()


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> tuple[Path, dict[str, Any], str]:
    """The run directory, the summary and what was printed of one audit of the product as it is."""
    folder, printed = tmp_path_factory.mktemp("audits") / "run", io.StringIO()
    return folder, run_audit(folder, printed), printed.getvalue()


@pytest.mark.slow
def test_every_audit_has_a_figure_and_a_verdict(sound) -> None:
    folder, summary, printed = sound
    assert summary["passed"] is True
    assert NOT_COVERED in " ".join(printed.split())
    findings = {finding["audit"]: finding for finding in summary["findings"]}
    assert list(findings) == [
        "one-run audit",
        "one-run audit, control without noise",
        "noise test",
        "one-run audit of the loop",
        "membership in the loop",
        "membership in the loop, control without noise",
        "releases taken apart",
        "noise in the loop",
        "draws",
        "patients in one pass",
        "ledger",
        "what is sent",
        "inversion without privacy",
        "inversion test",
    ]
    assert findings["one-run audit"]["figure"] <= findings["one-run audit"]["limit"]
    control = findings["one-run audit, control without noise"]
    assert control["figure"] > control["limit"]
    assert abs(findings["noise test"]["figure"] - 1) < 0.003
    assert findings["inversion without privacy"]["figure"] > 0.95
    inversion = findings["inversion test"]
    assert inversion["figure"] < inversion["limit"] < 0.65
    assert json.loads((folder / "summary.json").read_text()) == summary
    status = RunDirectory(folder).status()
    assert (status.state, status.stage) == ("finished", "audit")
    for finding in findings.values():
        assert finding["verdict"]
        assert finding["false_alarm"] < 1e-4
        low, high = finding["interval"] or (finding["figure"],) * 2
        assert low <= finding["figure"] <= float(high)


@pytest.mark.slow
def test_the_page_says_claim_attacks_outcome_and_what_is_left(sound) -> None:
    folder, summary, _ = sound
    text = (folder / "audit.md").read_text()
    page = (folder / "audit.html").read_text()
    for part in ("The claim", "What was attacked", "What came out", "What is not covered"):
        assert f"## {part}" in text
        assert f"<h2>{part}</h2>" in page
    for finding in summary["findings"]:
        assert QUESTIONS[finding["audit"]] in text
        assert finding["verdict"] in text
    assert "All 14 attacks and checks came out as the claim says" in text
    assert "script" not in page


@pytest.mark.slow
def test_the_smallest_rank_is_audited_too(tmp_path) -> None:
    assert run_audit(tmp_path / "run", **{"adapter.rank": 2})["passed"] is True


@pytest.mark.slow
def test_a_quarter_of_the_noise_is_caught(tmp_path, monkeypatch) -> None:
    honest = GaussianMechanism.release

    def quarter(self: GaussianMechanism, sum_P: torch.Tensor) -> torch.Tensor:
        mean = sum_P / self.plan.expected_batch
        return mean + (honest(self, sum_P) - mean) / 4

    monkeypatch.setattr(GaussianMechanism, "release", quarter)
    with pytest.raises(RunFailed, match=r"one-run audit: the claim is refuted.*noise test: wrong"):
        run_audit(tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["passed"] is False
    status = RunDirectory(tmp_path / "run").status()
    assert (status.state, status.stage) == ("failed", "audit")
    assert "the claim is refuted" in status.error
    assert (tmp_path / "run" / "audit.html").exists()


@pytest.mark.parametrize("has_power", [True, False])
@pytest.mark.parametrize("verdict", ["no power", "in other words"])
def test_a_control_that_finds_nothing_fails_where_it_could_have(
    make_plan, monkeypatch, has_power, verdict
) -> None:
    """By what the finding says in its field, whatever its words are."""
    found = Finding(
        audit="", figure=0, meaning="", limit=1, passed=True, verdict=verdict, has_power=has_power
    )
    monkeypatch.setattr("sim.checks.audit.one_run_audit", lambda *_, **__: found)
    control = one_run_control(make_plan())
    assert (control.passed, control.verdict) == (not has_power, verdict)


def test_nothing_to_audit_is_said_before_anything_is_written(tmp_path) -> None:
    with pytest.raises(UserError, match="privacy is off"):
        run_audit(tmp_path / "off", **{"privacy.noise-multiplier": 0.0})
    with pytest.raises(UserError, match="privacy.unit=hospital: the audit covers") as error:
        run_audit(tmp_path / "hospital", **{"privacy.unit": "hospital"})
    assert "off" not in str(error.value)
    with pytest.raises(UserError, match="adapter.mode=rolora: .*; allowed: fa-lora, lora"):
        run_audit(tmp_path / "in-turn", **{"adapter.mode": "rolora"})
    with pytest.raises(UserError, match="protects nobody"):
        run_audit(tmp_path / "fixed", **{"privacy.deterministic-noise": True})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (TypeError("a newer library"), "the audit failed: TypeError.*; fix: start it again"),
        (RunFailed("the ledger was wronged"), "^the ledger was wronged$"),
    ],
)
def test_an_audit_that_does_not_come_to_its_end_is_failed(tmp_path, monkeypatch, error, said):
    """Whatever ends it; nothing offers to resume it."""

    def broken(*args: Any, **keys: Any) -> None:
        raise error

    monkeypatch.setattr("sim.checks.audit.one_run_audit", broken)
    with pytest.raises(RunFailed, match=said) as caught:
        run_audit(tmp_path / "run")
    assert "fedrx resume" not in str(caught.value)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["stage"]) == ("failed", "audit")
    assert not (tmp_path / "run" / "summary.json").exists()
