"""The GPU benchmark at tiny size on the CPU, without most of what the product needs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

QLORA = "qlora: peft + bitsandbytes, checkpointing"
LENGTHS = {"full": [40] * 4, "mixed": [40, 22, 14, 8], "half": [40] * 2}
ROOT = Path(__file__).resolve().parents[2]
_BARE = """
import runpy, sys
absent = "polars pandas flwr ray sklearn scipy opacus dp_accounting rich typer fastapi uvicorn"
absent += " cryptography openai gguf matplotlib simple_icd_10_cm pydantic"
for name in absent.split():
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
    whos = ("ours", "ours, private", "ours, private, one pass", "peft", "peft, checkpointing")
    half = ("ours, recomputed", "ours, private, nf4", "ours, private, one pass, nf4", QLORA)
    expected = {(who, load) for who in whos for load in ("full", "mixed")}
    assert cases == expected | {(who, "half") for who in half}
    assert [case["who"] for case in found["cases"] if "error" in case] == []
    assert {case["kernels"] for case in found["cases"] if "kernels" in case} == {"torch"}
    assert {case["weights"] for case in found["cases"] if "weights" in case} == {"bf16", "nf4"}
    for case in found["cases"]:
        assert case["tokens_per_second"] == pytest.approx(sum(case["lengths"]) / case["seconds"])
        assert case["lengths"] == LENGTHS[case["workload"]]
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
def test_isolation_and_nf4_are_measured(figures):
    found, _ = figures
    for weights in ("fp32", "nf4"):
        one = found[f"isolation, {weights}"]
        assert one["again"] == 0
        assert one["apart"] == one["apart, turned"] == 0
        assert 0 <= one["shared"] < 1e-5
    assert found["nf4_against_its_values"]["gradient"] < 1e-5
    assert 0.01 < found["nf4_against_bf16"]["gradient"] < 1


@pytest.mark.process
def test_a_private_step_s_noise_is_timed_by_itself(figures):
    found, _ = figures
    for case in found["cases"]:
        if case["who"].startswith("ours, private"):
            assert case["noise_seconds"] > 0
            assert case["noise_words"] == "numpy's: cryptography is not installed"


@pytest.mark.process
def test_attention_is_timed_by_the_length_of_segments(figures):
    found, _ = figures
    table = found["attention_by_length"]
    assert table["CUDNN_TOKENS"] == 1024
    sizes = [(row["length"], row["segments"]) for row in table["seconds"]]
    assert sizes == [(8, 20), (10, 16), (20, 8), (40, 4)]  # 4 x 40 tokens each
    assert all(row["sdpa"] > 0 and row["eager"] > 0 for row in table["seconds"])
    faster = [row["length"] for row in table["seconds"] if row["sdpa"] < row["eager"]]
    assert table["sdpa wins from"] in (None, *faster)


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
    packages = found["import_seconds"]
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
