"""What the bedside costs: the baselines under each ``data.protocol``, and against the whole stay.

    OMP_NUM_THREADS=1 python benchmarks/protocols.py --data DIR --out FILE

Every admission is held out once (five folds of patients), and the baselines are fitted on the other
four. A protocol has other admissions and other lists than ``admission``, so what its task costs is
told beside ``admission`` on the same admissions alone, in the same folds. Intervals
are by bootstrap over patients.

The MIMIC-IV demo's 100 patients prove that the counts are right, and rank nothing.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from sklearn.model_selection import GroupKFold

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.config import DataConfig
from common.data.names import normalise_string
from common.data.prepare import load_samples
from common.data.protocols import ADMISSION, PROTOCOLS
from common.data.samples import Admission
from common.evaluation.baselines import BASELINES, Ranked
from common.evaluation.metrics import Estimate, interval_of_mean, score
from common.evaluation.ranking_metrics import average_precision
from common.files import write_json

FOLDS = 5
NOTE = (
    "Five folds by patient, all admissions of the source, no hospitals. The MIMIC-IV demo's 100 "
    "patients prove that the counts are right, and rank nothing."
)


def folds(patients: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Return places to fit on and to ask about, five times; a patient is in one fold."""
    rows = np.arange(len(patients))
    split = GroupKFold(FOLDS, shuffle=True, random_state=0).split(rows, groups=patients)
    return [(train.tolist(), test.tolist()) for train, test in split]


def answered(admissions: Sequence[Admission]) -> dict[str, dict[str, Any]]:
    """Return every baseline's figures over all folds together."""
    patients = [one.patient for one in admissions]
    found: dict[str, list[Ranked | None]] = {name: [None] * len(admissions) for name in BASELINES}
    for train, test in folds(patients):
        asked = [admissions[place] for place in test]
        for name, baseline in BASELINES.items():
            ranked = baseline([admissions[place] for place in train], asked)
            for place, one in zip(test, ranked, strict=True):
                found[name][place] = one
    return {
        name: figures(admissions, [one for one in ranked if one is not None])
        for name, ranked in found.items()
    }


def figures(admissions: Sequence[Admission], ranked: Sequence[Ranked]) -> dict[str, Any]:
    """Return F1, Jaccard and PRAUC with their intervals, and the mean length of a list."""
    rows = [
        SimpleNamespace(cluster=one.patient, truth=one.drugs, answer=given.listed)
        for one, given in zip(admissions, ranked, strict=True)
    ]
    estimates = score(rows, level="string", vocabulary=frozenset()).estimates
    precisions = []
    for one, given in zip(admissions, ranked, strict=True):
        true = set(map(normalise_string, one.drugs))
        hits = [normalise_string(name) in true for name in given.drugs]
        precisions.append(average_precision(hits, len(true)))
    patients = [one.patient for one in admissions]
    prauc = interval_of_mean(precisions, patients, resamples=1000, seed=0)
    return {
        **{key: rounded(estimates[key]) for key in ("f1", "jaccard")},
        "prauc": rounded(prauc),
        "drugs_per_list": round(sum(len(one.listed) for one in ranked) / len(ranked), 2),
    }


def rounded(estimate: Estimate) -> dict[str, float | None]:
    """Return an estimate in three digits."""
    values = {"value": estimate.value, "low": estimate.low, "high": estimate.high}
    return {key: None if value is None else round(value, 3) for key, value in values.items()}


def row(protocol: str, of: str, admissions: Sequence[Admission]) -> dict[str, Any]:
    """Return one line of the table: a task on some admissions."""
    lengths = [len(one.drugs) for one in admissions]
    return {
        "protocol": protocol,
        "admissions_of": of,
        "samples": len(admissions),
        "patients": len({one.patient for one in admissions}),
        "drugs_true": round(sum(lengths) / len(lengths), 2),
        "baselines": answered(admissions),
    }


def table(path: str) -> list[dict[str, Any]]:
    """Return the lines: each protocol, and ``admission`` on the same admissions."""
    samples = {
        protocol: load_samples(DataConfig(path=path, protocol=protocol)).admissions
        for protocol in PROTOCOLS
    }
    whole = {one.admission: one for one in samples[ADMISSION]}
    lines = []
    for protocol, admissions in samples.items():
        # What has no diagnoses is no sample of the whole stay.
        shared = [one for one in admissions if one.admission in whole]
        lines.append(row(protocol, protocol, shared))
        if protocol != ADMISSION:
            lines.append(row(ADMISSION, protocol, [whole[one.admission] for one in shared]))
    return lines


def main() -> None:
    """Write the lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="synthetic", help="folder of MIMIC-IV, or synthetic")
    parser.add_argument("--out", type=Path, required=True, help="results file")
    options = parser.parse_args()
    lines = table(options.data)
    write_json(options.out, {"note": NOTE, "folds": FOLDS, "tasks": lines})
    for line in lines:
        shown = ", ".join(
            f"{name} {one['f1']['value']:.3f} ({one['prauc']['value']:.3f})"
            for name, one in line["baselines"].items()
        )
        print(
            f"{line['protocol']} on the {line['samples']} admissions of {line['admissions_of']}, "
            f"{line['drugs_true']:.1f} drugs: F1 (PRAUC) {shown}"
        )


if __name__ == "__main__":
    main()
