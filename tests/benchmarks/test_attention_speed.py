"""``benchmarks/attention_speed.py`` runs: every case, both dtypes."""

import importlib.util
import json
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "attention_speed.py"


def test_every_case_is_measured(capsys) -> None:
    spec = importlib.util.spec_from_file_location("attention_speed", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(["--rounds", "1", "--tokens", "20", "--json"])
    rows = json.loads(capsys.readouterr().out)["results"]
    assert {(row["case"], row["dtype"]) for row in rows} == {
        (case, dtype) for case in module.CASES for dtype in ("torch.bfloat16", "torch.float32")
    }
    assert all(row["ours"] > 0 and row["SDPA"] > 0 for row in rows)
