"""Many hospitals in one simulation: seconds per hospital and round beyond local training.

    python benchmarks/federation_scale.py --hospitals 100
    python benchmarks/federation_scale.py --hospitals 12 --megabytes 21

``--megabytes`` trains a random Llama whose B has that size (fp32) in place of the tiny one.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LAYERS, HIDDEN, KV = 20, 512, 256


def random_backbone(folder: Path) -> Path:
    """Write a random Llama with the tiny backbone's tokenizer: wide enough for a large B."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from common.model.tiny import tiny_tokenizer

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


def main() -> None:
    """Run one simulation and print its overhead."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hospitals", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=float, default=0.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
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
        (folder / "empty.toml").write_text("")
        run = folder / "run"
        command = [sys.executable, "-c", "from sim.cli import main; main()", "federate"]
        command += [str(folder / "empty.toml"), "--run-dir", str(run)]
        command += [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        summary = json.loads((run / "summary.json").read_text())
        b_bytes = 4 * summary["trainable_parameters"]
        keys = ("overhead_seconds_per_hospital_round", "workers", "training_seconds", "seconds")
        figures = {"hospitals": options.hospitals, "b_bytes": b_bytes}
        print(json.dumps({**figures, **{key: summary[key] for key in keys}}, indent=2))


if __name__ == "__main__":
    main()
