"""The attack scripts run, and their attacks work where nothing protects."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_server_reads_few_tokens_off_b_and_more_off_a(tmp_path) -> None:
    arguments = ["--ranks", "16", "--tokens", "8,40", "--repeats", "4", "--members", "3"]
    out = tmp_path / "view.json"
    assert script("privacy_server_view").main([*arguments, "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    area = {
        (row["shared"], row["tokens"], row["epsilon"]): row["inversion"]["area"] for row in rows
    }
    assert area["B", 8, "none"] > 0.99
    assert area["A and B", 8, "none"] > 0.99
    # 40 tokens fill B's 16 dimensions, and lie in A's 64
    assert area["B", 40, "none"] < 0.75 < area["A and B", 40, "none"]
    assert all(0.1 < value < 0.9 for (_, _, epsilon), value in area.items() if epsilon == "1")
    assert {row[attack]["verdict"] for row in rows for attack in ("inversion", "membership")} == {
        "chance",
        "discloses",
    }


@pytest.mark.slow
def test_exposure_is_the_rank_of_what_was_planted(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("FEDRX_CACHE", str(tmp_path / "cache"))
    module = script("privacy_regurgitation")
    monkeypatch.setattr(module, "EPSILONS", (module.EPSILONS[0],))
    sizes = ["--patients", "40", "--canaries", "3", "--steps", "150", "--rate", "0.03"]
    out = tmp_path / "exposure.json"
    module.main([*sizes, "--copies", "6", "--space", "8", "--out", str(out)])
    (row,) = json.loads(out.read_text())["rows"]
    assert row["largest_bits"] == 3
    assert row["exposure_bits"] == pytest.approx(sum(row["each"]) / 3)
    assert row["exposure_bits"] > row["unseen_bits"] + 0.5
    assert set(row["decoders"]) == {"greedy", "grammar"}
