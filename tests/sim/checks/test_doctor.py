"""What a machine lacks is found, with its fix, and a sound one passes."""

from types import SimpleNamespace

import torch

from common.errors import FedrxError
from sim.checks import doctor


def by_check():
    return {finding.check: finding for finding in doctor.examine()}


def test_a_sound_machine_has_nothing_bad(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDRX_CACHE", str(tmp_path))
    findings = by_check()
    assert all(finding.state != "bad" for finding in findings.values()), findings
    assert findings["embedded backbone"].state == "note"
    assert all(finding.fix for finding in findings.values() if finding.state != "ok")
    if not torch.cuda.is_available():
        assert findings["accelerator"].state == "note"
        assert "flash-attn" not in findings["extras"].fix


def test_what_is_short_is_named_with_its_fix(monkeypatch):
    def no_superlink(folder):
        raise FedrxError("no free port")

    monkeypatch.setattr(doctor, "superlink", no_superlink)
    monkeypatch.setattr(
        doctor.psutil, "virtual_memory", lambda: SimpleNamespace(available=2**30, total=2**31)
    )
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: SimpleNamespace(free=2**20))
    findings = by_check()
    assert (findings["memory"].state, findings["disk"].state) == ("note", "note")
    assert "FEDRX_CACHE" in findings["disk"].fix
    assert findings["simulation"].state == "bad"
    assert "no free port" in findings["simulation"].found + findings["simulation"].fix
