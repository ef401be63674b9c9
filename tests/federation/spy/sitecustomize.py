"""Loaded by every Python process of a spied run: tells what it is, and dumps what it sends.

``FEDRX_SPY`` is the folder to write to. ``FEDRX_SPY_CRASH`` makes every hospital crash when it
opens its step log.
"""

import json
import os
import sys
from pathlib import Path

FOLDER = os.environ.get("FEDRX_SPY")


def tell() -> None:
    facts = {
        "argv": sys.orig_argv,
        "cwd": str(Path.cwd()),
        "environment": {
            key: value
            for key, value in os.environ.items()
            if key.startswith(("FLWR_", "RAY_", "HF_", "FEDRX_"))
        },
    }
    (Path(FOLDER) / f"process-{os.getpid()}.json").write_text(json.dumps(facts))


def dump_messages() -> None:
    from flwr.common.serde import message_to_proto
    from flwr.superlink.grid.inmemory_grid import InMemoryGrid

    push, pull = InMemoryGrid.push_messages, InMemoryGrid.pull_messages
    count = 0

    def write(direction, message):
        nonlocal count
        count += 1
        data = message_to_proto(message).SerializeToString()
        (Path(FOLDER) / f"message-{count:05d}-{direction}.bin").write_bytes(data)

    def pushed(self, messages):
        messages = list(messages)
        for message in messages:
            write("down", message)
        return push(self, messages)

    def pulled(self, message_ids):
        messages = list(pull(self, message_ids))
        for message in messages:
            if not message.has_error():
                write("up", message)
        return messages

    InMemoryGrid.push_messages, InMemoryGrid.pull_messages = pushed, pulled


def crash(event: str, arguments: tuple) -> None:
    if event == "open" and str(arguments[0]).endswith("steps.jsonl"):
        raise ValueError("planted crash of a hospital")


if FOLDER:
    tell()
    if any("flwr-simulation" in part for part in sys.orig_argv):
        dump_messages()
    if os.environ.get("FEDRX_SPY_CRASH"):
        sys.addaudithook(crash)
