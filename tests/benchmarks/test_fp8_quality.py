"""Whether `fp8_quality.py` rounds what it names and nothing else."""

import sys
from pathlib import Path

import pytest
import torch

from common.model.kernels.frozen import Fp8Weight


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    import fp8_quality

    monkeypatch.setattr(fp8_quality, "BATCHES", 2)
    tiny = {"model.backbone": "tiny", "data.synthetic-patients": 60, "train.threads": 1}
    monkeypatch.setattr(fp8_quality, "SETTINGS", {**fp8_quality.SETTINGS, **tiny})
    yield fp8_quality
    for name in ("fp8_quality", "gpu_measure"):
        sys.modules.pop(name, None)


def test_only_what_is_named_is_rounded(script):
    opening = script.opened("fp32", "fp8")
    session = opening[1]
    b_P = torch.randn(session.adapter.flat.numel(), generator=torch.Generator().manual_seed(0)) / 20

    losses = {}

    def gradients(what):
        script.round_only(session, what)
        found = torch.stack(script.gradients(opening, b_P))
        losses[what] = script.validation_loss(session, opening[2].validation).loss_sum
        return found

    found = {what: gradients(what) for what in script.ROUNDED.values()}
    # Gradients are rounded on the way back alone.
    assert losses["g"] == losses[""] != losses["a"] == losses["ga"]
    # The same function by plain products: the values that the rounded weights stand for.
    for module in session.model.modules():
        weight = vars(module).get("weight")
        if isinstance(weight, Fp8Weight):
            vars(module)["weight"] = weight.float()
    exact = torch.stack(script.gradients(opening, b_P))
    apart = {what: float((one - exact).norm() / exact.norm()) for what, one in found.items()}
    assert apart[""] < 1e-5
    assert all(1e-3 < apart[what] < 1 for what in ("g", "a", "ga"))
    assert len(set(apart.values())) == 4


def test_all_formats_are_told(script, monkeypatch, tmp_path, capsys):
    file = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", ["fp8_quality.py", "--steps", "1", "--json", str(file)])
    script.main()
    assert capsys.readouterr().out == file.read_text()
    found = script.json.loads(file.read_text())
    cosines = found["gradient's cosine to fp32's"]
    assert cosines["bf16"]["median"] > cosines["fp8, all"]["median"]
    assert set(found["validation loss"]) == {"fp32", "bf16", "fp8"}
