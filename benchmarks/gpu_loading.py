"""From a process's start to its first step on a backbone in a folder; for `gpu_paper_run.py`.

python benchmarks/gpu_loading.py FOLDER CACHE DEVICE DTYPE [WEIGHTS]      (what the parent starts)
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil
import torch

from common.config import TrainConfig
from common.model.adapter.falora import AdapterSpec
from common.model.backbone.load import BackboneShape, resolve_backbone
from common.model.backbone.tiny import tiny_tokenizer
from common.model.session import DTYPES, early_destination, open_session

TOKENS = 512


def write(shape: BackboneShape, device: torch.device, dtype: str, folder: Path) -> float:
    """Save random weights in shards of 5 GB, with a small tokenizer; return the seconds it took."""
    from gpu_measure import random_llama

    before = time.perf_counter()
    model = random_llama(shape, device, DTYPES[dtype])
    model.save_pretrained(folder / "backbone", max_shard_size="5GB")
    tiny_tokenizer().save_pretrained(str(folder / "backbone"))
    return time.perf_counter() - before


def first_step(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Start a process on a saved backbone; returns the seconds at which it had done what."""
    places = [str(folder / "backbone"), str(folder / "cache"), options.device, options.dtype]
    found: dict[str, Any] = json.loads(_run(__file__, *places).stdout.splitlines()[-1])
    return found


def imports() -> dict[str, float]:
    """Return the seconds that each package's own modules take to be imported, the slowest ten.

    In a process of its own: what tells them slows them down.
    """
    program = "import sys; sys.path[:0] = sys.argv[1:]; import gpu_loading, transformers"
    llama = "from transformers import LlamaForCausalLM"
    folders = [str(Path(__file__).parent), str(Path(__file__).resolve().parents[1])]
    return import_seconds(_run("-X", "importtime", "-c", f"{program}; {llama}", *folders).stderr)


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return done


def import_seconds(log: str) -> dict[str, float]:
    """Sum up what ``-X importtime`` says of each package's own modules; the slowest ten.

    >>> import_seconds("import time:    500000 |    900000 |   torch.nn")
    {'torch': 0.5}
    """
    seconds: Counter[str] = Counter()
    for own, name in re.findall(r"import time: +(\d+) \| +\d+ \| +(\w+)", log):
        seconds[name] += int(own)
    return {name: microseconds / 1e6 for name, microseconds in seconds.most_common(10)}


def main(folder: str, cache: str, device: str, dtype: str, weights: str = "bf16") -> None:
    """Open the folder as a run does, take a step, and print when each part was done.

    transformers is imported while the weights come, as in a run: that is part of ``fingerprint``.
    """
    started = psutil.Process().create_time()
    seconds = {"imports": time.time() - started}
    destination = early_destination(device, dtype, weights, "auto")
    spec = resolve_backbone(folder, cache_dir=Path(cache), destination=destination)
    seconds["fingerprint"] = time.time() - started
    session = open_session(spec, AdapterSpec(), device=device, dtype=dtype, weights=weights)
    seconds["open"] = time.time() - started
    from common.text.batches import Encoded
    from common.training.gradients import BatchGradient

    vocabulary = range(3, spec.shape.vocabulary)
    tokens = tuple(random.Random(0).choices(vocabulary, k=TOKENS))
    sample = Encoded(input_ids=tokens, answer_start=TOKENS * 4 // 5, unit=0)
    BatchGradient([sample], TrainConfig(batch_size=1), "once")(session, 0)
    if session.torch_device.type == "cuda":
        torch.cuda.synchronize(session.torch_device)
    seconds["first step"] = time.time() - started
    print(json.dumps({**seconds, "load_average": os.getloadavg()[0]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
