"""A first science table: FA-LoRA against LoRA under patient-level privacy, on synthetic data.

    OMP_NUM_THREADS=1 python benchmarks/privacy_utility.py [--backbone tiny] [--out FILE]

One node, one plan per epsilon, the same for both adapters: sampling rate, steps, expected batch,
clip norm and rank are equal, and so is the noise multiplier. Every adapter and epsilon gets its
own learning rate, the best of a grid on tuning seeds that the table does not use (the data is
synthetic, so tuning spends nothing). The figure is the loss per answer token on validation
patients after the last step; mean and standard deviation over seeds. It is reported as it comes.
"""

import argparse
import json
import math
import statistics
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.config import OWN_TEXT, DataConfig, PartitionConfig, TrainConfig
from common.data.partition import assign_hospitals
from common.data.prepare import load_samples
from common.model.adapter.falora import AdapterSpec
from common.model.backbone.load import resolve_backbone
from common.model.session import Session, open_session
from common.privacy.accounting import calibrate
from common.privacy.mechanism.gradients import PrivateGradient
from common.privacy.mechanism.noise import NoiseSource
from common.privacy.plan import PrivacyPlan
from common.text.batches import Encoded, encode
from common.training.gradients import StepLoss
from common.training.loop import TrainState, train, validation_loss

MODES = ("fa-lora", "lora")
EPSILONS = (1.0, 3.0, 6.0, math.inf)
TUNING_SEED = 1000
PLAN = PrivacyPlan(
    clip_norm=1.0,
    noise_multiplier=None,
    sampling_rate=0.25,
    steps=40,
    expected_batch=40,
    max_admissions_per_patient=2,
    delta=1e-3,
)


class Unnoised(PrivateGradient):
    """Without privacy: the same Poisson draw, clipping and divisor, and no noise."""

    def __call__(self, session: Session, step: int) -> StepLoss:
        """Write the clipped mean gradient."""
        sum_P = self.clipped_sum(session, self.units.draw(self.plan, self.noise))
        session.adapter.flat_grad.copy_(sum_P / self.plan.expected_batch)
        return StepLoss(loss_sum=None, label_tokens=0, packed_tokens=0)


def data(session: Session, patients: int, max_length: int) -> tuple[list[Encoded], list[Encoded]]:
    """Return training and validation samples of the synthetic source, as tokens."""
    source = DataConfig(synthetic_patients=patients)
    table = load_samples(source)
    (node,) = assign_hospitals(table.admissions, PartitionConfig(), hospitals=1, data=source)
    return tuple(  # type: ignore[return-value]
        [
            encode(one, session.tokenizer, text=OWN_TEXT, max_length_tokens=max_length)
            for one in split
        ]
        for split in (node.train, node.validation)
    )


def run(
    session: Session,
    start: dict,
    samples: tuple[list[Encoded], list[Encoded]],
    plan: PrivacyPlan | None,
    rate: float,
    seed: int,
    micro_batch: int,
) -> float:
    """Train from the start and return the validation loss."""
    session.adapter.load(start)
    kind = Unnoised if plan is None else PrivateGradient
    chosen = plan or PLAN.with_noise(1.0)
    source = kind(samples[0], chosen, NoiseSource(), seed=seed, micro_batch=micro_batch)
    config = TrainConfig(optimizer="adamw", learning_rate=rate, seed=seed, schedule="linear")
    train(
        session,
        samples[0],
        config,
        TrainState(),
        steps=chosen.steps,
        schedule_steps=chosen.steps,
        stream="single",
        source=source,
    )
    return validation_loss(session, samples[1]).mean


def main(arguments: list[str] | None = None) -> int:
    """Tune, run, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="tiny")
    parser.add_argument("--patients", type=int, default=240)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rates", default="0.003,0.01,0.03,0.1,0.3,1")
    parser.add_argument("--max-length", type=int, default=384)
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--micro-batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=PLAN.steps)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    rates = [float(text) for text in options.rates.split(",")]
    spec = resolve_backbone(options.backbone)
    blank = replace(PLAN, steps=options.steps)
    plans = {e: None if math.isinf(e) else calibrate(blank, e) for e in EPSILONS}
    rows = []
    for mode in MODES:
        opened: dict[int, tuple[Session, dict]] = {}
        samples = None

        def at(seed: int, mode: str = mode, opened: dict = opened) -> tuple[Session, dict]:
            if seed not in opened:
                adapter = AdapterSpec(rank=options.rank, alpha=options.rank, seed=seed, mode=mode)
                session = open_session(spec, adapter, device="cpu", dtype=options.dtype, threads=1)
                opened[seed] = (session, session.adapter.state())
            return opened[seed]

        session, _ = at(TUNING_SEED)
        samples = data(session, options.patients, options.max_length)
        untrained = validation_loss(session, samples[1]).mean
        for target, plan in plans.items():
            tuned = {
                rate: run(*at(TUNING_SEED), samples, plan, rate, TUNING_SEED, options.micro_batch)
                for rate in rates
            }
            rate = min(tuned, key=tuned.__getitem__)
            losses = [
                run(*at(seed), samples, plan, rate, seed, options.micro_batch)
                for seed in range(options.seeds)
            ]
            row = {
                "adapter": mode,
                "epsilon": "none" if plan is None else target,
                "noise_multiplier": 0.0 if plan is None else plan.sigma,
                "parameters": session.adapter.trainable_parameters,
                "learning_rate": rate,
                "tuned": {f"{tried:g}": loss for tried, loss in tuned.items()},
                "untrained": untrained,
                "loss": statistics.mean(losses),
                "spread": statistics.stdev(losses) if len(losses) > 1 else 0.0,
                "losses": losses,
            }
            rows.append(row)
            print(
                f"{mode:8} epsilon {row['epsilon']!s:5} P {row['parameters']:6} "
                f"rate {rate:g}  loss {row['loss']:.4f} +- {row['spread']:.4f} "
                f"(untrained {untrained:.4f})",
                flush=True,
            )
    if options.out:
        facts = {key: value for key, value in vars(options).items() if key != "out"}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"options": facts, "rows": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
