"""Seconds per message of a deployed hospital, with and without its resident worker.

    python benchmarks/resident_worker.py --backbone embedded --messages 4

Flower starts a new process for every message. Each is measured here from its start to its end, as
the ClientApp runs it: once loading the backbone itself, once handing the message to the worker.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
MESSAGE = """
import sys
from flwr.app import ConfigRecord, Context, Message, RecordDict
from client.app import app
from common.wire.undocumented_flower import TaskIdentity
from common.configio import flatten, from_flat
TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 7, 1
folder, backbone, worker = sys.argv[1:]
node = {"partition-id": 0, "num-partitions": 3, **({"worker": worker} if worker else {})}
config = {"model.backbone": backbone, "run.directory": folder, "data.synthetic-patients": 40}
message = Message(RecordDict({"config": ConfigRecord({"round": 0})}), 1, "query")
reply = app(message, Context(7, 1, node, RecordDict(), flatten(from_flat(config))))
assert reply.has_content()
"""


def seconds_per_message(folder: Path, backbone: str, worker: str, messages: int) -> list[float]:
    """Time each message's process from start to end."""
    times = []
    for _ in range(messages):
        started = time.monotonic()
        arguments = [str(folder), backbone, worker]
        subprocess.run([sys.executable, "-c", MESSAGE, *arguments], check=True, env=ENVIRONMENT)
        times.append(round(time.monotonic() - started, 2))
    return times


def main() -> None:
    """Measure both ways and print the seconds of each message."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="tiny")
    parser.add_argument("--messages", type=int, default=4)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        alone = seconds_per_message(folder / "a", options.backbone, "", options.messages)
        socket = str(folder / "s")
        command = [sys.executable, "-c", "from sim.cli.main import main; main()", "worker"]
        worker = subprocess.Popen([*command, "--socket", socket], env=ENVIRONMENT)
        try:
            while not Path(socket).exists():
                time.sleep(0.1)
            resident = seconds_per_message(folder / "b", options.backbone, socket, options.messages)
        finally:
            worker.terminate()
            worker.wait()
        loads = [
            json.loads(file.read_text())["backbone_loads"]
            for file in (folder / "b" / "workers").glob("*.json")
        ]
    figures = {"alone_seconds": alone, "resident_seconds": resident, "resident_loads": loads}
    print(json.dumps({"backbone": options.backbone, **figures}, indent=2))


if __name__ == "__main__":
    main()
