"""What fp8 weights do to a trained backbone: B's gradients and losses beside bf16's and fp32's.

    python benchmarks/fp8_quality.py [--steps 200] [--json FILE]

On any machine: the values are e4m3's, as a card's would be; their products are computed in fp32.
The embedded backbone, synthetic admissions, a B of a trained size. Rounding is taken apart: of the
weights alone, with that of gradients, with that of activations, and of all three, which is what
`model.weights = fp8` does. Then both formats train from B = 0 on the same batches.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from gpu_measure import patched
from torch import Tensor

from common.config import Config
from common.configio import from_flat
from common.model.kernels import frozen
from common.model.session import Session
from common.training.gradients import BatchGradient
from common.training.hospital_data import HospitalData
from common.training.loop import TrainState, train, validation_loss
from common.training.worker import Worker

SETTINGS = {
    "model.backbone": "embedded",
    "data.path": "synthetic",
    "data.synthetic-patients": 300,
    "train.optimizer": "adamw",
    "train.learning-rate": 0.01,
    "train.batch-size": 2,
    "train.max-length": 512,
    "federation.hospitals": 1,
    "evaluation.validation-samples": 24,
}
ROUNDED = {"weights": "", "weights, gradients": "g", "weights, activations": "a", "all": "ga"}
BATCHES = 8
Opened = tuple[Config, Session, HospitalData]


def opened(dtype: str, weights: str) -> Opened:
    """Open the backbone in an arithmetic and a format, with one hospital's samples."""
    worker = Worker()
    with patched(frozen, "fp8_obstacle", lambda *_: ""):
        config = from_flat({**SETTINGS, "train.dtype": dtype, "model.weights": weights})
        (hospital,) = worker.data(config).hospitals
        return config, worker.session(config), worker.tokens(config, hospital)


def gradients(config: Config, session: Session, hospital: HospitalData) -> list[Tensor]:
    """Return the gradients of some batches at one B."""
    session.adapter.flat.normal_(0.0, 0.01, generator=torch.Generator().manual_seed(1))
    source, found = BatchGradient(hospital.train, config.train, "gradients"), []
    for step in range(BATCHES):
        source(session, step)
        found.append(session.adapter.flat_grad.clone())
    return found


def round_only(session: Session, what: str) -> Callable[[], None]:
    """Let fp8 weights round gradients ("g") and activations ("a") only where named."""
    layers = [vars(one).get("weight") for one in session.model.modules()]
    weights = [one for one in layers if isinstance(one, frozen.Fp8Weight)]
    whole = weights[0].kernels

    def quantise(x_TD: Tensor, factors_D: Tensor | None) -> tuple[Tensor, Tensor]:
        # Gradients come with the weight's scales, activations without.
        if ("a" if factors_D is None else "g") in what:
            return whole.quantise(x_TD, factors_D)
        exact_TD = x_TD.float() if factors_D is None else x_TD.float() * factors_D
        return exact_TD, torch.ones(len(x_TD), 1)

    def put(kernels: Any) -> None:
        for weight in weights:
            object.__setattr__(weight, "kernels", kernels)

    put(replace(whole, quantise=quantise))
    return lambda: put(whole)


def losses(opening: Opened, steps: int) -> list[float]:
    """Train from B = 0; returns each step's loss, and the validation loss at the end."""
    config, session, hospital = opening
    session.adapter.flat.zero_()
    found: list[float] = []
    train(
        session,
        hospital.train,
        config.train,
        TrainState(),
        steps=steps,
        schedule_steps=steps,
        stream="losses",
        on_step=lambda report: found.append(float(report.loss or 0.0)),
    )
    return [*found, validation_loss(session, hospital.validation).mean]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    reference = gradients(*opened("fp32", "bf16"))

    def cosines(found: list[Tensor]) -> dict[str, float]:
        pairs = zip(found, reference, strict=True)
        each = [float(torch.cosine_similarity(*pair, dim=0)) for pair in pairs]
        return {"median": statistics.median(each), "least": min(each)}

    bf16, fp8 = opened("bf16", "bf16"), opened("bf16", "fp8")
    figures: dict[str, Any] = {"cosine to fp32": {"bf16": cosines(gradients(*bf16))}}
    for name, what in ROUNDED.items():
        whole_again = round_only(fp8[1], what)
        figures["cosine to fp32"][name] = cosines(gradients(*fp8))
        whole_again()
    print(json.dumps(figures, indent=2), flush=True)
    both = {name: losses(one, options.steps) for name, one in (("bf16", bf16), ("fp8", fp8))}
    apart = [abs(a / b - 1) for a, b in zip(both["fp8"], both["bf16"], strict=True)]
    figures |= {
        "steps": options.steps,
        "loss apart, largest": max(apart[:-1]),
        "loss apart, median": statistics.median(apart[:-1]),
        "validation loss": {name: one[-1] for name, one in both.items()},
    }
    print(json.dumps(figures, indent=2))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
