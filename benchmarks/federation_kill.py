"""Stress: kill -9 a federation's process group at random moments, resume, compare the B hash.

    python benchmarks/federation_kill.py --kills 20

One run is started without being disturbed. A second one of the same configuration is killed
again and again: each attempt lives for a random time and is then resumed, until all kills are
spent; the last attempt is left alone. Both must end in the same ``b_sha256``. The tiny backbone,
the fewest steps.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SETTINGS = {
    "data.synthetic-patients": 40,
    "model.backbone": "tiny",
    "adapter.rank": 4,
    "train.optimizer": "adamw",
    "train.learning-rate": 0.02,
    "train.batch-size": 2,
    "train.max-length": 192,
    "train.dtype": "fp32",
    "federation.rounds": 4,
    "federation.local-steps": 2,
    "federation.workers": 1,
    "evaluation.validation-samples": 2,
    "evaluation.samples": 2,
    "evaluation.max-new-tokens": 8,
}
FEDRX = [sys.executable, "-c", "from sim.cli.main import main; main()"]
ROOT = Path(__file__).resolve().parents[1]


def start(*arguments: str) -> subprocess.Popen[bytes]:
    """Start ``fedrx`` in a process group of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*FEDRX, *arguments],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def fresh(folder: Path) -> subprocess.Popen[bytes]:
    """Start a new run."""
    options = [part for key, value in SETTINGS.items() for part in ("--set", f"{key}={value}")]
    empty = folder.parent / "empty.toml"
    empty.write_text("")
    return start("federate", str(empty), "--run-dir", str(folder), *options)


def sha(folder: Path) -> str:
    """Return a finished run's hash of B."""
    return str(json.loads((folder / "summary.json").read_text())["b_sha256"])


def main() -> None:
    """Kill and resume, and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    generator = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        began = time.monotonic()
        if fresh(base / "undisturbed").wait():
            sys.exit("the undisturbed run failed")
        whole = time.monotonic() - began
        expected = sha(base / "undisturbed")
        print(f"undisturbed: {whole:.0f} s, {expected[:16]}")
        folder, process = base / "killed", fresh(base / "killed")
        for kill in range(1, options.kills + 1):
            # Before environment.json there is nothing to resume: the run has not begun.
            while not (folder / "environment.json").exists():
                time.sleep(0.05)
            delay = generator.uniform(0, whole)
            try:
                process.wait(delay)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            checkpoints = folder / "checkpoints"
            done = (
                sorted(p.name for p in checkpoints.glob("round-*")) if checkpoints.exists() else []
            )
            status = json.loads((folder / "status.json").read_text())["state"]
            print(f"kill {kill} after {delay:.1f} s: {status}, {done[-1] if done else 'no round'}")
            if done and done[-1] == f"round-{SETTINGS['federation.rounds']:05d}":
                # All rounds are through: to the end, compare, and on with another run.
                start("resume", str(folder)).wait()
                verdict = "equal" if sha(folder) == expected else "DIFFERENT"
                print(f"  to the end: {verdict}")
                if verdict != "equal":
                    sys.exit(1)
                folder = base / f"killed-{kill}"
                process = fresh(folder)
                continue
            process = start("resume", str(folder))
        if process.wait():
            sys.exit("the last attempt failed")
        equal = sha(folder) == expected
        print(f"{options.kills} kills, then to the end: {'equal' if equal else 'DIFFERENT'}")
        sys.exit(not equal)


if __name__ == "__main__":
    main()
