"""``benchmarks/privacy_cost.py`` runs, and its FLOPs (which are exact) meet the goal."""

import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "privacy_cost.py"


@pytest.mark.slow
def test_flops_of_every_contestant(capsys) -> None:
    spec = importlib.util.spec_from_file_location("privacy_cost", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    arguments = ["--backbone", "tiny", "--dtype", "fp32", "--batch", "3", "--length", "64"]
    module.main([*arguments, "--rounds", "1", "--json"])
    text = capsys.readouterr().out
    ratios = {name: row["flops_ratio"] for name, row in json.loads(text)["results"].items()}
    assert ratios["ours, plain"] == 1
    assert ratios["ours, private"] <= 1.005
    assert ratios["Opacus hooks"] > ratios["ours, private"] - 0.2
    assert ratios["Opacus ghost"] > 1.2
