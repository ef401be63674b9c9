"""A hospital's resident worker: one process that keeps the backbone over messages.

In a deployment Flower starts a new process for every message (flwr issue 3670), and loading an 8B
backbone takes minutes. The ClientApp hands its message to this worker over a unix socket that
only its owner may open. A worker serves one source digest: code that differs from the app's is
refused, and the backbone is kept by its name, device and dtype
(``common.training.worker``).

A request is one JSON line (kind, source digest, sizes) and two protocol buffers, message and
context; the answer is one JSON line (error or size) and one protocol buffer. Whatever a request
does, the worker serves the next one: a torn request is dropped, and only the type of what went
wrong is logged.
"""

import contextlib
import logging
import os
import socket
import stat
from collections.abc import Iterator
from io import BufferedRWPair
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from flwr.app import Context, Message
from pydantic import Field

from common.errors import FedrxError, RunFailed, UserError
from common.provenance import source_digest
from common.records import Record
from common.wire.undocumented_flower import (
    ProtoContext,
    ProtoMessage,
    context_from_proto,
    context_to_proto,
    message_from_proto,
    message_to_proto,
)

if TYPE_CHECKING:
    from common.training.worker import Worker

LONGEST_PATH_BYTES = 100
"""Unix sockets have short names."""
LONGEST_HEAD_BYTES = 4096
Size = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
"""Bytes; protocol buffers are never larger."""
STALL_SECONDS = 60.0
"""Longest wait for the next bytes of a request, and for a reply to be taken."""
SILENT = "the resident worker gave no answer"
_log = logging.getLogger(__name__)


class Request(Record):
    """The head of a request."""

    kind: str
    source: str
    """The digest of the code that the app runs."""
    sizes: tuple[Size, Size]
    """Of message and context."""


class Answer(Record):
    """The head of an answer: an error, or the size of the reply."""

    error: str = ""
    size: Size = 0


def ask(path: Path, kind: str, message: Message, context: Context, *, source: str = "") -> Message:
    """Let the resident worker answer a message.

    ``source`` is the digest of the bundle that came with the message, by default this process's;
    the worker refuses one that is not its own.

    Raises:
        RunFailed: if there is no worker, it runs other code, or the hospital's work fails.
    """
    parts = [
        message_to_proto(message).SerializeToString(),
        context_to_proto(context).SerializeToString(),
    ]
    sizes = len(parts[0]), len(parts[1])
    head = Request(kind=kind, source=source or source_digest(), sizes=sizes)
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(str(path))
        except OSError as error:
            raise RunFailed(f"the resident worker does not answer: {error.strerror}") from None
        try:
            with connection.makefile("rwb") as stream:
                _write(stream, head, parts)
                answer = Answer.model_validate_json(stream.readline())
                data = _read(stream, answer.size)
        except (OSError, ValueError):
            raise RunFailed(SILENT) from None
    if answer.error:
        raise RunFailed(answer.error)
    return message_from_proto(ProtoMessage.FromString(data))


def listens(path: Path) -> bool:
    """Tell whether a worker listens on a socket; one that was killed has left its file behind."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


@contextlib.contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    """Open the worker's socket (mode 0600) in a folder of its own user (mode 0700).

    Raises:
        UserError: if the path is too long, another worker listens there, or something else than a
            socket is there, which stays as it is.
    """
    if len(bytes(path)) > LONGEST_PATH_BYTES:
        raise UserError(
            f"socket path of {len(bytes(path))} bytes",
            allowed=f"{LONGEST_PATH_BYTES}",
            fix="name a shorter --socket",
        )
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if listens(path):
        raise UserError(f"a worker listens on {path} already", fix="end it first")
    if os.path.lexists(path):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise UserError(
                f"--socket {path} is there and no socket", fix="name a file that does not exist"
            )
        path.unlink()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        path.chmod(0o600)
        server.listen()
        try:
            yield server
        finally:
            path.unlink(missing_ok=True)


def serve(server: socket.socket) -> None:
    """Answer one message after another until the process is ended."""
    from common.training.worker import Worker

    worker = Worker()
    while True:
        connection, _ = server.accept()
        try:
            connection.settimeout(STALL_SECONDS)
            with connection, connection.makefile("rwb") as stream:
                _serve_one(stream, worker)
        except Exception as error:  # one connection must not end the worker of all others
            _log.warning("a request was dropped: %s", type(error).__name__)


def _serve_one(stream: BufferedRWPair, worker: "Worker") -> None:
    from client.handlers import answer

    line = stream.readline(LONGEST_HEAD_BYTES)
    if not line:
        return
    head = Request.model_validate_json(line)
    message_size, context_size = head.sizes
    message = message_from_proto(ProtoMessage.FromString(_read(stream, message_size)))
    context = context_from_proto(ProtoContext.FromString(_read(stream, context_size)))
    try:
        if head.source != source_digest():
            raise RunFailed("the resident worker runs other code than the app; restart it")
        reply = answer(head.kind, message, context, worker)
    except FedrxError as failure:
        _write(stream, Answer(error=str(failure)), [])
        return
    data = message_to_proto(reply).SerializeToString()
    _write(stream, Answer(size=len(data)), [data])


def _read(stream: BufferedRWPair, size: int) -> bytes:
    """Read exactly so many bytes.

    Raises:
        ValueError: if the other side ends before.
    """
    data = stream.read(size)
    if len(data) < size:
        raise ValueError("the stream ended early")
    return data


def _write(stream: BufferedRWPair, head: Record, parts: list[bytes]) -> None:
    stream.write(head.model_dump_json().encode() + b"\n")
    for part in parts:
        stream.write(part)
    stream.flush()
