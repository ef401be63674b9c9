"""What a machine lacks is found, with its fix, and a sound one passes."""

import importlib.metadata
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from common.choice import Choice
from common.errors import FedrxError
from sim.checks import doctor
from sim.cli.main import app


def by_check():
    return {finding.check: finding for finding in doctor.examine()}


@pytest.mark.ray
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
    monkeypatch.setattr(doctor, "available_memory_bytes", lambda: 2**30)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: SimpleNamespace(free=2**20))
    findings = by_check()
    assert (findings["memory"].state, findings["disk"].state) == ("note", "note")
    assert "FEDRX_CACHE" in findings["disk"].fix
    assert findings["simulation"].state == "bad"
    assert "no free port" in findings["simulation"].found + findings["simulation"].fix


@pytest.mark.parametrize(
    ("bf16", "arithmetic"),
    [(True, "the GPU computes in bf16"), (False, "the GPU has no bf16 arithmetic")],
)
def test_a_card_is_told_with_its_memory_and_arithmetic(monkeypatch, bf16, arithmetic):
    card = {
        "is_available": True,
        "device_count": 1,
        "get_device_name": "NVIDIA T4",
        "mem_get_info": (3 * 2**30, 15 * 2**30 + 2**29),  # free, total
        "get_device_capability": (7, 5),
        "is_bf16_supported": bf16,
    }
    for name, value in card.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    finding = doctor._accelerator()
    assert (finding.state, finding.fix) == ("ok", "")
    told = "15.5 GiB of memory, 3.0 GiB of it free; compute capability 7.5"
    assert finding.found == f"NVIDIA T4 is there; {told}; {arithmetic}"


@pytest.mark.parametrize(
    ("installed", "fix"),
    [("5.24.9", None), ("5.25.0", "upper"), ("5.16.1", "lower"), ("5.25.0rc1", "upper")],
)
def test_a_version_outside_of_what_was_tested_is_named(monkeypatch, installed, fix):
    """Against the ranges in the package's metadata: within, beyond, below."""
    version = importlib.metadata.version
    monkeypatch.setattr(
        doctor.importlib.metadata,
        "version",
        lambda name: installed if name == "transformers" else version(name),
    )
    declared = {"fedrx": ["transformers>=5.17,<5.25", "absent<1; extra == 'more'"]}
    monkeypatch.setattr(doctor.importlib.metadata, "requires", declared.__getitem__)
    finding = doctor._packages()
    if fix is None:
        assert finding.state == "ok"
    else:
        assert finding.state == "note"
        assert finding.found == f"transformers {installed} was not tested"
        assert finding.fix == "pip install 'transformers<5.25,>=5.17'"


def test_a_fix_is_one_line_below_the_table_however_narrow_the_terminal(monkeypatch):
    fix = "pip install 'bitsandbytes<0.51,>=0.50.2' 'opentelemetry-proto<1.40,>=1.36' '[odd]<2'"
    findings = [
        doctor.Finding(check="packages", state="note", found="[x] 9 was not tested", fix=fix),
        doctor.Finding(check="memory", state="ok", found="8.0 GiB available"),
    ]
    monkeypatch.setattr(doctor, "examine", lambda hospital: findings)
    shown = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "40"}).output
    table, _, below = shown.partition("└")
    assert below.splitlines()[1:] == [f"fix for packages: {fix}"]
    assert "[x] 9 was not" in table
    assert "pip" not in table


def test_a_reason_that_several_kernels_share_is_said_once(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = doctor._attention().found
    passed = "cudnn, flash-attn-3, flash-attn, torch-flash: needs a CUDA device, not cpu"
    assert found == f"sdpa: the fastest here ({passed})"


def test_kernels_with_reasons_of_their_own_are_said_apart(monkeypatch):
    reasons = {"cudnn": "too old", "flash-attn-3": "absent", "flash-attn": "absent"}
    monkeypatch.setattr(doctor, "choose_attention", lambda *_: Choice("torch-flash", "-"))
    monkeypatch.setattr(doctor, "obstacle", lambda kernel, *_: reasons[kernel])
    told = "cudnn: too old; flash-attn-3, flash-attn: absent"
    assert doctor._attention().found == f"torch-flash: the fastest here ({told})"
