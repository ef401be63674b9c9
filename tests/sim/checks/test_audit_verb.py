"""``fedrx audit``: findings with figure and verdict, and a broken mechanism is caught."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from common.configio import from_flat
from common.errors import RunFailed, UserError
from common.privacy.mechanism.release import GaussianMechanism
from sim.checks.audit import COVERAGE, audit

KEYS: dict[str, Any] = {
    "model.backbone": "tiny",
    "adapter.rank": 32,
    "train.dtype": "fp32",
    "train.device": "cpu",
    "privacy.noise-multiplier": 1.2,
}


def run_audit(folder: Path, printed: io.StringIO | None = None, **keys: Any) -> dict[str, Any]:
    console = Console(file=printed or io.StringIO())
    config = from_flat({**KEYS, **keys})
    return audit(config, console=console, command_line=["fedrx", "audit"], run_dir=folder)


def test_every_audit_has_a_figure_and_a_verdict(tmp_path) -> None:
    printed = io.StringIO()
    summary = run_audit(tmp_path / "run", printed)
    assert summary["passed"] is True
    assert COVERAGE in " ".join(printed.getvalue().split())
    findings = {finding["audit"]: finding for finding in summary["findings"]}
    assert list(findings) == [
        "one-run audit",
        "one-run audit, control without noise",
        "noise test",
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
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary


def test_the_smallest_rank_is_audited_too(tmp_path) -> None:
    assert run_audit(tmp_path / "run", **{"adapter.rank": 2})["passed"] is True


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


def test_nothing_to_audit_is_said_before_anything_is_written(tmp_path) -> None:
    with pytest.raises(UserError, match="privacy is off"):
        run_audit(tmp_path / "off", **{"privacy.noise-multiplier": 0.0})
    with pytest.raises(UserError, match="privacy.unit=hospital: the audit covers") as error:
        run_audit(tmp_path / "hospital", **{"privacy.unit": "hospital"})
    assert "off" not in str(error.value)
    with pytest.raises(UserError, match="protects nobody"):
        run_audit(tmp_path / "fixed", **{"privacy.deterministic-noise": True})
    assert list(tmp_path.iterdir()) == []
