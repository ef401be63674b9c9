"""Many hospitals in one simulation: seconds per hospital and round beyond local training.

    python benchmarks/federation_scale.py --hospitals 100
    python benchmarks/federation_scale.py --hospitals 12 --megabytes 21
    python benchmarks/federation_scale.py --plain-loop --rounds 3
    python benchmarks/federation_scale.py --start --rounds 3

``--megabytes`` trains a random Llama whose B has that size (fp32) in place of the tiny one.
``--plain-loop`` compares one hospital's rounds with the same steps without Flower and Ray.
``--start`` times all of the shortest `fedrx federate` (one step, two answers, a report), in turn
with two apps of Flower that train nothing: one is empty, one's clients import torch and
transformers' Llama.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LAYERS, HIDDEN, KV = 20, 512, 256
SHORTEST = {
    "model.backbone": "tiny",
    "data.synthetic-patients": 60,
    "federation.hospitals": 3,
    "federation.rounds": 1,
    "federation.local-steps": 1,
    "evaluation.validation-samples": 1,
    "evaluation.samples": 2,
    "evaluation.max-new-tokens": 8,
}
APP = """
import time
from pathlib import Path
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client = ClientApp()
server = ServerApp()

@client.query()
def query(message, context):
    {imports}
    return Message(RecordDict(), reply_to=message)

@server.main()
def main(grid, context):
    while len(nodes := list(grid.get_node_ids())) < 3:
        time.sleep(0.1)
    asked = [Message(RecordDict(), dst_node_id=node, message_type="query") for node in nodes]
    assert not any(reply.has_error() for reply in grid.send_and_receive(asked))
    Path({done!r}).touch()
"""
PROJECT = """
[project]
name = "nothing"
version = "1.0.0"
license = "Apache-2.0"
[tool.flwr.app]
publisher = "nobody"
[tool.flwr.app.components]
serverapp = "nothing:server"
clientapp = "nothing:client"
"""
LLAMA = "from transformers.models.llama.modeling_llama import LlamaForCausalLM"


def random_backbone(folder: Path) -> Path:
    """Write a random Llama with the tiny backbone's tokenizer: wide enough for a large B."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from common.model.backbone.tiny import tiny_tokenizer

    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=HIDDEN,
        intermediate_size=512,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def fedrx(verb: str, run: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Run one verb with the default configuration and these settings; return its summary."""
    blank = run.with_suffix(".toml")
    blank.write_text("")
    command = [sys.executable, "-c", "from sim.cli.main import main; main()", verb]
    command += [str(blank), "--run-dir", str(run)]
    command += [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return summary


def seconds_of(run: Path, name: str, key: str = "value") -> float:
    """Add up one kind of event in a run's metrics.jsonl."""
    events = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return sum(float(event[key]) for event in events if event["name"] == name)


def many_hospitals(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return what a hospital and round cost beyond the local training."""
    backbone, rank = "tiny", 4
    if options.megabytes:
        backbone = str(random_backbone(folder / "backbone"))
        rank = round(options.megabytes * 1e6 / 4 / (LAYERS * (HIDDEN + KV)))
    settings = {
        "data.synthetic-patients": 10 * options.hospitals,
        "model.backbone": backbone,
        "adapter.rank": rank,
        "train.batch-size": 2,
        "train.max-length": 192,
        "train.dtype": "fp32",
        "federation.hospitals": options.hospitals,
        "federation.rounds": options.rounds,
        "federation.local-steps": 1,
        "evaluation.validation-samples": 1,
        "evaluation.samples": 2,
        "evaluation.max-new-tokens": 8,
    }
    summary = fedrx("federate", folder / "run", settings)
    keys = ("overhead_seconds_per_hospital_round", "workers", "training_seconds", "seconds")
    return {
        "hospitals": options.hospitals,
        "b_bytes": 4 * summary["trainable_parameters"],
        **{key: summary[key] for key in keys},
    }


def beside_the_plain_loop(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds of one hospital's training rounds over those of the bare loop.

    Both take the same steps on the same samples, on the embedded backbone; waiting for answers,
    encoding, sending and aggregating are all in the simulation's time, validation in neither.
    """
    shared = {
        "model.backbone": "embedded",
        "train.max-length": 512,
        "train.threads": options.threads,
        "federation.hospitals": 1,
        "federation.rounds": options.rounds,
        "federation.local-steps": options.local_steps,
        "evaluation.validation-samples": 1,
        "evaluation.samples": 1,
        "evaluation.max-new-tokens": 8,
    }
    steps = options.rounds * options.local_steps
    loop = fedrx("single", folder / "single", {**shared, "train.steps": steps})
    simulated = fedrx("federate", folder / "run", shared)
    plain = seconds_of(folder / "single", "train-loss", "seconds")
    exchanged = seconds_of(folder / "run", "train-exchange-seconds")
    return {
        "steps": steps,
        "threads": options.threads,
        "rounds": options.rounds,
        "b_equal": loop["b_sha256"] == simulated["b_sha256"],
        "plain_loop_seconds": round(plain, 2),
        "simulation_seconds": round(exchanged, 2),
        "ratio": round(exchanged / plain, 4),
    }


def an_app_of_flower(folder: Path, imports: str) -> float:
    """Return the seconds from a SuperLink's start until one query of three nodes is answered."""
    from sim.flower.superlink import CONNECTION, superlink

    app, done = folder / "nothing", folder / "done"
    app.mkdir(parents=True)
    (app / "pyproject.toml").write_text(PROJECT)
    (app / "nothing.py").write_text(APP.format(imports=imports, done=str(done)))
    began = time.monotonic()
    with superlink(folder) as link:
        few = "num-supernodes=3 client-resources-num-cpus=1 init-args-num-cpus=1"
        started = link.flwr("run", str(app), CONNECTION, "--federation-config", few)
        assert started.returncode == 0, started.stdout + started.stderr
        while not done.exists() and time.monotonic() < began + 120:
            time.sleep(0.1)
        assert done.exists(), link.log()
        return time.monotonic() - began


def shortest(folder: Path) -> float:
    """Return the seconds of the shortest federation, from its command to its end."""
    folder.mkdir()
    began = time.monotonic()
    fedrx("federate", folder / "run", SHORTEST)
    return time.monotonic() - began


def starts(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds that are spent where nothing is trained: medians of rounds in turn."""
    kinds = {
        "fedrx_federate": shortest,
        "empty_app_of_flower": lambda place: an_app_of_flower(place, "pass"),
        "app_that_imports_llama": lambda place: an_app_of_flower(place, LLAMA),
    }
    found = {name: [] for name in kinds}
    for number in range(options.rounds):
        for name, measure in kinds.items():
            found[name].append(measure(folder / f"{name}-{number}"))
    return {
        name: {
            "seconds": round(statistics.median(all_of), 2),
            "runs": [round(one, 2) for one in all_of],
        }
        for name, all_of in found.items()
    }


def main() -> None:
    """Run one measurement and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hospitals", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=float, default=0.0)
    parser.add_argument("--plain-loop", action="store_true")
    parser.add_argument("--start", action="store_true")
    parser.add_argument("--local-steps", type=int, default=10, help="with --plain-loop")
    parser.add_argument("--threads", type=int, default=1, help="with --plain-loop")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        measure = beside_the_plain_loop if options.plain_loop else many_hospitals
        if options.start:
            measure = starts
        print(json.dumps(measure(Path(name), options), indent=2))


if __name__ == "__main__":
    main()
