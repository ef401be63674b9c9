"""The paper's training step at full size on a GPU, with random weights: memory, speed, agreement.

    python benchmarks/gpu_paper_run.py [--cap-gib 48] [--json FILE]
    python benchmarks/gpu_paper_run.py --tiny            (any machine: does it run at all)

Builds the shape of Llama-3.1-8B on the card, caps memory at 48 GiB (the paper's card), and takes
paper-shaped steps: batch 4 x 2048 and mixed lengths, rank 16 and 32, SGD, loss on the answer.
Beside it, transformers + PEFT + gradient checkpointing on the same samples, padded. It needs
torch, transformers and peft, and no network.

Prints, per case: peak memory beside what `fedrx plan` foresees, real tokens per second, the
attention kernel, the share of the card's own matrix-product rate; and how far outputs and
gradients are from eager attention.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import peft
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from common.choice import Choice
from common.config import TrainConfig
from common.model.adapter.falora import AdapterSpec, attach
from common.model.backbone.known_shapes import KNOWN_SHAPES
from common.model.backbone.load import BackboneShape, BackboneSpec
from common.model.backbone.tiny import tiny_config
from common.model.footprint import count_parameters, training_footprint
from common.model.kernels import fused_layer as lean
from common.model.kernels.attention import choose_attention, register
from common.model.memory import choose_recompute
from common.model.session import Session, choose_device, choose_dtype
from common.text.batches import Encoded, pack
from common.training.gradients import BatchGradient
from common.training.loop import TrainState, train

LLAMA_8B = "meta-llama/Llama-3.1-8B-Instruct"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ANSWER_SHARE = 0.19
MIXED_SHARES = (1.0, 0.55, 0.35, 0.2)
IGNORED = -100


def random_llama(shape: BackboneShape, device: torch.device, dtype: torch.dtype) -> Any:
    """Build a Llama of this shape on the device, in its dtype from the start."""
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    model = model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
    # to_empty leaves buffers unset.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    model.tie_weights()
    return model.eval().requires_grad_(False)


def open_random(
    shape: BackboneShape, rank: int, options: argparse.Namespace, batch_tokens: int
) -> Session:
    """Open a session as ``open_session`` does, on random weights instead of loaded ones."""
    device = choose_device(options.device)
    on = torch.device(device.value)
    dtype = choose_dtype(options.dtype, on)
    attention = choose_attention(options.attention, on, DTYPES[dtype.value])
    model = random_llama(shape, on, DTYPES[dtype.value])
    model.set_attn_implementation(register())
    spec = AdapterSpec(rank=rank, alpha=16.0)
    adapter = attach(model, spec)
    recompute = choose_recompute(
        options.recompute,
        shape=shape,
        adapter=spec,
        value_bytes=DTYPES[dtype.value].itemsize,
        batch_tokens=batch_tokens,
        device=on,
    )
    lean.install(model, recompute.value)
    backbone = BackboneSpec(name="random", folder=None, hub_id="", fingerprint="", shape=shape)
    return Session(
        spec=backbone,
        model=model,
        tokenizer=None,  # type: ignore[arg-type]  # tokens are drawn, never decoded
        adapter=adapter,
        device=device,
        dtype=dtype,
        attention=attention,
        recompute=recompute,
    )


def samples(lengths: Sequence[int], vocabulary: int) -> list[Encoded]:
    """Draw samples of random tokens whose last fifth is the answer."""
    draw = np.random.default_rng(0)
    return [
        Encoded(
            input_ids=tuple(draw.integers(3, vocabulary, size=length).tolist()),
            answer_start=max(1, round(length * (1 - ANSWER_SHARE))),
            unit=unit,
        )
        for unit, length in enumerate(lengths)
    ]


def measured(step: Callable[[], object], steps: int, device: torch.device) -> dict[str, Any]:
    """Warm up once, then time ``steps`` steps; the peak includes everything on the card."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    step()
    if on_gpu:
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(steps):
        step()
    if on_gpu:
        torch.cuda.synchronize(device)
    seconds = (time.perf_counter() - started) / steps
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else None
    reserved = torch.cuda.max_memory_reserved(device) if on_gpu else None
    return {"seconds": seconds, "peak_bytes": peak, "reserved_bytes": reserved}


def ours(session: Session, data: list[Encoded], steps: int) -> dict[str, Any]:
    """Time optimizer steps of the one training loop."""
    config = TrainConfig(batch_size=len(data), learning_rate=1e-3)
    state = TrainState()

    def step() -> None:
        train(session, data, config, state, steps=1, schedule_steps=1, stream="benchmark")

    found = measured(step, steps, session.torch_device)
    shape, adapter = session.spec.shape, session.adapter.spec
    planned = training_footprint(
        shape,
        adapter,
        batch_tokens=sum(len(one.input_ids) for one in data),
        value_bytes=DTYPES[session.dtype.value].itemsize,
        recompute=session.recompute.value,
        optimizer="sgd",
        device=session.torch_device.type,
    )
    # The context is the driver's, not torch's: it is in the plan but not in torch's peak.
    expected = planned.total - planned.runtime
    peak = found["peak_bytes"]
    return {
        **found,
        "planned_bytes": expected,
        "plan_over_peak": None if peak is None else expected / peak,
        "attention": asdict(session.attention),
        "recompute": asdict(session.recompute),
        "dtype": session.dtype.value,
    }


def beside(
    shape: BackboneShape, rank: int, data: list[Encoded], options: argparse.Namespace
) -> dict[str, Any]:
    """Time transformers + PEFT + gradient checkpointing on the padded batch."""
    device = torch.device(choose_device(options.device).value)
    dtype = DTYPES[choose_dtype(options.dtype, device).value]
    model = random_llama(shape, device, dtype)
    kernel = "sdpa"
    if device.type == "cuda" and transformers.utils.is_flash_attn_2_available():
        kernel = "flash_attention_2"
    model.set_attn_implementation(kernel)
    lora = peft.LoraConfig(r=rank, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    wrapped = peft.get_peft_model(model, lora, autocast_adapter_dtype=False)
    wrapped.gradient_checkpointing_enable({"use_reentrant": False})
    wrapped.enable_input_require_grads()
    wrapped.train()
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-3)
    longest = max(len(one.input_ids) for one in data)
    ids = torch.zeros(len(data), longest, dtype=torch.int64)
    labels, mask = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
    for row, one in enumerate(data):
        tokens = torch.tensor(one.input_ids)
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
        labels[row, one.answer_start : len(tokens)] = tokens[one.answer_start :]
    batch = {
        name: tensor.to(device)
        for name, tensor in (("input_ids", ids), ("labels", labels), ("attention_mask", mask))
    }

    def step() -> None:
        optimizer.zero_grad()
        wrapped(**batch, use_cache=False).loss.backward()
        optimizer.step()

    return {**measured(step, options.steps, device), "attention": kernel}


def agreement(session: Session, lengths: Sequence[int]) -> dict[str, float]:
    """Relative distance to eager attention: final hidden states, and the gradient of B."""
    data = samples(lengths, session.spec.shape.vocabulary)
    source = BatchGradient(data, TrainConfig(batch_size=len(data)), "agreement")
    # With B = 0 the loss does not depend on A's side at all: give B values of a trained size.
    generator = torch.Generator(session.torch_device).manual_seed(1)
    session.adapter.flat.normal_(0.0, 0.01, generator=generator)
    eager = replace(session, attention=Choice("eager", "reference"))
    batch = pack(data).to(session.torch_device)
    outcomes = []
    for one in (session, eager):
        with torch.no_grad():
            hidden_TD = one.hidden_states(batch).float()
        source(one, 0)
        outcomes.append((hidden_TD, one.adapter.flat_grad.clone()))
    session.adapter.flat.zero_()
    (hidden, gradient), (hidden_eager, gradient_eager) = outcomes
    return {
        "tokens": batch.tokens,
        "hidden_states": float((hidden - hidden_eager).norm() / hidden_eager.norm()),
        "gradient": float((gradient - gradient_eager).norm() / gradient_eager.norm()),
    }


def matmul_flops(device: torch.device, dtype: torch.dtype, width: int) -> float:
    """Return the rate of a large matrix product, FLOP/s: what the card can do in this run."""
    left = torch.randn(width, width, device=device, dtype=dtype)
    found = measured(lambda: left @ left, 10, device)
    return 2 * width**3 / float(found["seconds"])


def release(device: torch.device) -> None:
    """Give back what the last contestant held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def report(options: argparse.Namespace) -> dict[str, Any]:
    """Run every case and return the figures."""
    shape = BackboneShape.of(tiny_config()) if options.tiny else KNOWN_SHAPES[LLAMA_8B]
    device = torch.device(choose_device(options.device).value)
    card = "CPU"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        card = properties.name
        share = options.cap_gib * 2**30 / properties.total_memory
        if share < 1:
            torch.cuda.set_per_process_memory_fraction(share, device)
    dtype = DTYPES[choose_dtype(options.dtype, device).value]
    rate = matmul_flops(device, dtype, 256 if options.tiny else 8192)
    length = options.length
    workloads = {
        "full": [length] * options.batch,
        "mixed": [max(8, round(length * share)) for share in MIXED_SHARES],
    }
    cases = []
    agreements = {}
    for rank in options.ranks:
        session = open_random(shape, rank, options, options.batch * length)
        for name, lengths in workloads.items():
            data = samples(lengths, shape.vocabulary)
            cases.append({"who": "fedrx", "rank": rank, "workload": name, "lengths": lengths})
            cases[-1] |= ours(session, data, options.steps)
        short = [max(8, length // divisor) for divisor in (8, 5, 13)]
        agreements[str(rank)] = agreement(session, short)
        parameters = count_parameters(shape, session.adapter.spec)
        del session
        release(device)
        for name, lengths in workloads.items():
            data = samples(lengths, shape.vocabulary)
            cases.append({"who": "peft", "rank": rank, "workload": name, "lengths": lengths})
            try:
                cases[-1] |= beside(shape, rank, data, options)
            except torch.cuda.OutOfMemoryError:
                cases[-1]["out_of_memory"] = True
            release(device)
    for case in cases:
        if "seconds" in case:
            case["tokens_per_second"] = sum(case["lengths"]) / case["seconds"]
            # Forward and the backward's data gradients: 4 FLOP per frozen weight and token.
            case["share_of_matmul_rate"] = (
                4 * parameters.backbone * case["tokens_per_second"] / rate
            )
    return {
        "card": card,
        "cap_gib": options.cap_gib if device.type == "cuda" else None,
        "shape": asdict(shape),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
        "matmul_tflops": rate / 1e12,
        "agreement_with_eager": agreements,
        "cases": cases,
    }


def show(found: dict[str, Any]) -> None:
    """Print the figures as lines."""
    print(f"{found['card']}, matrix products {found['matmul_tflops']:.1f} TFLOP/s")
    for case in found["cases"]:
        title = f"{case['who']:6} r{case['rank']:<3} {case['workload']:6}"
        if "seconds" not in case:
            print(f"{title} out of memory")
            continue
        peak = case["peak_bytes"]
        memory = "not measured on a CPU" if peak is None else f"{peak / 1e9:.1f} GB"
        if case.get("plan_over_peak"):
            memory += f" (planned {case['planned_bytes'] / 1e9:.1f})"
        kernel = case["attention"]
        kernel = kernel["value"] if isinstance(kernel, dict) else kernel
        print(
            f"{title} {case['tokens_per_second']:9,.0f} tokens/s, peak {memory}, "
            f"attention {kernel}, {case['share_of_matmul_rate']:.0%} of the matmul rate"
        )
    for rank, one in found["agreement_with_eager"].items():
        print(
            f"r{rank}: against eager attention over {one['tokens']} packed tokens: hidden states "
            f"{one['hidden_states']:.1e}, gradient of B {one['gradient']:.1e} (relative)"
        )


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse, measure, print; returns the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, on any device")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--recompute", default="none", help="`auto` obeys the free memory")
    parser.add_argument("--cap-gib", type=float, default=48.0)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args(arguments)
    options.length = options.length or (64 if options.tiny else 2048)
    found = report(options)
    show(found)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


if __name__ == "__main__":
    main()
