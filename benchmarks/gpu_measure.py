"""Random Llamas on a card, ours on them, and how a step is measured; for `gpu_paper_run.py`."""

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from common.choice import Choice
from common.config import TrainConfig
from common.evaluation import decode_graph
from common.evaluation.generate import generate
from common.model.adapter.falora import AdapterSpec, attach
from common.model.backbone.load import BackboneShape, BackboneSpec
from common.model.backbone.tiny import tiny_config
from common.model.footprint import training_footprint
from common.model.kernels import attention
from common.model.kernels import fused_layer as lean
from common.model.kernels.choice import CANDIDATES, choose_kernels, kernels_named, obstacle
from common.model.kernels.frozen import Quantiser, quantise
from common.model.memory import choose_recompute
from common.model.session import DTYPES, Session, choose_device
from common.text.batches import Encoded, pack
from common.training.gradients import BatchGradient, GradientSource
from common.training.loop import StepReport, TrainState, train

ANSWER_SHARE = 0.19
KINDS = {
    "attention": ("flash", "fmha", "sdpa", "cudnn_generated", "attention"),
    "products": ("gemm", "nvjet", "cutlass", "xmma", "splitk", "_scaled_mm", "device_kernel"),
    "copies": ("memcpy", "memset", "copy", "catarray"),
}


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
        eos_token_id=1,
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
    shape: BackboneShape,
    options: argparse.Namespace,
    *,
    dtype: str,
    weights: str = "bf16",
    recompute: str = "",
) -> Session:
    """Open a session as ``open_session`` does, on random weights instead of loaded ones."""
    device = choose_device(options.device)
    on = torch.device(device.value)
    model = random_llama(shape, on, DTYPES[dtype])
    model.set_attn_implementation(attention.register())
    spec = AdapterSpec(rank=min(options.rank, shape.hidden), alpha=16.0)
    kernels = choose_kernels(options.kernels, on)
    functions = kernels_named(kernels.value)
    if weights != "bf16":
        quantise(model, Quantiser(weights=weights, kernels=functions))
    adapter = attach(model, spec)
    recompute = choose_recompute(
        recompute or options.recompute,
        shape=shape,
        adapter=spec,
        value_bytes=DTYPES[dtype].itemsize,
        batch_tokens=options.batch * options.length,
        device=on,
    )
    lean.install(model, recompute.value, functions)
    tokenizer: Any = SimpleNamespace(eos_token_id=-1)  # an answer never ends by itself
    return Session(
        spec=BackboneSpec(name="random", folder=None, hub_id="", fingerprint="", shape=shape),
        model=model,
        tokenizer=tokenizer,
        adapter=adapter,
        device=device,
        dtype=Choice(dtype, "asked for"),
        attention=attention.choose_attention(options.attention, on, DTYPES[dtype]),
        recompute=recompute,
        kernels=kernels,
        weights=Choice(weights, "asked for"),
        functions=functions,
    )


def variant(session: Session, *, kernels: str = "", kernel: str = "") -> Session:
    """Return the session with other elementwise kernels or another attention kernel."""
    kernels, kernel = kernels or session.kernels.value, kernel or session.attention.value
    functions = kernels_named(kernels)
    for layer in session.model.model.layers:
        layer.kernels = functions
    chosen = {"kernels": Choice(kernels, "variant"), "attention": Choice(kernel, "variant")}
    return replace(session, functions=functions, **chosen)


def samples(lengths: Sequence[int], vocabulary: int, seed: int = 0) -> list[Encoded]:
    """Draw samples of random tokens whose last fifth is the answer."""
    draw = np.random.default_rng(seed)
    return [
        Encoded(
            input_ids=tuple(draw.integers(3, vocabulary, size=length).tolist()),
            answer_start=max(1, round(length * (1 - ANSWER_SHARE))),
            unit=unit,
        )
        for unit, length in enumerate(lengths)
    ]


def wait(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def step_times(step: Callable[[], object], steps: int, device: torch.device) -> dict[str, Any]:
    """Warm up twice, then time each of ``steps`` steps; the peak is of everything on the card."""
    ends = [_start(device)]
    for _ in range(2 + steps):
        step()
        wait(device)
        ends.append(time.perf_counter())
    return _found(ends, device)


def train_times(
    session: Session, data: list[Encoded], steps: int, source: GradientSource | None = None
) -> dict[str, Any]:
    """Time optimizer steps as ``step_times`` does, in one call of the training loop.

    In one call, because a step packs the next one's batch while the card computes.
    """
    config = TrainConfig(batch_size=len(data), learning_rate=1e-3)
    ends = [_start(session.torch_device)]

    def ended(_report: StepReport) -> None:
        wait(session.torch_device)
        ends.append(time.perf_counter())

    train(
        session,
        data,
        config,
        TrainState(),
        steps=2 + steps,
        schedule_steps=2 + steps,
        stream="benchmark",
        on_step=ended,
        source=source,
    )
    return _found(ends, session.torch_device)


def _start(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return time.perf_counter()


def _found(ends: Sequence[float], device: torch.device) -> dict[str, Any]:
    first, _warm, *seconds = (end - begin for begin, end in pairwise(ends))
    on_gpu = device.type == "cuda"
    return {
        "seconds": statistics.median(seconds),
        "spread": max(seconds) / min(seconds),
        "first_seconds": first,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else None,
    }


def ours(session: Session, data: list[Encoded], steps: int) -> dict[str, Any]:
    """Time optimizer steps of the one training loop."""
    found = train_times(session, data, steps)
    planned = training_footprint(
        session.spec.shape,
        session.adapter.spec,
        batch_tokens=sum(len(one.input_ids) for one in data),
        value_bytes=DTYPES[session.dtype.value].itemsize,
        recompute=session.recompute.value,
        optimizer="sgd",
        device=session.torch_device.type,
        weights=session.weights.value,
    )
    # The context is the driver's, not torch's: it is in the plan but not in torch's peak.
    expected, peak = planned.total - planned.runtime, found["peak_bytes"]
    return {
        **found,
        "planned_bytes": expected,
        "plan_over_peak": None if peak is None else expected / peak,
        "attention": session.attention.value,
        "kernels": session.kernels.value,
        "weights": session.weights.value,
        "recompute": session.recompute.value,
    }


def once(session: Session, data: list[Encoded]) -> None:
    """One gradient of the plain batch."""
    BatchGradient(data, TrainConfig(batch_size=len(data)), "once")(session, 0)


def gradient(session: Session, data: list[Encoded]) -> tuple[Tensor, Tensor]:
    """Return final hidden states and the gradient of a B of a trained size."""
    # With B = 0 the loss does not depend on A's side at all.
    generator = torch.Generator(session.torch_device).manual_seed(1)
    session.adapter.flat.normal_(0.0, 0.01, generator=generator)
    with torch.no_grad():
        hidden_TD = session.hidden_states(pack(data).to(session.torch_device)).float()
    BatchGradient(data, TrainConfig(batch_size=len(data)), "agreement")(session, 0)
    session.adapter.flat.zero_()
    return hidden_TD, session.adapter.flat_grad.clone()


def distance(found: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Relative distances of hidden states and gradients, and the gradients' cosine."""
    (hidden, grad), (hidden_r, grad_r) = found, reference
    return {
        "hidden_states": float((hidden - hidden_r).norm() / hidden_r.norm()),
        "gradient": float((grad - grad_r).norm() / grad_r.norm()),
        "cosine": float(torch.cosine_similarity(grad, grad_r, dim=0)),
    }


@contextmanager
def patched(module: Any, name: str, value: object) -> Iterator[None]:
    """Replace a module's name for a while."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def by_kind(step: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Return one step's milliseconds on the device by kind of kernel, and the longest names."""
    if device.type != "cuda":
        return {}
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        step()
        wait(device)
    totals: dict[str, float] = dict.fromkeys((*KINDS, "elementwise"), 0.0)
    rest: dict[str, float] = {}
    for event in seen.key_averages():
        name, spent = event.key.lower(), event.self_device_time_total / 1e3
        kind = next((k for k, words in KINDS.items() if any(w in name for w in words)), "")
        totals[kind or "elementwise"] += spent
        if kind != "products":
            short = event.key[:90]
            rest[short] = rest.get(short, 0.0) + spent
    longest = sorted(rest, key=rest.__getitem__, reverse=True)[:14]
    return {**totals, **{f"  {name}": rest[name] for name in longest}}


def release(device: torch.device) -> None:
    """Give back what the last contestant held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def exactness(options: argparse.Namespace) -> dict[str, Any]:
    """Hold each kind of kernels to plain torch on a tiny fp32 model, and graphs to slots."""
    shape = BackboneShape.of(tiny_config())
    session = open_random(
        shape, argparse.Namespace(**{**vars(options), "attention": "sdpa"}), dtype="fp32"
    )
    data = samples([64, 35, 22, 64], shape.vocabulary)
    reference = gradient(variant(session, kernels="torch"), data)
    on_gpu = session.torch_device.type == "cuda"
    found: dict[str, Any] = {
        name: distance(gradient(variant(session, kernels=name), data), reference)
        for name in CANDIDATES
        if on_gpu and not obstacle(name, session.torch_device)
    }
    session = variant(session, kernels="torch")
    prompts = [list(one.input_ids) for one in data]
    plain = ours_answer(session, prompts, 24, graphs=False)
    found["tokens of graphs equal slots'"] = ours_answer(session, prompts, 24, graphs=True) == plain
    return found


def ours_answer(
    session: Session, prompts: Sequence[Sequence[int]], tokens: int, graphs: bool
) -> list[tuple[int, ...]]:
    """Answer all prompts together with recorded steps, or slot by slot."""
    with patched(decode_graph, "supported", lambda _session: graphs):
        answers = generate(session, prompts, max_new_tokens=tokens, batch_size=len(prompts))
    return [one.tokens for one in answers]


def answer_rate(call: Callable[[], object], tokens: int, device: torch.device) -> float:
    """Tokens per second of the second of two calls."""
    call()
    wait(device)
    before = time.perf_counter()
    call()
    wait(device)
    return tokens / (time.perf_counter() - before)
