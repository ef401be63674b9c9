"""The GPU benchmark at tiny size on the CPU, with nothing but torch, transformers and peft."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
_BARE = """
import runpy, sys
for name in ("polars", "pandas", "flwr", "ray", "sklearn", "scipy", "opacus", "rich", "typer"):
    # Importing it raises ImportError, as where it is not installed.
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    file = tmp_path_factory.mktemp("results") / "tiny.json"
    script = str(ROOT / "benchmarks" / "gpu_paper_run.py")
    options = ["--tiny", "--device", "cpu", "--dtype", "fp32", "--steps", "1", "--length", "40"]
    done = subprocess.run(
        [sys.executable, "-c", _BARE, script, *options, "--ranks", "2", "4", "--json", str(file)],
        capture_output=True,
        text=True,
        check=False,
        cwd=file.parent,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text()), done.stdout


@pytest.mark.process
def test_every_contestant_takes_every_workload(figures):
    found, printed = figures
    cases = {(c["who"], c["rank"], c["workload"]) for c in found["cases"]}
    assert cases == {
        (who, rank, load)
        for who in ("fedrx", "peft")
        for rank in (2, 4)
        for load in ("full", "mixed")
    }
    for case in found["cases"]:
        assert case["tokens_per_second"] == pytest.approx(sum(case["lengths"]) / case["seconds"])
        assert case["lengths"] == ([40] * 4 if case["workload"] == "full" else [40, 22, 14, 8])
    assert "tokens/s" in printed
    assert "not measured on a CPU" in printed


@pytest.mark.process
def test_agreement_with_eager_is_measured(figures):
    found, _ = figures
    for one in found["agreement_with_eager"].values():
        assert one["hidden_states"] < 1e-5
        assert 0 < one["gradient"] < 1e-4


@pytest.mark.process
def test_the_kernel_and_its_reason_are_named(figures):
    found, _ = figures
    kernel = found["cases"][0]["attention"]
    assert kernel["value"] == "sdpa"
    assert "CUDA" in kernel["reason"]


@pytest.mark.process
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_memory_is_within_ten_percent_of_the_plan_on_a_gpu(tmp_path):
    file = tmp_path / "figures.json"
    script = str(ROOT / "benchmarks" / "gpu_paper_run.py")
    options = ["--ranks", "16", "--steps", "1", "--json", str(file)]
    subprocess.run([sys.executable, script, *options], check=True)
    ours = [c for c in json.loads(file.read_text())["cases"] if c["who"] == "fedrx"]
    assert abs(ours[0]["plan_over_peak"] - 1) < 0.10
