"""Flower's ClientApp of a hospital.

It imports nothing heavy: in a deployment every message is a new process, which only hands the
message to the hospital's resident worker (``client.resident_worker``), where the backbone is in
memory.
"""

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from common.quick_imports import quick_imports

if TYPE_CHECKING:
    from common.training.worker import Worker

app = ClientApp()
WORKER = "worker"
"""Key of the node configuration: the resident worker's socket."""


@functools.cache
def worker() -> "Worker":
    """Return what this process keeps: Flower hands an app nothing of its own from call to call."""
    from common.training.worker import Worker

    return Worker()


@app.query()
def query(message: Message, context: Context) -> Message:
    """Answer the handshake."""
    return _answer("query", message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train one round."""
    return _answer("train", message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Return the validation loss of the global B."""
    return _answer("evaluate", message, context)


def _answer(kind: str, message: Message, context: Context) -> Message:
    if WORKER in context.node_config:
        from client.resident_worker import ask

        return ask(Path(str(context.node_config[WORKER])), kind, message, context)
    with quick_imports():
        from client.handlers import answer

    return answer(kind, message, context, worker())
