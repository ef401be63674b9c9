"""A federation in this process: the same two apps, no SuperLink, no Ray.

Every message is turned into bytes and back, as on the wire, and each hospital is answered in turn
by the client app's own handlers; so the result is that of the simulation on Ray, to the last bit
of B, and a debugger may stop anywhere.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid

import client.app
from common.config import Config
from common.configio import flatten
from common.data.dataset import Dataset
from common.wire.undocumented_flower import (
    RUN_ID,
    ProtoMessage,
    message_from_proto,
    message_to_proto,
    set_message_id,
    task_identity,
)
from server.app import main
from server.strategy import rounds_not_printed

FAILED = 2
"""Flower's code of a client app that raised."""


@dataclass
class InProcessGrid(Grid):
    """Answers each message as soon as it is pushed.

    A hospital is known by its index, from 0; node ids are ``100 + 7 * index``.
    """

    config: Config
    on_tick: Callable[[], None] = lambda: None
    """Called after each message, to show progress."""
    replies: dict[str, Message] = field(default_factory=dict)
    """By the id of the message that they answer."""

    def set_run(self, *args: Any, **kwargs: Any) -> None:
        """Take no notice: there is one run."""

    @property
    def run(self) -> Any:
        """Flower's facts of a run, which our server does not ask for."""
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Make no message: our server makes its own."""
        raise NotImplementedError

    def send_and_receive(self, *args: Any, **kwargs: Any) -> Iterable[Message]:
        """Wait for nothing: our server pushes and pulls."""
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes of all hospitals."""
        return [self.node(index) for index in range(self.config.federation.hospitals)]

    def node(self, index: int) -> int:
        """Return the node id of a hospital."""
        return 100 + 7 * index

    def index(self, node: int) -> int:
        """Return the hospital of a node id."""
        return (node - 100) // 7

    def push_messages(self, messages: Iterable[Message], *_: Any, **__: Any) -> Iterable[str]:
        """Have every message answered; return their ids."""
        names = []
        for message in messages:
            names.append(set_message_id(message, str(uuid4())))
            arrived, data = through_the_wire(message)
            index = self.index(message.metadata.dst_node_id)
            self.note("down", index, arrived, data)
            reply = self.answer(index, arrived)
            if reply is not None:
                back, data = through_the_wire(reply)
                self.note("up", index, back, data)
                self.replies[back.metadata.reply_to_message_id] = back
            self.on_tick()
        return names

    def pull_messages(self, message_ids: Iterable[str], *_: Any, **__: Any) -> Iterable[Message]:
        """Return the answers to the messages named, each once."""
        return [self.replies.pop(name) for name in message_ids if name in self.replies]

    def note(self, direction: str, index: int, message: Message, data: bytes) -> None:
        """Take note of a message as it travels; nothing here."""

    def answer(self, index: int, message: Message) -> Message | None:
        """Return a hospital's reply; an error where its work fails, as in Flower's simulation."""
        context = Context(
            run_id=RUN_ID,
            node_id=self.node(index),
            node_config={
                "partition-id": index,
                "num-partitions": self.config.federation.hospitals,
            },
            state=RecordDict(),
            run_config=flatten(self.config),
        )
        try:
            return client.app.app(message, context)
        except Exception as error:
            return Message(Error(code=FAILED, reason=str(error)), reply_to=message)


def through_the_wire(message: Message) -> tuple[Message, bytes]:
    """Return a message as its receiver reads it, and the bytes that it travelled as."""
    data = message_to_proto(message).SerializeToString()
    return message_from_proto(ProtoMessage.FromString(data)), data


def run_in_process(config: Config, data: Dataset, *, on_tick: Callable[[], None]) -> None:
    """Run the federation of ``config`` to its end, in this process.

    Args:
        config: Complete, with ``run.directory`` absolute.
        data: Its own; the nodes do not read it again.
        on_tick: Called after each message, to show progress.

    Raises:
        RunFailed: as the server app raises it.
    """
    client.app.worker().keep_data(config, data)
    with task_identity(), rounds_not_printed():
        main(
            InProcessGrid(config, on_tick),
            Context(RUN_ID, 0, {}, RecordDict(), flatten(config)),
        )
