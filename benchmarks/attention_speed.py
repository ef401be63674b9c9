"""Attention on a CPU: ours beside torch's SDPA, forward and backward, as ratios of CPU time.

    OMP_NUM_THREADS=1 python benchmarks/attention_speed.py [--rounds N] [--json]

The embedded backbone's heads at mixed lengths of 200 to 600 tokens, and one layer of Llama-3.1-8B's
shape. One thread, process CPU time, the two interleaved, medians; SDPA takes the grouped heads
as they are. It decides whether `common/model/kernels/attention_cpu.py` is worth its lines.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from common.model.backbone.known_shapes import KNOWN_SHAPES
from common.model.kernels.attention_cpu import packed_attention
from common.model.kernels.attention_cuda import sdpa

WAYS = {"ours": packed_attention, "SDPA": sdpa}
CASES = {
    "embedded, 200-600 tokens": ("embedded", [200, 600, 400, 300, 500, 250, 350, 450]),
    "8B layer, 4 x 512": ("meta-llama/Llama-3.1-8B", [512] * 4),
    "8B layer, 2048": ("meta-llama/Llama-3.1-8B", [2048]),
}


def medians(name: str, lengths: list[int], dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """Return each way's median CPU seconds of a forward and backward pass."""
    shape, bounds = KNOWN_SHAPES[name], (0, *itertools.accumulate(lengths))
    generator = torch.Generator().manual_seed(0)
    q, k, v, upstream = (
        torch.randn(bounds[-1], heads, shape.head_dim, generator=generator).to(dtype)
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    )
    inputs = [tensor.requires_grad_() for tensor in (q, k, v)]
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds + 1):
        for way, attend in WAYS.items():
            started = time.process_time()
            out = attend(*inputs, shape.head_dim**-0.5, bounds)
            torch.autograd.grad(out, inputs, upstream)
            seconds[way].append(time.process_time() - started)
    return {way: statistics.median(found[1:]) for way, found in seconds.items()}


def main(arguments: list[str] | None = None) -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=0, help="cut lengths to this; 0: as they are")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = []
    for case, (name, lengths) in CASES.items():
        lengths = [min(length, options.tokens or length) for length in lengths]
        for dtype in (torch.bfloat16, torch.float32):
            found = medians(name, lengths, dtype, options.rounds)
            ratio = found["SDPA"] / found["ours"]
            results.append({"case": case, "dtype": str(dtype), **found, "ours_is_faster_by": ratio})
            if not options.json:
                print(f"{case:26} {dtype!s:15} ours {found['ours']:.3f} s, x{ratio:.2f}")
    if options.json:
        print(json.dumps({"torch": torch.__version__, "results": results}, indent=2))


if __name__ == "__main__":
    main()
