"""What fp8 weights do to a trained backbone: B's gradients and losses beside bf16's and fp32's.

    python benchmarks/fp8_quality.py [--steps 100] [--json FILE]

On any machine: the values are e4m3's, as a card's would be; their products are summed in fp32,
where a card sums some of them less exactly. The embedded backbone and synthetic admissions. All
train from B = 0 on the same batches, fp32 beside them: bf16's distance from it is what rounding
costs anyway. Then gradients at the B that bf16 has trained, with rounding taken apart: of the
weights alone, with that of gradients, with that of activations, and of all three, which is what
`model.weights = fp8` does.
"""

import argparse
import json
import statistics
import sys
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
from common.model.kernels.elementwise import TORCH
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


def gradients(opening: Opened, b_P: Tensor) -> list[Tensor]:
    """Return the gradients of some batches at one B."""
    config, session, hospital = opening
    session.adapter.flat.copy_(b_P)
    source, found = BatchGradient(hospital.train, config.train, "gradients"), []
    for step in range(BATCHES):
        source(session, step)
        found.append(session.adapter.flat_grad.clone())
    return found


def round_only(session: Session, what: str) -> None:
    """Let fp8 weights, rounded themselves, round gradients ("g") and activations ("a") if named."""
    layers = [vars(one).get("weight") for one in session.model.modules()]

    def quantise(x_TD: Tensor, factors_D: Tensor | None) -> tuple[Tensor, Tensor]:
        # Gradients come with the weight's scales, activations without.
        if ("a" if factors_D is None else "g") in what:
            return TORCH.quantise(x_TD, factors_D)
        exact_TD = x_TD.float() if factors_D is None else x_TD.float() * factors_D
        return exact_TD, torch.ones(len(x_TD), 1)

    for weight in layers:
        if isinstance(weight, frozen.Fp8Weight):
            object.__setattr__(weight, "kernels", replace(TORCH, quantise=quantise))


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
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    formats = {"fp32": ("fp32", "bf16"), "bf16": ("bf16", "bf16"), "fp8": ("bf16", "fp8")}
    openings = {name: opened(*format_) for name, format_ in formats.items()}
    trained = {}
    curves: dict[str, list[float]] = {}
    for name, opening in openings.items():
        curves[name] = losses(opening, options.steps)
        trained[name] = opening[1].adapter.flat.clone()

    def loss_apart(name: str) -> dict[str, float]:
        pairs = list(zip(curves[name], curves["fp32"], strict=True))[:-1]
        apart = [abs(one / exact - 1) for one, exact in pairs]
        return {"median": statistics.median(apart), "largest": max(apart)}

    reference = gradients(openings["fp32"], trained["bf16"])

    def cosines(opening: Opened) -> dict[str, float]:
        pairs = zip(gradients(opening, trained["bf16"]), reference, strict=True)
        each = [float(torch.cosine_similarity(*pair, dim=0)) for pair in pairs]
        return {"median": statistics.median(each), "least": min(each)}

    found = {"bf16": cosines(openings["bf16"])}
    for name, what in ROUNDED.items():
        round_only(openings["fp8"][1], what)
        found[f"fp8, {name}"] = cosines(openings["fp8"])
    figures: dict[str, Any] = {
        "steps": options.steps,
        "norm of the trained B": float(trained["bf16"].norm()),
        "gradient's cosine to fp32's": found,
        "step's loss, relative to fp32's": {name: loss_apart(name) for name in ("bf16", "fp8")},
        "validation loss": {name: one[-1] for name, one in curves.items()},
    }
    print(json.dumps(figures, indent=2))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
