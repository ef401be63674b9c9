"""What makes answers better: every trial on validation patients, none chosen on held-out ones.

    OMP_NUM_THREADS=1 python benchmarks/answer_quality.py --out FILE [--only NAME,...]
    OMP_NUM_THREADS=1 python benchmarks/answer_quality.py --out FILE --run DIR --name NAME

A trial is a configuration file and a few keys that differ from it. Its hospitals train as in a
federation (the product's local update, weighted means of B), and answer validation patients. Scored
lists need validation patients for their threshold, so each hospital's are halved by patient: each
half is answered with the threshold of the other. The file grows by a row after every trial; a name
that is in it is not tried again. ``--run`` adds a finished run: its B on validation patients, and
what its own evaluation found on held-out ones. ``--cost N`` adds to that what N admissions cost to
score and to write, in processor seconds of one call.

On the MIMIC-IV demo (``--set data.path=DIR``) a validation split of a tenth is nine patients, so
its trials take three tenths; the held-out patients stay the same.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from client.local_update import LocalRound, update
from common.config import Config
from common.configio import differences, read_config
from common.data.dataset import open_hospitals
from common.data.partition import Hospital
from common.evaluation.answers import B, evaluate_answers
from common.evaluation.formulary import formulary_of
from common.evaluation.lists import ListMaker, Prompts
from common.evaluation.ranking import Ranker
from common.files import write_json
from common.model.adapter.layout import initial_tensors
from common.model.session import Session
from common.rundir import RunDirectory
from common.text.batches import encode_prompt
from common.training.optimiser import TrainState
from common.training.worker import Worker

ROOT = Path(__file__).resolve().parents[1]
ALL_SEVEN = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
SHUFFLED = ("data.drug-order=shuffled", f"adapter.targets={ALL_SEVEN}", "adapter.rank=16")
DEMO = "demo.toml"
STEPS_64 = ("federation.rounds=4", "federation.local-steps=16")
STEPS_128 = ("federation.rounds=8", "federation.local-steps=16")
BEFORE = (
    *("data.drug-order=first-start", "adapter.targets=q_proj,v_proj", "adapter.rank=16"),
    *("train.learning-rate=1e-2", *STEPS_64),
)
SETS = ("data.drug-order=set", f"adapter.targets={ALL_SEVEN}", "data.validation-fraction=0.3")
TRIALS: dict[str, tuple[str, tuple[str, ...]]] = {
    "before": (DEMO, BEFORE),
    "shuffled": (DEMO, (*SHUFFLED, "train.learning-rate=1e-2", *STEPS_64)),
    "rate-3e-2": (DEMO, (*SHUFFLED, "train.learning-rate=3e-2", *STEPS_64)),
    "steps-128": (DEMO, (*SHUFFLED, "train.learning-rate=3e-2", *STEPS_128)),
    "demo-set-3e-2": (DEMO, (*SETS, "train.learning-rate=3e-2", "federation.local-steps=8")),
    "demo-set-1e-2": (DEMO, (*SETS, "train.learning-rate=1e-2", "federation.local-steps=5")),
    "rank-32": (DEMO, (*SHUFFLED, "train.learning-rate=3e-2", "adapter.rank=32", *STEPS_64)),
}
"""Name -> configuration file and what differs from it."""
METHODS = {
    "scored": ("score", "greedy", False),
    "frequencies": ("score", "greedy", True),
    "formulary": ("generate", "formulary", False),
    "greedy": ("generate", "greedy", False),
}
LOCAL = ("data.path", "run.directory")
"""Keys that name places on this machine; they are not told."""
KEPT = ("f1", "jaccard", "precision", "recall", "output_rate")


def train(worker: Worker, hospitals: Sequence[Hospital], config: Config) -> B:
    """Return B after all rounds: local updates, then means weighted by training samples."""
    session = worker.session(config)
    b = initial_tensors(session.adapter.shapes, session.adapter.spec)
    states = [TrainState() for _ in hospitals]
    tokens = [worker.tokens(config, hospital) for hospital in hospitals]
    weights = [len(one.train) / sum(len(own.train) for own in tokens) for one in tokens]
    for server_round in range(1, config.federation.rounds + 1):
        updated = [
            update(LocalRound(session, own, b, state, config, server_round)).b
            for own, state in zip(tokens, states, strict=True)
        ]
        b = {
            key: sum(w * one[key] for w, one in zip(weights, updated, strict=True)).astype("f4")
            for key in b
        }
        print(f"  round {server_round}", flush=True)
    return b


def halves(hospital: Hospital) -> tuple[Hospital, Hospital]:
    """Return the hospital twice: one half of its validation patients answers, the other chooses."""
    patients = sorted({one.patient for one in hospital.validation})
    first = set(patients[::2])
    a = tuple(one for one in hospital.validation if one.patient in first)
    b = tuple(one for one in hospital.validation if one.patient not in first)
    return replace(hospital, validation=a, test=b), replace(hospital, validation=b, test=a)


def configured_for(config: Config, method: str) -> Config:
    """Return the configuration of one way to make lists."""
    way, decoding, frequencies = METHODS[method]
    settings = replace(
        config.evaluation,
        method=way,
        decoding=decoding,
        frequencies=frequencies,
        samples=0,
        threshold_samples=0,
    )
    return replace(config, evaluation=settings)


def answered(
    session: Session, hospitals: Sequence[Hospital], config: Config, b: B, method: str
) -> dict[str, Any]:
    """Return figures of validation patients under one method, and of the baselines."""
    asked = configured_for(config, method)
    if asked.evaluation.method == "score":
        sides = list(zip(*map(halves, hospitals), strict=True))
    else:
        sides = [[replace(one, test=one.validation) for one in hospitals]]
    started = time.perf_counter()
    found = [evaluate_answers(session, side, asked, {"fedrx": b}) for side in sides]
    seconds = time.perf_counter() - started
    samples = [one.facts.samples for one in found]

    def mean(model: str, key: str) -> float:
        values = [one.metrics[model][key] for one in found]
        values = [v["value"] if isinstance(v, dict) else v or 0.0 for v in values]
        return sum(n * v for n, v in zip(samples, values, strict=True)) / sum(samples)

    row = {key: round(mean("fedrx", key), 4) for key in KEPT}
    if asked.evaluation.method == "score":
        row["prauc"] = round(mean("fedrx", "prauc"), 4)
        errors = [one.metrics["fedrx"]["calibration"]["expected_error"] for one in found]
        row["expected_calibration_error"] = round(max(errors), 4)
    row["baselines_f1"] = {
        model: round(mean(model, "f1"), 4) for model in found[0].metrics if model != "fedrx"
    }
    row["samples"] = sum(samples)
    row["seconds"] = round(seconds, 1)
    row["generation_seconds"] = sum(one.facts.generation["fedrx"].seconds for one in found)
    return row


def cost(
    session: Session, hospitals: Sequence[Hospital], config: Config, b: B, admissions: int
) -> dict[str, Any]:
    """Return processor seconds of scoring and of writing the same admissions' lists."""
    session.adapter.load(b)
    share = -(-admissions // len(hospitals))
    spent: dict[str, float] = dict.fromkeys(("scored", "greedy", "formulary"), 0.0)
    asked = 0
    for number, hospital in enumerate(hospitals):
        length = config.train.max_length
        formulary = formulary_of(hospital.train)
        ranker = Ranker(session, formulary, text=config.text, max_length_tokens=length)
        ids = [
            encode_prompt(one, session.tokenizer, text=config.text, max_length_tokens=length)[0]
            for one in hospital.test[:share]
        ]
        asked += len(ids)
        ranker.scores(ids[:1])  # the plan is made once, for any number of admissions
        prompts = Prompts(ids=ids, hospitals=[number] * len(ids))
        makers = {
            name: ListMaker(session, hospitals, configured_for(config, name))
            for name in ("greedy", "formulary")
        }
        for name in spent:
            started = time.process_time()
            if name == "scored":
                ranker.scores(ids)
            else:
                makers[name].answer(prompts)
            spent[name] += time.process_time() - started
    return {
        "admissions": asked,
        "cpu_seconds_each": {name: round(value / asked, 3) for name, value in spent.items()},
        "scored_over_greedy": round(spent["scored"] / spent["greedy"], 3),
    }


def configured(name: str, extra: Sequence[str]) -> Config:
    """Return a trial's configuration."""
    file, changes = TRIALS[name]
    return read_config(ROOT / "configs" / file, [*changes, *extra])


def tried(name: str, methods: Sequence[str], extra: Sequence[str]) -> dict[str, Any]:
    """Train and answer one trial."""
    config = configured(name, extra)
    data, worker = open_hospitals(config), Worker()
    session = worker.session(config)
    started = time.perf_counter()
    b = train(worker, data.hospitals, config)
    seconds = time.perf_counter() - started
    return {
        "name": name,
        "file": TRIALS[name][0],
        "changes": [*TRIALS[name][1], *(one for one in extra if not one.startswith(LOCAL))],
        "source": data.source,
        "seeds": {"train": config.train.seed, "adapter": config.adapter.seed},
        "steps_per_hospital": config.federation.rounds * config.federation.local_steps,
        "training_seconds": round(seconds, 1),
        "validation": {
            method: answered(session, data.hospitals, config, b, method) for method in methods
        },
    }


def finished(folder: Path, name: str, methods: Sequence[str], costed: int) -> dict[str, Any]:
    """Return a finished run as a trial, with its held-out figures."""
    run = RunDirectory.open(folder)
    config, summary = run.config(), run.read_json("summary.json")
    data, session = open_hospitals(config), Worker().session(config)
    b = run.load_checkpoint().b
    metrics = summary["metrics"]
    return {
        "name": name,
        "changes": [
            f"{one.key}={one.new}" for one in differences(Config(), config) if one.key not in LOCAL
        ],
        "source": data.source,
        "seeds": {"train": config.train.seed, "adapter": config.adapter.seed},
        "steps_per_hospital": config.federation.rounds * config.federation.local_steps,
        "training_seconds": summary["training_seconds"],
        "validation": {
            method: answered(session, data.hospitals, config, b, method) for method in methods
        },
        "cutoffs": summary["evaluation"]["generation"]["fedrx"].get("cutoffs"),
        **({"cost": cost(session, data.hospitals, config, b, costed)} if costed else {}),
        "held_out": {
            "method": config.evaluation.method,
            "samples": metrics["fedrx"]["samples"],
            "patients": metrics["fedrx"]["patients"],
            **{key: metrics["fedrx"].get(key) for key in (*KEPT, "prauc", "f1_beyond")},
            "f1_interval": metrics["fedrx"]["intervals"]["f1"],
            "expected_calibration_error": metrics["fedrx"]
            .get("calibration", {})
            .get("expected_error"),
            "others_f1": {model: one["f1"] for model, one in metrics.items() if model != "fedrx"},
        },
    }


def main() -> None:
    """Try what has not been tried, a row at a time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default=",".join(TRIALS))
    parser.add_argument("--methods", default="scored,formulary,greedy")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--run", type=Path)
    parser.add_argument("--name", default="run")
    parser.add_argument("--cost", type=int, default=0)
    options = parser.parse_args()
    kept = json.loads(options.out.read_text()) if options.out.exists() else {}
    rows: list[dict[str, Any]] = kept.setdefault("trials", [])
    methods = [name for name in options.methods.split(",") if name]
    for name in [options.name] if options.run else options.only.split(","):
        if any(row["name"] == name for row in rows):
            continue
        print(name, flush=True)
        rows.append(
            finished(options.run, name, methods, options.cost)
            if options.run
            else tried(name, methods, options.set)
        )
        write_json(options.out, kept)
        print(json.dumps(rows[-1]), flush=True)


if __name__ == "__main__":
    main()
