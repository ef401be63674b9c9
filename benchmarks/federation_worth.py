"""What personal adapters, weighting and ways of training do, above all to the worst hospital.

    OMP_NUM_THREADS=1 python benchmarks/federation_worth.py EXPERIMENT [--backbone tiny]
        [--seeds N] [--first-seed N] [--arm NAME ...] [--set key=value ...] [--folder DIR]
        [--processes N]

EXPERIMENT is one of

    personal   personal adapters under epsilon 3, five hospitals dealt by a Dirichlet of 0.1: the
               answers of B_global + B_own beside those of B_global, in the same runs
    fairness   weighting by samples, uniform weighting and q-FedAvg, Dirichlet of 0.3
    q-fedavg   the same with q-FedAvg's step, 1 / L, chosen
    methods    ways of training, Dirichlet of 0.3: F1, loss, bytes, seconds
    private    FA-LoRA and LoRA in a federation under epsilon 1, 3 and 6

The last two first choose learning rates with a seed of their own (patients dealt otherwise), by F1
and by the loss of made-up admissions; q-fedavg its step so, by validation loss.

Every run is a cell of a sweep in the folder: killed at any moment, the same command goes on. With
--processes, so many cells run at once, each process with a backbone of its own.
Synthetic source, lists scored as in configs/demo.toml. Patients are dealt anew by every seed. The
result is written to benchmarks/results/federation_worth_EXPERIMENT_BACKBONE.json, as it comes.
"""

import argparse
import json
import math
import multiprocessing
import statistics
import sys
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.config import Config
from common.configio import Scalar, from_flat, parse_overrides, read_config
from common.evaluation.transfer import half_width
from common.files import write_text
from common.records.summary import Summary
from sim.flower.superlink import end_with_parent
from sim.process.progress import SILENT
from sim.runs.cells import Cell, run_cell
from sim.runs.sweep import plan_cells

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
            # Sizes from the dealing alone, before any training: under seeds 0 to 9 every hospital
            # then holds out 20 admissions or more, where 480 patients left one with 3.
            "data.synthetic-patients": 1000,
            "partition.alpha": 0.1,
            "partition.min-patients": 90,
            "data.validation-fraction": 0.15,
            # A quarter of the mean hospital's 130 training patients.
            "privacy.expected-batch": 32.0,
            "train.dtype": "fp32",
            "train.batch-size": 16,
            "federation.local-steps": 8,
            "federation.rounds": 4,
        },
    },
    "fairness": {"arms": ["fa-lora", "uniform", "q-fedavg"], "set": {}},
    "q-fedavg": {
        "arms": ["q-fedavg"],
        "set": {},
        "tune": {"q-fedavg": "federation.server-learning-rate=10,30,100,1000"},
        "tune by": "loss",
    },
    "methods": {
        "arms": [
            *("fa-lora", "lora", "rolora", "local-only", "centralised"),
            *("fedadam", "personal"),
        ],
        "set": {"federation.local-steps": 8},
        "tune": {
            "fa-lora": "train.learning-rate=1e-2,3e-2",
            "lora": "train.learning-rate=1e-3,3e-3,1e-2,3e-2",
            "rolora": "train.learning-rate=3e-3,1e-2,3e-2",
            "fedadam": "federation.server-learning-rate=3e-3,1e-2,3e-2",
        },
    },
    "private": {
        "arms": ["fa-lora", "lora"],
        # What lowers the noise for the same work on two cores: few steps of many patients, a small
        # sampling rate, and the few parameters of rank 2 on q and v.
        "set": {
            **PRIVATE,
            "data.synthetic-patients": 2000,
            "partition.min-patients": 200,
            "adapter.targets": "q_proj,v_proj",
            "adapter.rank": 2,
            "train.warmup-steps": 0,
            "privacy.sampling-rate": 0.1,
            "privacy.expected-batch": 32.0,
            "privacy.max-admissions-per-patient": 1,
            "federation.local-steps": 1,
            "federation.rounds": 4,
            "evaluation.samples": 240,
            "evaluation.public-validation": 48,  # no loss of patients is told
        },
        "vary": ["privacy.target-epsilon=1,3,6"],
        "tune by": "public_loss",
        "tune": {
            "fa-lora": "train.learning-rate=2e-2,6e-2,2e-1",
            "lora": "train.learning-rate=6e-3,2e-2,6e-2",
        },
    },
}
TUNING_SEED = 1000
LEARNS_AS = {"local-only": "fa-lora", "centralised": "fa-lora", "personal": "fa-lora"}


def figures(summary: Summary, model: str) -> dict[str, float | None]:
    """Return one run's figures, of the answers of one model."""
    scores = summary.metrics[model]
    each = [one.f1 for one in scores.by_hospital.values()]
    curve = summary.public_validation.losses if summary.public_validation else ()
    return {
        "f1": scores.f1,
        "worst_f1": min(each, default=None),
        "best_f1": max(each, default=None),
        "loss": (summary.validation_loss or (None,))[-1],
        "public_loss": curve[-1][1] if curve else None,
        "public_loss_change": curve[-1][1] - curve[0][1] if curve else None,
        "mb_up": summary.wire.bytes_up / 1e6 if summary.wire else None,
        "seconds": summary.training_seconds,
    }


def of_their_own(alone: Mapping[str, Summary]) -> dict[str, float | None]:
    """Return the figures of hospitals that train alone: each answers for its own admissions.

    Args:
        alone: By hospital its run, which answers for every hospital's held-out admissions.
    """
    own = [one.metrics["fedrx"].by_hospital[name] for name, one in alone.items()]
    each, samples = [one.f1 for one in own], [one.samples for one in own]
    losses = [figures(one, "fedrx")["loss"] for one in alone.values()]
    return {
        "f1": statistics.fmean(each, samples),
        "worst_f1": min(each),
        "best_f1": max(each),
        "loss": None if None in losses else statistics.fmean(one for one in losses if one),
        "mb_up": None,
        "seconds": sum(one.training_seconds for one in alone.values()),
    }


def over_seeds(seeds: Mapping[int, Mapping[str, float | None]]) -> dict[str, Any]:
    """Return mean and half width of the interval over seeds (Student's t) of every figure.

    Args:
        seeds: By seed the figures of its run.
    """
    found = {}
    for name in next(iter(seeds.values())):
        values = [one[name] for one in seeds.values() if one[name] is not None]
        if len(values) == len(seeds):
            found[name] = {
                "mean": statistics.fmean(values),
                "half_width": half_width(values),
                "seeds": values,
            }
    return found


def table(runs: Mapping[Cell, Summary]) -> list[dict[str, Any]]:
    """Return a row for every arm, and beside personal adapters one for the global B alone.

    Args:
        runs: Of an arm and seed all its cells: of local-only one for every hospital.
    """
    rows: dict[str, dict[int, dict[str, float | None]]] = {}
    for arm, seed in dict.fromkeys((cell.arm, cell.seed) for cell in runs):
        parts = {
            cell.part: summary
            for cell, summary in runs.items()
            if (cell.arm, cell.seed) == (arm, seed)
        }
        summary = next(iter(parts.values()))
        if "personal" in summary.metrics:
            common, found = figures(summary, "fedrx"), figures(summary, "personal")
            rows.setdefault(f"{arm}: its global B", {})[seed] = common
            for name in ("f1", "worst_f1"):
                found[f"{name}_beyond_global"] = (found[name] or 0.0) - (common[name] or 0.0)
        else:
            found = of_their_own(parts) if "" not in parts else figures(summary, "fedrx")
        rows.setdefault(arm, {})[seed] = found
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


def run_one(folder: Path, cell: Cell) -> Summary:
    """Run a cell, or go on with it, in its folder below the experiment's."""
    return run_cell(cell, folder / cell.folder, SILENT, sys.argv)


def finished(
    cells: Sequence[Cell], folder: Path, processes: int
) -> Iterator[tuple[Cell, Summary | None]]:
    """Run all cells, so many at once; yields each as it ends, without a summary where it failed."""
    if processes == 1:
        yield from ((cell, run_one(folder, cell)) for cell in cells)
        return
    context = multiprocessing.get_context("spawn")
    # Who is killed leaves nobody at work on a run that the next command goes on with.
    options: Any = {"mp_context": context, "initializer": end_with_parent}
    with ProcessPoolExecutor(processes, **options) as pool:
        waiting = {pool.submit(partial(run_one, folder), cell): cell for cell in cells}
        for one in as_completed(waiting):
            error = one.exception()
            if error:
                traceback.print_exception(error)
            yield waiting[one], None if error else one.result()


def tuned(
    experiment: str, config: Config, folder: Path, processes: int
) -> dict[str, dict[str, Scalar]]:
    """Return by arm the value whose run is best, all with a seed of their own.

    Best is the highest F1, or the lowest of the loss that the experiment names.
    """
    by = EXPERIMENTS[experiment].get("tune by", "f1")
    tune: Mapping[str, str] = EXPERIMENTS[experiment].get("tune", {})
    cells: list[Cell] = []
    for arm, values in tune.items():
        cells += plan_cells(config, arms=[arm], seeds=[TUNING_SEED], vary=[values])
    best: dict[str, tuple[float, str]] = {}
    for cell, summary in finished(cells, folder, processes):
        arm, _, point = cell.arm.partition(" ")
        value = figures(summary, "fedrx")[by] if summary else None
        if value is not None:
            print(f"tuning: {cell.arm}: {by} {value:.4f}", flush=True)
            score = value if by == "f1" else -value
            best[arm] = max(best.get(arm, (-math.inf, "")), (score, point))
    return {arm: dict(parse_overrides([point])) for arm, (_, point) in best.items()}


def main(arguments: list[str] | None = None) -> int:
    """Run what is not finished, and write the result whenever an arm's seed is whole."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--backbone", default="embedded")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--arm", action="append", default=[])
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args(arguments)
    experiment = EXPERIMENTS[options.experiment]
    name = f"federation_worth_{options.experiment}_{options.backbone}"
    folder = options.folder or Path("runs") / name
    config = configuration(options.experiment, options.backbone, options.overrides)
    out = ROOT / "benchmarks" / "results" / f"{name}.json"
    before = json.loads(out.read_text()) if out.exists() else {}
    # Rates that a card chose need not be searched again: remove the result to do so.
    chosen = before.get("tuned") or tuned(options.experiment, config, folder, options.processes)
    cells: list[Cell] = []
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for arm in options.arm or experiment["arms"]:
            values = chosen.get(LEARNS_AS.get(arm, arm)) or chosen.get("fa-lora", {})
            best = from_flat({**chosen.get("fa-lora", {}), **values}, base=config)
            cells += plan_cells(best, arms=[arm], seeds=[seed], vary=experiment.get("vary", ()))
    done: dict[Cell, Summary] = {}
    failed = 0
    for cell, summary in finished(cells, folder, options.processes):
        if summary is None:
            failed += 1
            continue
        done[cell] = summary
        parts = Counter((one.arm, one.seed) for one in cells)
        there = Counter((one.arm, one.seed) for one in done)
        whole = [one for one in cells if there[one.arm, one.seed] == parts[one.arm, one.seed]]
        result = {
            "command": " ".join(["benchmarks/federation_worth.py", *sys.argv[1:]]),
            "processes": options.processes,
            "device": summary.device,
            "tuned": chosen,
            "rows": table({one: done[one] for one in whole}),
        }
        if "tuning" in before:
            result["tuning"] = before["tuning"]
        # Whole or not at all: the same command reads it when it goes on.
        write_text(out, json.dumps(result, indent=1) + "\n")
    show(result["rows"])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
