"""Quantised frozen weights at full size beside bf16, and QLoRA; parts of `gpu_paper_run.py`."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import gpu_peers
import torch
from gpu_measure import (
    by_kind,
    distance,
    gradient,
    once,
    open_random,
    ours,
    ours_answer,
    random_llama,
    release,
    step_times,
)
from gpu_private import isolation, private

from common.config import TrainConfig
from common.model.kernels.frozen import choose_weights
from common.model.kernels.nf4 import Nf4Weight, nf4_obstacle
from common.model.session import DTYPES, Session
from common.text.batches import Encoded
from common.training.loop import TrainState, train

if TYPE_CHECKING:
    from gpu_paper_run import Run

NF4_BATCH = 2


def fp8(run: "Run") -> None:
    """Measure fp8 weights, and hold them to bf16: one gradient, and the losses of many steps."""
    choose_weights("fp8", run.device, DTYPES[run.dtype])
    small = run.data([max(16, run.options.length // 4)], seed=3)
    outcomes, losses = {}, {}
    for weights in ("bf16", "fp8"):
        session = open_random(run.shape, run.options, dtype=run.dtype, weights=weights)
        outcomes[weights] = gradient(session, small)
        if weights == "fp8":
            _fp8_steps(run, session)
        losses[weights] = _long_run(session, small, run.options.long_steps)
        del session
        release(run.device)
    apart = [abs(a / b - 1) for a, b in zip(losses["fp8"], losses["bf16"], strict=True)]
    run.note(
        fp8_against_bf16={
            **distance(outcomes["fp8"], outcomes["bf16"]),
            "largest_loss_difference": max(apart, default=0.0),
            "losses": {name: [one[0], one[-1]] for name, one in losses.items() if one},
        }
    )


def _fp8_steps(run: "Run", session: Session) -> None:
    """Time steps, private ones, the kinds of kernels and answers with fp8 weights."""
    for load, lengths in run.workloads.items():
        run.case("ours", load, partial(ours, session, run.data(lengths), run.options.steps))
    private_steps(run, session, "fp8")
    full = run.data(run.workloads["full"])
    run.note(fp8_milliseconds_by_kind=by_kind(partial(once, session, full), run.device))
    for answers in run.options.answers[:1]:
        prompts, tokens = run.prompts(answers), run.options.tokens
        run.answer("ours, fp8", answers, partial(ours_answer, session, prompts, tokens, True))


def _long_run(session: Session, data: list[Encoded], steps: int) -> list[float]:
    """Train from B = 0 on one sample; returns the loss of each step."""
    session.adapter.flat.zero_()
    config, losses = TrainConfig(batch_size=1, learning_rate=1.0), []
    train(
        session,
        data,
        config,
        TrainState(),
        steps=steps,
        schedule_steps=steps,
        stream="long",
        on_step=lambda report: losses.append(float(report.loss or 0.0)),
    )
    return losses


def private_steps(run: "Run", session: Session, weights: str) -> None:
    """Time a private step, a pass for each patient and one pass for all; note what isolates."""
    steps, suffix = run.options.steps, "" if weights == run.dtype else f", {weights}"
    for load, lengths in run.workloads.items():
        for one_pass in (False, True):
            name = "ours, private, one pass" if one_pass else "ours, private"
            found = partial(private, session, run.data(lengths), steps, one_pass=one_pass)
            run.case(name + suffix, load, found)
    run.note(**{f"isolation, {weights}": isolation(session, run.data(run.workloads["mixed"]))})


def nf4(run: "Run") -> None:
    """Measure nf4 weights under recomputation beside bf16, and beside QLoRA."""
    if nf4_obstacle():
        run.note(nf4=f"left out: {nf4_obstacle()}")
        return
    full = run.data([run.options.length] * NF4_BATCH)
    small = run.data([max(16, run.options.length // 4)], seed=3)
    lengths, steps = [len(one.input_ids) for one in full], run.options.steps
    session = open_random(run.shape, run.options, dtype=run.dtype, recompute="all")
    run.case("ours, recomputed", "half", partial(ours, session, full, steps), lengths)
    exact = gradient(session, small)
    del session
    release(run.device)
    session = open_random(run.shape, run.options, dtype=run.dtype, weights="nf4", recompute="all")
    run.case("ours, recomputed", "half", partial(ours, session, full, steps), lengths)
    for one_pass in (False, True):
        name = "ours, private, one pass, nf4" if one_pass else "ours, private, nf4"
        found = partial(private, session, full, steps, one_pass=one_pass)
        run.case(name, "half", found, lengths)
    run.note(**{"isolation, nf4": isolation(session, full)})
    coarse = gradient(session, small)
    _dequantise(session)
    release(run.device)
    run.note(
        nf4_against_its_values=distance(coarse, gradient(session, small)),
        nf4_against_bf16=distance(coarse, exact),
    )
    del session
    release(run.device)
    name, step = "qlora: peft + bitsandbytes, checkpointing", qlora_step(run)
    batch = gpu_peers.padded(full, run.device)
    found = partial(step_times, partial(step, batch), steps, run.device)
    run.case(name, "half", found, lengths)


def _dequantise(session: Session) -> None:
    """Put the values that nf4 weights stand for in their place."""
    for module in session.model.modules():
        weight = vars(module).get("weight")
        if isinstance(weight, Nf4Weight):
            vars(module)["weight"] = weight.dense()


def qlora_step(run: "Run") -> Callable[..., None]:
    """Return PEFT's checkpointed step on bitsandbytes' nf4 linear layers."""
    import bitsandbytes

    dtype = DTYPES[run.dtype]
    model: Any = random_llama(run.shape, run.device, dtype)
    for name in [name for name, one in model.named_modules() if type(one) is torch.nn.Linear]:
        parent, _, child = name.rpartition(".")
        if child != "lm_head":
            base = model.get_submodule(name)
            linear = bitsandbytes.nn.Linear4bit(
                base.in_features,
                base.out_features,
                bias=False,
                compute_dtype=dtype,
                compress_statistics=True,
                quant_type="nf4",
                device="meta",
            )
            values = base.weight.data
            linear.weight = bitsandbytes.nn.Params4bit(
                values, requires_grad=False, quant_type="nf4", compress_statistics=True
            )
            setattr(model.get_submodule(parent), child, linear.to(run.device))
            del base, values
    model.is_loaded_in_4bit = True
    return gpu_peers.lora_step(model, run.options.rank, liger=False, checkpointing=True)
