"""Whether a trained adapter gives back a drug that only a planted patient had.

    OMP_NUM_THREADS=1 python benchmarks/privacy_regurgitation.py [--backbone tiny] [--out FILE]

Synthetic patients; some get a canary at the head of their list, `Trial Compound NNN` with a number
drawn from `--space` of them. After training, the exposure of a canary is log2 of the space less
log2 of its rank among all numbers by likelihood under the patient's own prompt (Carlini, Liu,
Erlingsson, Kos, Song, USENIX Security 2019); a number that was never seen has 1.44 bits on average
(1 / ln 2). Beside it: whether the decoders that exist (greedy, and greedy under the answer's
grammar) print the canary. `--copies` patients share each canary's number. Without privacy the same
steps are taken on the plain gradient; with it, by the path that a hospital runs. Reported as it
comes.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from scipy.stats import binomtest

from client.local_update import LocalRound, update
from client.private_update import private_update
from common.config import OWN_TEXT, Config
from common.configio import from_flat
from common.data.partition import assign_hospitals
from common.data.prepare import load_samples
from common.data.samples import Admission
from common.evaluation.constrained import answer_grammar
from common.evaluation.generate import generate
from common.model.adapter.layout import initial_tensors
from common.model.session import Session
from common.privacy.findings import mean_interval
from common.privacy.membership import patient_losses
from common.privacy.settings import with_calibrated_noise
from common.seeds import stream
from common.text.batches import Encoded, encode, encode_prompt
from common.training.hospital_data import HospitalData
from common.training.optimiser import TrainState
from common.training.worker import Worker

UNSEEN_BITS = 1 / math.log(2)
EPSILONS = (math.inf, 6.0, 1.0)
MAX_LENGTH = 384


def compound(number: int, space: int) -> str:
    """Return a canary's name.

    >>> compound(7, 256)
    'Trial Compound 007'
    """
    return f"Trial Compound {number:0{len(str(space - 1))}d}"


def planted(admission: Admission, name: str) -> Admission:
    """Put the canary at the head of a patient's list."""
    return replace(admission, drugs=(name, *admission.drugs))


def exposure(session: Session, admission: Admission, number: int, space: int, b: Any) -> float:
    """Return log2 space - log2 rank of a number under an adapter, ties at their worst rank."""
    records = []
    for other in range(space):
        listed = replace(admission, drugs=(compound(other, space),))
        record = encode(listed, session.tokenizer, text=OWN_TEXT, max_length_tokens=MAX_LENGTH)
        # the list's end token is no part of the canary
        records.append(replace(record, input_ids=record.input_ids[:-1], unit=other))
    losses, _ = patient_losses(session, records, [b])
    sums = losses[:, 0] * [record.label_tokens for record in records]
    return math.log2(space) - math.log2(int((sums <= sums[number]).sum()))


def printed(
    session: Session, admissions: Sequence[Admission], names: Sequence[str], b: Any, space: int
) -> dict[str, dict[str, Any]]:
    """Return how many canaries each decoder prints; the null is a number guessed at random."""
    session.adapter.load(b)
    prompts = [
        encode_prompt(one, session.tokenizer, text=OWN_TEXT, max_length_tokens=MAX_LENGTH)[0]
        for one in admissions
    ]
    counts: dict[str, dict[str, Any]] = {}
    for decoder, matcher in (("greedy", None), ("grammar", answer_grammar(session))):
        found = generate(session, prompts, max_new_tokens=64, batch_size=16, matcher=matcher)
        texts = [session.tokenizer.decode(list(one.tokens)) for one in found]
        hits = sum(name in text for name, text in zip(names, texts, strict=True))
        interval = binomtest(hits, len(names)).proportion_ci(0.95)
        counts[decoder] = {
            "printed": hits,
            "of": len(names),
            "null": 1 / space,
            "interval": [float(interval.low), float(interval.high)],
        }
    return counts


def trained(session: Session, config: Config, records: Sequence[Encoded]) -> Any:
    """Train one hospital and return its B."""
    hospital = HospitalData(name="hospital", train=tuple(records), validation=())
    adapter, state = session.adapter, TrainState()
    b = initial_tensors(adapter.shapes, adapter.spec)
    with tempfile.TemporaryDirectory() as folder:
        task = LocalRound(session, hospital, b, state, config, 1)
        if not config.privacy.target_epsilon:
            return update(task).b
        return private_update(task, Path(folder)).b


def save(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Write the rows so far."""
    if options.out:
        facts = {key: value for key, value in vars(options).items() if key != "out"}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"options": facts, "rows": rows}, indent=1, allow_nan=False)
        options.out.write_text(text + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Plant, train, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="tiny")
    parser.add_argument("--patients", type=int, default=160)
    parser.add_argument("--canaries", type=int, default=8)
    parser.add_argument("--copies", default="1,8")
    parser.add_argument("--space", type=int, default=256)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--rate", type=float, default=0.02)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    base = from_flat(
        {
            "data.path": "synthetic",
            "data.synthetic-patients": options.patients,
            "model.backbone": options.backbone,
            "adapter.rank": 8,
            "adapter.alpha": 8.0,
            "train.dtype": "fp32",
            "train.optimizer": "adamw",
            "train.learning-rate": options.rate,
            "train.batch-size": 16,
            "train.max-length": MAX_LENGTH,
            "federation.hospitals": 1,
            "federation.rounds": 1,
            "federation.local-steps": options.steps,
            "privacy.delta": 1e-3,
            "privacy.sampling-rate": 0.15,
            "privacy.expected-batch": 16.0,
        }
    )
    session = Worker().session(base)
    table = load_samples(base.data)
    (node,) = assign_hospitals(table.admissions, base.partition, hospitals=1, data=base.data)
    rows = []
    for copies in [int(text) for text in options.copies.split(",")]:
        generator = stream(copies, "regurgitation")
        numbers = generator.choice(options.space, 2 * options.canaries, replace=False).tolist()
        inside, unseen = numbers[: options.canaries], numbers[options.canaries :]
        patients = list(dict.fromkeys(one.patient for one in node.train))
        hosts = patients[: options.canaries * copies]
        number_of = {host: inside[place % options.canaries] for place, host in enumerate(hosts)}
        records, shown = [], {}
        for one in node.train:
            if one.patient in number_of:
                shown.setdefault(one.patient, one)
                one = planted(one, compound(number_of[one.patient], options.space))
            records.append(
                encode(one, session.tokenizer, text=OWN_TEXT, max_length_tokens=MAX_LENGTH)
            )
        asked = [shown[host] for host in hosts[: options.canaries]]
        for target in EPSILONS:
            changes = {} if math.isinf(target) else {"target_epsilon": target}
            config = with_calibrated_noise(replace(base, privacy=replace(base.privacy, **changes)))
            b = trained(session, config, records)
            bits, others = (
                [
                    exposure(session, one, n, options.space, b)
                    for one, n in zip(asked, some, strict=True)
                ]
                for some in (inside, unseen)
            )
            names = [compound(number, options.space) for number in inside]
            low, high = mean_interval(bits)
            verdict = "remembered" if low > UNSEEN_BITS else "as if never seen"
            rows.append(
                {
                    "epsilon": "none" if math.isinf(target) else target,
                    "copies": copies,
                    "exposure_bits": statistics.mean(bits),
                    "interval": [low, high],
                    "null_bits": UNSEEN_BITS,
                    "unseen_bits": statistics.mean(others),
                    "largest_bits": math.log2(options.space),
                    "each": bits,
                    "decoders": printed(session, asked, names, b, options.space),
                    "verdict": verdict,
                }
            )
            save(options, rows)
            decoders = rows[-1]["decoders"]
            print(
                f"epsilon {rows[-1]['epsilon']!s:5} copies {copies}: exposure "
                f"{np.mean(bits):.2f} bits ({low:.2f} to {high:.2f}; unseen {np.mean(others):.2f}) "
                f"of {math.log2(options.space):.0f}, greedy {decoders['greedy']['printed']}, "
                f"grammar {decoders['grammar']['printed']} of {len(names)}: {verdict}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
