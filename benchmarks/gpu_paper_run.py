"""The paper's step and answers at full size on a GPU, ours in every variant beside its peers.

    python benchmarks/gpu_paper_run.py [--json FILE]     (one call, minutes)
    python benchmarks/gpu_paper_run.py --tiny            (any machine: does it run at all)

Builds the shape of Llama-3.1-8B on the card with random weights and measures, in this order:
exactness on a tiny fp32 model; training steps of 4 x 2048 tokens and of mixed lengths, with each
kind of elementwise kernels, of attention and of frozen weights (nf4 beside QLoRA, where
bitsandbytes can be imported); attention alone by the length of segments; private steps, and what
isolates their patients; the peak of memory beside what `fedrx plan` foresees; a step's time by kind
of kernel; answers beside transformers' `generate`; transformers + PEFT with and without
checkpointing, and with Liger's kernels where liger-kernel can be imported; a process's way to its
first step. It needs torch, transformers and peft (which brings psutil), and no network. Figures are
printed, and written to --json, as they come.
"""

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gpu_loading
import gpu_peers
import peft
import psutil
import torch
import transformers
from gpu_attention import by_length
from gpu_measure import (
    answer_rate,
    by_kind,
    distance,
    exactness,
    gradient,
    once,
    open_random,
    ours,
    ours_answer,
    patched,
    random_llama,
    release,
    samples,
    step_times,
    variant,
    wait,
)
from gpu_weights import fp8, nf4, private_steps

from common.model.adapter.falora import AdapterSpec
from common.model.backbone.known_shapes import KNOWN_SHAPES
from common.model.backbone.load import BackboneShape
from common.model.backbone.tiny import tiny_config
from common.model.footprint import count_parameters
from common.model.kernels import attention, choice
from common.model.kernels.choice import CANDIDATES
from common.model.session import DTYPES, choose_device, choose_dtype
from common.text.batches import Encoded

STARTED = psutil.Process().create_time()
LLAMA_8B = "meta-llama/Llama-3.1-8B-Instruct"
MIXED_SHARES = (1.0, 0.55, 0.35, 0.2)


class Run:
    """One call of the script: its options, and the figures so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.shape = BackboneShape.of(tiny_config()) if options.tiny else KNOWN_SHAPES[LLAMA_8B]
        device = torch.device(choose_device(options.device).value)
        # Some calls want a device with its number.
        self.device = torch.device("cuda", device.index or 0) if device.type == "cuda" else device
        self.dtype = choose_dtype(options.dtype, device).value
        length = options.length
        self.workloads = {
            "full": [length] * options.batch,
            "mixed": [max(8, round(length * share)) for share in MIXED_SHARES],
        }
        self.cases: list[dict[str, Any]] = []
        self.figures: dict[str, Any] = {"cases": self.cases, "shape": asdict(self.shape)}

    def note(self, **figures: Any) -> None:
        """Keep figures, write the file and print them."""
        self.figures |= figures
        if self.options.json:
            self.options.json.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(self.figures, indent=2) + "\n"
            self.options.json.write_text(text, encoding="utf-8")
        for name, value in figures.items():
            print(f"[{time.time() - STARTED:5.0f} s] {name}: {value}", flush=True)

    def case(
        self,
        who: str,
        workload: str,
        found: Callable[[], dict[str, Any]],
        lengths: Sequence[int] = (),
    ) -> None:
        """Measure one contestant on one workload; what fails is a figure too."""
        lengths = list(lengths or self.workloads[workload])
        one: dict[str, Any] = {"who": who, "workload": workload, "lengths": lengths}
        try:
            one |= found()
            one["tokens_per_second"] = sum(lengths) / one["seconds"]
        except Exception as error:  # the other cases' figures are worth having
            one["error"] = f"{type(error).__name__}: {str(error)[:300]}"
        self.cases.append(one)
        self.note()
        peak = one.get("peak_bytes")
        memory = f"{peak / 1e9:.1f} GB" if peak else "not measured on a CPU"
        if peak and one.get("plan_over_peak"):
            memory += f" (planned {one['planned_bytes'] / 1e9:.1f})"
        rate = f"{one['tokens_per_second']:9,.0f} tokens/s" if "seconds" in one else one["error"]
        ways = "/".join(one.get(key, "") for key in ("weights", "kernels", "attention"))
        print(
            f"[{time.time() - STARTED:5.0f} s] {who:28} {workload:5} {rate}, peak {memory} "
            f"{ways if ways != '//' else ''}",
            flush=True,
        )
        release(self.device)

    def data(self, lengths: Sequence[int], seed: int = 0) -> list[Encoded]:
        """Draw samples for this shape."""
        return samples(lengths, self.shape.vocabulary, seed)

    def prompts(self, answers: int) -> list[list[int]]:
        """Draw prompts of about a quarter of the longest sample."""
        lengths = [self.options.length // 4 + 5 * place % 97 for place in range(answers)]
        return [list(one.input_ids) for one in self.data(lengths)]

    def answer(self, who: str, answers: int, call: Callable[[], object]) -> None:
        """Measure one contestant's answers."""
        found = self.figures.setdefault("answer_tokens_per_second", {})
        found[f"{who}, {answers}"] = answer_rate(call, answers * self.options.tokens, self.device)
        self.note(answer_tokens_per_second=found)


def check(run: Run) -> None:
    """Note how exact each way is."""
    run.note(exactness=exactness(run.options))


def training(run: Run) -> None:
    """Measure ours in bf16 (fp32 where that is what the device computes in)."""
    steps, session = run.options.steps, open_random(run.shape, run.options, dtype=run.dtype)
    data = {name: run.data(lengths) for name, lengths in run.workloads.items()}
    once(session, data["full"])
    wait(run.device)
    run.note(seconds_to_first_step=time.time() - STARTED)
    own, own_kernels = session.attention.value, session.kernels.value
    # What is compiled for a CPU is `training_speed.py`'s.
    candidates = [name for name in CANDIDATES if name != "compiled"]
    kernels = [name for name in candidates if not choice.obstacle(name, run.device)]
    attentions = [
        name
        for name in attention.KERNELS
        if name != "eager" and not attention.obstacle(name, run.device, DTYPES[run.dtype])
    ]
    for name in kernels:
        one = variant(session, kernels=name, kernel=own)
        run.case("ours", "full", partial(ours, one, data["full"], steps))
    for name in attentions:
        one = variant(session, kernels=own_kernels, kernel=name)
        for load in ("full", "mixed") if name != own else ("mixed",):
            run.case("ours", load, partial(ours, one, data[load], steps))
    if "cudnn" in attentions:
        one = variant(session, kernels=own_kernels, kernel="cudnn")
        with patched(attention, "CUDNN_TOKENS", 0):
            new = run.data([max(9, length - 37) for length in run.workloads["mixed"]])
            found = step_times(partial(once, one, new), 2, run.device)
            run.note(cudnn_at_new_lengths={k: found[k] for k in ("first_seconds", "seconds")})
    run.note(attention_by_length=by_length(run))
    session = variant(session, kernels=own_kernels, kernel=own)
    private_steps(run, session, run.dtype)
    short = run.data([max(8, run.options.length // part) for part in (8, 5, 13)])
    reference = gradient(variant(session, kernels="torch", kernel="eager"), short)
    agreement = {}
    for name in kernels:
        for kernel in attentions:
            one = variant(session, kernels=name, kernel=kernel)
            agreement[f"{name}/{kernel}"] = distance(gradient(one, short), reference)
    session = variant(session, kernels=own_kernels, kernel=own)
    run.note(
        agreement_with_eager=agreement,
        milliseconds_by_kind=by_kind(partial(once, session, data["full"]), run.device),
    )
    for answers in run.options.answers:
        prompts, tokens = run.prompts(answers), run.options.tokens
        run.answer("ours", answers, partial(ours_answer, session, prompts, tokens, True))
    prompts = run.prompts(run.options.answers[0])
    slow = partial(ours_answer, session, prompts, run.options.tokens, False)
    run.answer("ours, not recorded", len(prompts), slow)


def loading(run: Run) -> None:
    """Time a process from its start to its first step on a folder: hash unknown, then known."""
    with tempfile.TemporaryDirectory(dir=run.options.scratch) as folder:
        run.note(seconds_to_write=gpu_loading.write(run.shape, run.device, run.dtype, Path(folder)))
        release(run.device)
        for name in ("hash unknown", "hash known"):
            run.note(**{f"first step, {name}": gpu_loading.first_step(Path(folder), run.options)})
    run.note(import_seconds=gpu_loading.imports())


def peers(run: Run) -> None:
    """Measure transformers' generate, then PEFT's steps; Liger last, for it patches."""
    options, dtype = run.options, DTYPES[run.dtype]
    model = random_llama(run.shape, run.device, dtype)
    model.set_attn_implementation("sdpa")
    for answers in options.answers:
        prompts = run.prompts(answers)
        run.answer(
            "transformers", answers, partial(gpu_peers.answer, model, prompts, options.tokens)
        )
    del model
    for name, (liger, checkpointing) in gpu_peers.PEERS.items():
        release(run.device)
        absent = liger and (not gpu_peers.has_liger() or run.device.type != "cuda")
        if absent or name not in options.peers:
            continue
        model = random_llama(run.shape, run.device, dtype)
        step = gpu_peers.lora_step(model, options.rank, liger=liger, checkpointing=checkpointing)
        for load, lengths in run.workloads.items():
            batch = gpu_peers.padded(run.data(lengths), run.device)
            run.case(
                name, load, partial(step_times, partial(step, batch), options.steps, run.device)
            )
        del model, step


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse, measure, print; returns the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, on any device")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--recompute", default="none", help="`auto` obeys the free memory")
    parser.add_argument("--cap-gib", type=float, default=0, help="of the card; 0: all of it")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--long-steps", type=int, default=200, help="of fp8 beside bf16")
    parser.add_argument("--answers", type=int, nargs="+", default=[20, 64])
    parser.add_argument("--tokens", type=int, default=128, help="of each answer")
    parser.add_argument(
        "--parts", nargs="+", default=["check", "training", "fp8", "nf4", "peers", "loading"]
    )
    parser.add_argument("--seconds", type=float, default=0, help="after these no part is begun")
    parser.add_argument("--scratch", help="folder for a backbone on disk, 17 GB")
    parser.add_argument("--peers", nargs="*", default=list(gpu_peers.PEERS))
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args(arguments)
    options.length = options.length or (64 if options.tiny else 2048)
    run = Run(options)
    card, on_gpu = "CPU", run.device.type == "cuda"
    if run.device.type == "cuda":
        properties = torch.cuda.get_device_properties(run.device)
        card = properties.name
        share = options.cap_gib * 2**30 / properties.total_memory
        if 0 < share < 1:
            torch.cuda.set_per_process_memory_fraction(share, run.device)
    versions = {one.__name__: one.__version__ for one in (torch, transformers, peft)}
    run.note(card=card, cap_gib=options.cap_gib, versions=versions, dtype=run.dtype)
    run.note(parameters=asdict(count_parameters(run.shape, AdapterSpec(rank=options.rank))))
    parts = {one.__name__: one for one in (check, training, fp8, nf4, loading, peers)}
    failed, left_out = [], []
    for name in options.parts:
        if name == "fp8" and not on_gpu:
            continue
        if 0 < options.seconds < time.time() - STARTED:
            left_out.append(name)
            continue
        try:
            parts[name](run)
        except Exception:  # the other parts' figures are worth having
            failed.append(name)
            run.note(**{f"{name} failed": traceback.format_exc()})
        release(run.device)
    run.note(seconds_in_all=time.time() - STARTED, failed=failed, left_out=left_out)
    return run.figures


if __name__ == "__main__":
    sys.exit(1 if main()["failed"] else 0)
