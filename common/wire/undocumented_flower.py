"""Flower: its protocol buffers, who runs a task, and its strategies' errors.

Seen alike in 1.41.0 and 1.42.0. What other libraries do not document is in ``common.undocumented``;
this lies here because only ``common.wire`` may import Flower.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from flwr.app import Message
from flwr.common.serde import (
    context_from_proto,
    context_to_proto,
    message_from_proto,
    message_to_proto,
)
from flwr.proto.message_pb2 import Context as ProtoContext
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.serverapp.exception import AppExitException
from flwr.supercore.task_identity import TaskIdentity

NO_UPDATE_CHECK = "FLWR_DISABLE_UPDATE_CHECK"
"""``1``: the commands do not ask for newer releases."""
LAUNCH_POLL_SECONDS = "FLWR_SUPEREXEC_TASK_POLL_INTERVAL"
"""How often who starts a SuperLink's simulations looks for one; 1 unless set."""


def set_message_id(message: Message, message_id: str) -> str:
    """Give a message its id, as Flower's grids do when they send it, and return it."""
    message.metadata.__dict__["_message_id"] = message_id
    return message_id


RUN_ID = 7
"""Of what is no run of Flower's processes."""


@contextmanager
def task_identity() -> Iterator[None]:
    """Say who makes messages, as Flower's processes do: without it none can be made."""
    names = ("_task_id", "_run_id", "_node_id")
    before = {name: getattr(TaskIdentity, name) for name in names}
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN_ID, 1
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(TaskIdentity, name, value)
