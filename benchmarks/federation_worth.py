"""What personal adapters, weighting and ways of training do, above all to the worst hospital.

    OMP_NUM_THREADS=1 python benchmarks/federation_worth.py EXPERIMENT [--backbone tiny]
        [--seeds N] [--arm NAME ...] [--set key=value ...] [--folder DIR]

EXPERIMENT is one of

    personal   personal adapters under epsilon 3, five hospitals dealt by a Dirichlet of 0.1: the
               answers of B_global + B_own beside those of B_global, in the same runs
    fairness   weighting by samples, uniform weighting and q-FedAvg, Dirichlet of 0.3
    methods    ways of training, Dirichlet of 0.3: F1, loss, bytes, seconds
    private    FA-LoRA and LoRA in a federation under epsilon 1, 3 and 6

Every run is a cell of a sweep in the folder: killed at any moment, the same command goes on.
Synthetic source, lists scored as in configs/demo.toml. Patients are dealt anew by every seed. The
result is written to benchmarks/results/federation_worth_EXPERIMENT_BACKBONE.json, as it comes.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console

from common.config import Config
from common.configio import from_flat, parse_overrides, read_config
from common.evaluation.transfer import half_width
from common.records import Summary
from common.rundir import RunDirectory
from sim.runs.sweep import Cell, plan_cells, run_all

ROOT = Path(__file__).resolve().parents[1]
SHARED = {
    "run.backend": "in-process",
    "data.synthetic-patients": 480,
    "federation.hospitals": 5,
    "partition.scheme": "dirichlet",
    "partition.alpha": 0.3,
    "partition.min-patients": 30,
    "evaluation.bootstrap": 500,
}
PRIVATE = {
    "federation.weighting": "uniform",
    "privacy.target-epsilon": 3.0,
    "privacy.delta": 1e-4,
    "privacy.sampling-rate": 0.25,
    "privacy.expected-batch": 16.0,
    "privacy.max-admissions-per-patient": 2,
    "train.schedule": "constant",
}
EXPERIMENTS: dict[str, dict[str, Any]] = {
    "personal": {
        "arms": ["personal"],
        "set": {
            **PRIVATE,
            "partition.alpha": 0.1,
            "partition.min-patients": 40,
            "data.validation-fraction": 0.15,
        },
    },
    "fairness": {"arms": ["fa-lora", "uniform", "q-fedavg"], "set": {}},
    "methods": {
        "arms": [
            *("fa-lora", "lora", "rolora", "local-only", "centralised"),
            *("fedadam", "personal"),
        ],
        "set": {},
    },
    "private": {
        "arms": ["fa-lora", "lora"],
        "set": PRIVATE,
        "vary": ["privacy.target-epsilon=1,3,6"],
    },
}


def figures(summary: Summary, model: str) -> dict[str, float | None]:
    """Return one run's figures, of the answers of one model."""
    told = summary.metrics[model].model_dump()
    each = {name: one["f1"] for name, one in told["by_hospital"].items()}
    return {
        "f1": told["f1"],
        "worst_f1": min(each.values()),
        "best_f1": max(each.values()),
        "loss": (summary.validation_loss or (None,))[-1],
        "mb_up": summary.wire.bytes_up / 1e6 if summary.wire else None,
        "seconds": summary.training_seconds,
    }


def over_seeds(seeds: Mapping[int, Sequence[dict[str, float | None]]]) -> dict[str, Any]:
    """Return mean and half width of the interval over seeds (Student's t) of every figure.

    Args:
        seeds: For each seed its runs (several of local-only, which are averaged).
    """
    found = {}
    for name in next(iter(seeds.values()))[0]:
        each = [[run[name] for run in runs] for runs in seeds.values()]
        if any(value is None for runs in each for value in runs):
            continue
        means = [statistics.fmean(runs) for runs in each]
        found[name] = {
            "mean": statistics.fmean(means),
            "half_width": half_width(means),
            "seeds": means,
        }
    return found


def table(cells: Sequence[Cell], runs: Mapping[str, RunDirectory]) -> list[dict[str, Any]]:
    """Return a row for every arm, and beside personal adapters one for the global B alone."""
    rows: dict[str, dict[int, list[dict[str, float | None]]]] = {}
    for cell in cells:
        summary = runs[cell.folder].summary()
        personal = "personal" in summary.metrics
        found = figures(summary, "personal" if personal else "fedrx")
        if personal:
            common = figures(summary, "fedrx")
            alone = f"{cell.arm}: its global B"
            rows.setdefault(alone, {}).setdefault(cell.seed, []).append(common)
            for name in ("f1", "worst_f1"):
                found[f"{name}_beyond_global"] = (found[name] or 0.0) - (common[name] or 0.0)
        rows.setdefault(cell.arm, {}).setdefault(cell.seed, []).append(found)
    return [{"arm": arm, "runs": len(seeds), **over_seeds(seeds)} for arm, seeds in rows.items()]


def configuration(experiment: str, backbone: str, overrides: Sequence[str]) -> Config:
    """Return what all runs of an experiment share."""
    base = read_config(ROOT / "configs" / "demo.toml")
    values = {**SHARED, **EXPERIMENTS[experiment]["set"], "model.backbone": backbone}
    return from_flat({**values, **parse_overrides(overrides)}, base=base)


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the rows as markdown."""
    names = list(dict.fromkeys(key for row in rows for key in row if key not in ("arm", "runs")))
    print("| arm | seeds | " + " | ".join(names) + " |")
    print("|---|---|" + "---|" * len(names))
    for row in rows:
        cells = []
        for name in names:
            one = row.get(name)
            half = f" ± {one['half_width']:.2g}" if one and one["half_width"] is not None else ""
            cells.append(f"{one['mean']:.4g}{half}" if one else "–")
        print(f"| {row['arm']} | {row['runs']} | " + " | ".join(cells) + " |", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run what is not finished, and write the result after every seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--backbone", default="embedded")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arm", action="append", default=[])
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args(arguments)
    told = EXPERIMENTS[options.experiment]
    name = f"federation_worth_{options.experiment}_{options.backbone}"
    folder = options.folder or Path("runs") / name
    config = configuration(options.experiment, options.backbone, options.overrides)
    cells: list[Cell] = []
    for seed in range(options.seeds):
        arms, vary = options.arm or told["arms"], told.get("vary", ())
        cells += plan_cells(config, arms=arms, seeds=[seed], vary=vary)
        runs = run_all(
            cells,
            folder,
            console=Console(quiet=True),
            command_line=sys.argv,
            again="the same command",
        )
        rows = table(cells, runs)
        result = {
            "command": " ".join(["benchmarks/federation_worth.py", *sys.argv[1:]]),
            "seeds": seed + 1,
            "rows": rows,
        }
        out = ROOT / "benchmarks" / "results" / f"{name}.json"
        out.write_text(json.dumps(result, indent=1) + "\n")
        show(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
