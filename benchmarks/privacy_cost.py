"""What differential privacy costs a step, beside Opacus, in one process.

    OMP_NUM_THREADS=1 python benchmarks/privacy_cost.py [--backbone tiny] [--json]

Every contestant computes a gradient of B on the same samples. `ours, plain` is the non-private
step; the private ones give every sample's gradient, clip it and add noise. Ours keeps units apart
within a pass (see `common/privacy/mechanism/isolation.py`). FLOPs are counted exactly
(torch.utils.flop_counter); time is process CPU time on one thread, contestants interleaved round by
round, the median of each round's ratio to that round's plain step. On a busy machine read the
ratios, not the seconds.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import peft
import torch
from opacus import GradSampleModule
from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import (
    GradSampleModuleFastGradientClipping,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

from common.config import TrainConfig
from common.model.adapter.falora import AdapterSpec
from common.model.backbone.load import BackboneSpec, resolve_backbone
from common.model.backbone.tiny import tiny_model
from common.model.session import Session, open_session
from common.privacy.mechanism.clipping import clipped_sum
from common.privacy.mechanism.gradients import PrivateGradient
from common.privacy.mechanism.noise import NoiseSource
from common.privacy.plan import PrivacyPlan
from common.text.batches import Encoded, pack
from common.training.gradients import BatchGradient
from common.training.loss import weighted_cross_entropy

RANK = 16
CLIP = 1.0
ANSWER_SHARE = 0.19
GOALS = {"flops": 1.005, "seconds": 1.05}
PLAIN = "ours, plain"
Step = Callable[[], object]


def samples(lengths: Sequence[int], vocabulary: int) -> list[Encoded]:
    """Draw samples of random tokens, one patient each."""
    generator = np.random.default_rng(0)
    return [
        Encoded(
            input_ids=tuple(generator.integers(3, vocabulary // 4, size=length).tolist()),
            answer_start=round(length * (1 - ANSWER_SHARE)),
            unit=place,
        )
        for place, length in enumerate(lengths)
    ]


def plan_for(batch: int) -> PrivacyPlan:
    """Everyone takes part, so that all contestants work on the same samples."""
    return PrivacyPlan(
        clip_norm=CLIP,
        noise_multiplier=1.0,
        sampling_rate=1.0,
        steps=1000,
        expected_batch=batch,
        max_admissions_per_patient=1,
        delta=1e-5,
    )


def ours(session: Session, dataset: list[Encoded], micro_batch: int) -> Step:
    """The private source: unit gradients, clipping, the discrete Gaussian."""
    source = PrivateGradient(
        dataset, plan_for(len(dataset)), NoiseSource(), seed=0, micro_batch=micro_batch
    )
    return lambda: source(session, 0)


class Peer:
    """PEFT's LoRA with frozen A, under one of Opacus' wrappers or bare."""

    def __init__(self, spec: BackboneSpec, dtype: torch.dtype, dataset: list[Encoded]) -> None:
        if spec.folder is None:
            model = tiny_model().to(dtype)
        else:
            model = LlamaForCausalLM.from_pretrained(
                spec.folder, dtype=dtype, trust_remote_code=False
            )
        config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["q_proj", "v_proj"])
        self.model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_("lora_B" in name)
        self.model.train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.ids = torch.tensor([sample.input_ids for sample in dataset])
        self.batch = pack(dataset)
        self.head = self.model.get_base_model().lm_head.weight
        counts_S = torch.bincount(self.batch.label_segments_N)
        self.weights_N = (1.0 / counts_S)[self.batch.label_segments_N]

    def hidden(self) -> Tensor:
        """Return the hidden states that predict a label."""
        core = self.model.get_base_model().model
        hidden_BTD = core(input_ids=self.ids, use_cache=False).last_hidden_state
        return hidden_BTD.flatten(0, 1)[self.batch.label_positions_N]

    def loss(self, hidden_ND: Tensor, factors_S: Tensor | None = None) -> Tensor:
        """Return the sum of every sample's mean loss, each times its factor."""
        weights_N = self.weights_N
        if factors_S is not None:
            weights_N = weights_N * factors_S[self.batch.label_segments_N]
        return weighted_cross_entropy(hidden_ND, self.head, self.batch.labels_N, weights_N)[0]

    def forget(self) -> None:
        """Drop gradients of the step before."""
        for parameter in self.parameters:
            parameter.grad = None
            if hasattr(parameter, "grad_sample"):
                parameter.grad_sample = None

    def plain(self) -> None:
        """One gradient, no privacy."""
        self.forget()
        self.loss(self.hidden()).backward()

    def noise(self) -> None:
        """Opacus' default noise: torch's generator."""
        for parameter in self.parameters:
            assert parameter.grad is not None
            parameter.grad.add_(torch.randn_like(parameter.grad), alpha=CLIP)

    def hooks(self) -> Step:
        """Opacus' hooks: every sample's gradient stored, then clipped."""
        GradSampleModule(self.model, loss_reduction="sum", strict=False)

        def step() -> None:
            self.forget()
            self.loss(self.hidden()).backward()
            rows_UP = torch.cat([p.grad_sample.flatten(1) for p in self.parameters], dim=1)
            total_P = clipped_sum(rows_UP, CLIP)
            sizes = [p.numel() for p in self.parameters]
            for parameter, part in zip(self.parameters, total_P.split(sizes), strict=True):
                parameter.grad = part.view_as(parameter).to(parameter.dtype)
            self.noise()

        return step

    def ghost(self) -> Step:
        """Opacus' ghost clipping: norms in a first backward pass, the sum in a second."""
        wrapped = GradSampleModuleFastGradientClipping(
            self.model, max_grad_norm=CLIP, loss_reduction="sum", strict=False
        )

        def step() -> None:
            self.forget()
            wrapped.enable_hooks()
            hidden_ND = self.hidden()
            self.loss(hidden_ND).backward(retain_graph=True)
            factors_S = wrapped.get_clipping_coef().detach().float()
            self.forget()
            wrapped.disable_hooks()
            self.loss(hidden_ND, factors_S).backward()
            self.noise()

        return step


def measure(contestants: dict[str, Step], rounds: int) -> dict[str, dict[str, float]]:
    """Count FLOPs once, then time the contestants in turn."""
    results: dict[str, dict[str, float]] = {}
    for name, step in contestants.items():
        step()
        with FlopCounterMode(display=False) as counter:
            step()
        results[name] = {"flops": counter.get_total_flops()}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, step in contestants.items():
            gc.collect()
            started = time.process_time()
            step()
            seconds[name].append(time.process_time() - started)
    for name, row in results.items():
        ratios = [mine / plain for mine, plain in zip(seconds[name], seconds[PLAIN], strict=True)]
        row["cpu_seconds"] = statistics.median(seconds[name])
        row["flops_ratio"] = row["flops"] / results[PLAIN]["flops"]
        row["seconds_ratio"] = statistics.median(ratios)
    return results


def main(arguments: list[str] | None = None) -> int:
    """Run the comparison; exit status 1 where a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="embedded")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument(
        "--lengths", type=int, nargs="+", help="one sample of each, and ours alone: peers pad"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    spec = resolve_backbone(options.backbone)
    session = open_session(
        spec, AdapterSpec(rank=RANK), device="cpu", dtype=options.dtype, threads=1
    )
    lengths = options.lengths or [options.length] * options.batch
    dataset = samples(lengths, spec.shape.vocabulary)
    dtype = torch.bfloat16 if session.dtype.value == "bf16" else torch.float32
    plain = BatchGradient(dataset, TrainConfig(batch_size=len(dataset)), "benchmark")
    contestants: dict[str, Step] = {
        PLAIN: lambda: plain(session, 0),
        "ours, private": ours(session, dataset, len(dataset)),
        "ours, micro-batch 1": ours(session, dataset, 1),
    }
    if not options.lengths:
        contestants |= {
            "PEFT frozen A, plain": Peer(spec, dtype, dataset).plain,
            "Opacus hooks": Peer(spec, dtype, dataset).hooks(),
            "Opacus ghost": Peer(spec, dtype, dataset).ghost(),
        }
    results = measure(contestants, options.rounds)
    private = results["ours, private"]
    met = {goal: private[f"{goal}_ratio"] <= limit for goal, limit in GOALS.items()}
    environment = {
        "backbone": spec.name,
        "dtype": asdict(session.dtype),
        "attention": asdict(session.attention),
        "lengths_tokens": lengths,
        "parameters": session.adapter.trainable_parameters,
        "torch": torch.__version__,
        "load_average": os.getloadavg()[0],
    }
    if options.json:
        print(json.dumps({"environment": environment, "results": results, "met": met}, indent=2))
    else:
        for name, row in results.items():
            print(
                f"{name:22} FLOPs x{row['flops_ratio']:.4f}  time x{row['seconds_ratio']:.3f}"
                f"  {row['cpu_seconds']:.3f} CPU-s a step"
            )
        print(environment)
        print("goals:", ", ".join(f"{g} {'met' if ok else 'missed'}" for g, ok in met.items()))
    return 0 if all(met.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
