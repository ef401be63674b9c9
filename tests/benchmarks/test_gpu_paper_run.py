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
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    file = tmp_path_factory.mktemp("results") / "tiny.json"
    script = str(ROOT / "benchmarks" / "gpu_paper_run.py")
    options = ["--tiny", "--device", "cpu", "--dtype", "fp32", "--steps", "1", "--length", "40"]
    options += ["--answers", "3", "--tokens", "8", "--rank", "4", "--json", str(file)]
    done = subprocess.run(
        [sys.executable, "-c", _BARE, script, *options],
        capture_output=True,
        text=True,
        check=False,
        cwd=file.parent,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(file.read_text()), done.stdout


@pytest.mark.process
def test_every_contestant_takes_every_workload(figures):
    found, printed = figures
    assert found["failed"] == []
    cases = {(case["who"], case["workload"]) for case in found["cases"]}
    whos = ("ours", "ours, private", "peft", "peft, checkpointing")
    assert cases == {(who, load) for who in whos for load in ("full", "mixed")}
    assert {case["kernels"] for case in found["cases"] if "kernels" in case} == {"torch"}
    for case in found["cases"]:
        assert case["tokens_per_second"] == pytest.approx(sum(case["lengths"]) / case["seconds"])
        assert case["lengths"] == ([40] * 4 if case["workload"] == "full" else [40, 22, 14, 8])
    assert "tokens/s" in printed
    assert "not measured on a CPU" in printed


@pytest.mark.process
def test_exactness_and_agreement_are_measured(figures):
    found, _ = figures
    assert found["exactness"]["tokens of graphs equal slots'"] is True
    for one in found["agreement_with_eager"].values():
        assert one["hidden_states"] < 1e-5
        assert 0 < one["gradient"] < 1e-4


@pytest.mark.process
def test_answers_and_first_steps_are_timed(figures):
    found, _ = figures
    rates = found["answer_tokens_per_second"]
    assert set(rates) == {"ours, 3", "ours, not recorded, 3", "transformers, 3"}
    for hash_is in ("unknown", "known"):
        stages = found[f"first step, hash {hash_is}"]
        times = [stages[name] for name in ("imports", "fingerprint", "open", "first step")]
        assert times == sorted(times)
        assert times[0] > 0
        packages = stages["import_seconds"]
        assert {"torch", "transformers"} <= packages.keys()
        assert not {"sklearn", "pandas", "matplotlib"} & packages.keys()


@pytest.mark.process
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_memory_is_within_three_percent_of_the_plan_on_a_gpu(tmp_path):
    file = tmp_path / "figures.json"
    script = str(ROOT / "benchmarks" / "gpu_paper_run.py")
    options = ["--parts", "training", "--steps", "1", "--tokens", "8", "--json", str(file)]
    subprocess.run([sys.executable, script, *options], check=True)
    ours = [c for c in json.loads(file.read_text())["cases"] if c["who"] == "ours"]
    assert abs(ours[0]["plan_over_peak"] - 1) < 0.03
