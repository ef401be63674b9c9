"""Training speed beside PEFT, in one process, as ratios of CPU time.

    OMP_NUM_THREADS=1 python benchmarks/training_speed.py [--compile] [--json]

C1: loss on all tokens. C2: loss on the answer only (19% of the tokens). C3: mixed lengths, real
tokens per second, packed against padded. Peers: PEFT LoRA in fp32; PEFT in bf16 with A frozen;
with --compile the same under torch.compile, and ours with `model.kernels = compiled`. One thread,
process CPU time, the contestants interleaved round by round, medians; every contestant computes the
same mean loss and the gradient of the same adapter. On a busy machine read the ratios, not the
rates.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import peft
import torch
from transformers import LlamaForCausalLM

from common.config import TrainConfig
from common.model.adapter.falora import AdapterSpec
from common.model.backbone.load import BackboneSpec, load_tokenizer, resolve_backbone
from common.model.session import Session, open_session
from common.text.batches import Encoded, pack
from common.training.gradients import BatchGradient
from common.training.loss import weighted_cross_entropy

RANK = 16
ANSWER_SHARE = 0.19
IGNORED = -100
OURS_COMPILED = "ours, compiled"
Step = Callable[[], float]


def samples(lengths: list[int], *, answer_share: float, vocabulary: int) -> list[Encoded]:
    """Draw samples of random tokens; the answer is the last ``answer_share`` of each."""
    generator = np.random.default_rng(0)
    return [
        Encoded(
            input_ids=tuple(generator.integers(3, vocabulary // 4, size=length).tolist()),
            answer_start=max(1, round(length * (1 - answer_share))),
            unit=place,
        )
        for place, length in enumerate(lengths)
    ]


def our_step(session: Session, dataset: list[Encoded]) -> Step:
    """One gradient of ours on the packed batch; returns the loss."""
    source = BatchGradient(dataset, TrainConfig(batch_size=len(dataset)), "benchmark")

    def step() -> float:
        result = source(session, 0)
        assert result.loss_sum is not None
        return result.loss_sum / result.label_tokens

    return step


def our_padded_step(session: Session, dataset: list[Encoded]) -> Step:
    """The same with every sample padded to the longest: what packing saves."""
    longest = max(len(sample.input_ids) for sample in dataset)
    padded = [
        replace(s, input_ids=s.input_ids + (2,) * (longest - len(s.input_ids))) for s in dataset
    ]
    real = pack(dataset)
    shift = torch.tensor([place * longest - start for place, start in enumerate(real.cu_seqlens)])
    batch = replace(
        pack(padded),
        label_positions_N=real.label_positions_N + shift[real.label_segments_N],
        labels_N=real.labels_N,
        label_segments_N=real.label_segments_N,
    )
    weights_N = torch.full((len(batch.labels_N),), 1.0 / len(batch.labels_N))

    def step() -> float:
        session.adapter.flat_grad.zero_()
        hidden_ND = session.hidden_states(batch)[batch.label_positions_N]
        head = session.model.lm_head.weight
        total, _ = weighted_cross_entropy(hidden_ND, head, batch.labels_N, weights_N)
        total.backward()
        return float(total)

    return step


def peft_model(
    spec: BackboneSpec, *, dtype: torch.dtype, freeze_a: bool, compiled: bool
) -> torch.nn.Module:
    """Build PEFT's LoRA on transformers' model, in training mode."""
    model = LlamaForCausalLM.from_pretrained(spec.folder, dtype=dtype, trust_remote_code=False)
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["q_proj", "v_proj"])
    wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=dtype == torch.float32)
    for name, parameter in wrapped.named_parameters():
        if freeze_a and "lora_A" in name:
            parameter.requires_grad_(False)
    wrapped.train()
    return torch.compile(wrapped) if compiled else wrapped


def peft_step(model: torch.nn.Module, dataset: list[Encoded]) -> Step:
    """One gradient of PEFT's on the padded batch, labels -100 where there is no loss."""
    longest = max(len(sample.input_ids) for sample in dataset)
    ids = torch.full((len(dataset), longest), 2)
    labels = torch.full_like(ids, IGNORED)
    mask = torch.zeros_like(ids)
    for row, sample in enumerate(dataset):
        tokens = torch.tensor(sample.input_ids)
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
        labels[row, sample.answer_start : len(tokens)] = tokens[sample.answer_start :]
    padding = {} if bool(mask.all()) else {"attention_mask": mask}

    def step() -> float:
        model.zero_grad()
        loss = model(input_ids=ids, labels=labels, use_cache=False, **padding).loss
        loss.backward()
        return float(loss)

    return step


def first_layers(spec: BackboneSpec, layers: int, folder: Path) -> BackboneSpec:
    """Save a shallower backbone: the same shapes, for a machine short of memory or time."""
    model = LlamaForCausalLM.from_pretrained(
        spec.folder, dtype=torch.bfloat16, trust_remote_code=False
    )
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    model.save_pretrained(folder)
    load_tokenizer(spec).save_pretrained(folder)
    return resolve_backbone(str(folder))


def medians(contestants: dict[str, Step], rounds: int) -> dict[str, dict[str, float]]:
    """Run the contestants in turn; median CPU seconds of a step, and the loss."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    losses = {name: step() for name, step in contestants.items()}
    for _ in range(rounds):
        for name, step in contestants.items():
            gc.collect()
            started = time.process_time()
            step()
            seconds[name].append(time.process_time() - started)
    return {
        name: {"cpu_seconds": statistics.median(seconds[name]), "loss": losses[name]}
        for name in contestants
    }


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backbone", default="embedded")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--layers", type=int, default=0, help="only the first layers; 0: all")
    parser.add_argument("--goals", default="C1,C2,C3", help="comma-separated")
    parser.add_argument("--compile", action="store_true", help="add torch.compile (minutes)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    spec = resolve_backbone(options.backbone)
    if options.layers:
        scratch = tempfile.TemporaryDirectory()
        spec = first_layers(spec, options.layers, Path(scratch.name))
    kinds = {"ours": "torch"} | ({OURS_COMPILED: "compiled"} if options.compile else {})
    sessions = {
        name: open_session(spec, AdapterSpec(rank=RANK), device="cpu", threads=1, kernels=kind)
        for name, kind in kinds.items()
    }
    session = sessions["ours"]
    peers = {
        "PEFT fp32": peft_model(spec, dtype=torch.float32, freeze_a=False, compiled=False),
        "PEFT bf16 frozen A": peft_model(spec, dtype=torch.bfloat16, freeze_a=True, compiled=False),
    }
    if options.compile:
        peers["same, torch.compile"] = peft_model(
            spec, dtype=torch.bfloat16, freeze_a=True, compiled=True
        )
    equal = [options.length] * options.batch
    mixed = [round(options.length * share) for share in (1.0, 0.28, 0.55, 0.17, 0.4, 0.33)]
    vocabulary = spec.shape.vocabulary
    results = {}
    for goal, lengths, share in (
        ("C1 all tokens", equal, 0.999),
        ("C2 answer only", equal, ANSWER_SHARE),
        ("C3 mixed lengths", mixed, ANSWER_SHARE),
    ):
        if goal[:2] not in options.goals.split(","):
            continue
        dataset = samples(lengths, answer_share=share, vocabulary=vocabulary)
        contestants = {name: our_step(one, dataset) for name, one in sessions.items()}
        if lengths is mixed:
            contestants["ours, padded"] = our_padded_step(session, dataset)
        contestants |= {name: peft_step(model, dataset) for name, model in peers.items()}
        measured = medians(contestants, options.rounds)
        for row in measured.values():
            row["tokens_per_cpu_second"] = sum(lengths) / row["cpu_seconds"]
            row["ours_is_faster_by"] = row["cpu_seconds"] / measured["ours"]["cpu_seconds"]
            if OURS_COMPILED in measured:
                compiled = measured[OURS_COMPILED]["cpu_seconds"]
                row["ours_compiled_is_faster_by"] = row["cpu_seconds"] / compiled
        results[goal] = measured
        if not options.json:
            show(goal, measured)
    environment = {
        "backbone": options.backbone,
        "layers": spec.shape.layers,
        "dtype": asdict(session.dtype),
        "attention": asdict(session.attention),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
    }
    if options.json:
        print(json.dumps({"environment": environment, "results": results}, indent=2))
        return
    print(environment)


def show(goal: str, measured: dict[str, dict[str, float]]) -> None:
    """Print one goal's contestants."""
    print(f"\n{goal}")
    for name, row in measured.items():
        compiled = row.get("ours_compiled_is_faster_by")
        print(
            f"  {name:22} {row['tokens_per_cpu_second']:8.0f} tokens/CPU-s"
            f"  ours x{row['ours_is_faster_by']:.2f}"
            + (f", compiled x{compiled:.2f}" if compiled else "")
            + f"  loss {row['loss']:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
