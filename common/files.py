r"""Files that are either complete or absent, in text that UTF-8 can hold.

JSON from outside may name half of a character (a lone surrogate), which no UTF-8 file can hold.
It is kept as its escape, ``\ud800``: where text comes in it is counted (``writable``), and
nothing that is written fails by it (``utf8``).
"""

import contextlib
import errno
import fcntl
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from common.errors import DiskFull

BLOCK_BYTES = 4096
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""A full disk, a full quota, a file beyond the limit of its process."""


@contextlib.contextmanager
def needing_room(name: str) -> Iterator[None]:
    """Turn what a full disk raises into one line that names the file, and no folder.

    Args:
        name: The file's own name; the line may leave a hospital.

    Raises:
        DiskFull: if there is no room.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise DiskFull(
            f"{name} cannot be written: {os.strerror(error.errno)}; fix: make room on the disk"
        ) from error


@contextlib.contextmanager
def atomic_path(target: Path, *, mode: int = 0o600) -> Iterator[Path]:
    """Yield a temporary path beside ``target`` that replaces it only when the block succeeds.

    Raises:
        DiskFull: if there is no room.
    """
    with needing_room(target.name):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            dir=target.parent, prefix=f".{target.name}.", suffix=".part"
        )
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.chmod(mode)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a place beside ``target`` for a folder that takes its name when the block succeeds.

    Processes that make the same folder at once each fill their own; the first to end wins. What
    else the block leaves beside the yielded place is removed.
    """
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
        made = Path(scratch) / target.name
        yield made
        try:
            made.rename(target)
        except OSError:
            if not target.is_dir():
                raise


@contextlib.contextmanager
def locked(path: Path, *, refusal: Exception | None = None) -> Iterator[int]:
    """Hold a file, made when absent, against other processes; the system frees it at their end.

    Args:
        path: The file, for its owner alone.
        refusal: Raised where another process holds it; without one this waits.

    Yields:
        Its descriptor: read it anywhere, write at its end.

    Raises:
        DiskFull: if there is no room for a new file.
    """
    with needing_room(path.name):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (fcntl.LOCK_NB if refusal else 0))
        except BlockingIOError:
            assert refusal is not None
            raise refusal from None
        yield handle
    finally:
        os.close(handle)


def utf8(text: str) -> bytes:
    r"""Return text as every file of ours holds it; in JSON the escape reads back as it was.

    >>> utf8("a\ud800")
    b'a\\ud800'
    """
    return text.encode("utf-8", "backslashreplace")


def writable(value: Any) -> tuple[Any, int]:
    r"""Escape what UTF-8 cannot hold in the texts of a JSON value; count the texts that had it.

    >>> writable({"note": ["fine", "half \ud83d"]})
    ({'note': ['fine', 'half \\ud83d']}, 1)
    """
    if isinstance(value, str):
        text = utf8(value).decode()
        return text, int(text != value)
    if isinstance(value, list | tuple):
        parts = [writable(part) for part in value]
        return [part for part, _ in parts], sum(count for _, count in parts)
    if isinstance(value, Mapping):
        pairs, count = writable([part for pair in value.items() for part in pair])
        return dict(zip(pairs[::2], pairs[1::2], strict=True)), count
    return value, 0


def write_bytes(target: Path, content: bytes) -> None:
    """Write a file atomically, for its owner alone.

    Raises:
        DiskFull: if there is no room.
    """
    with atomic_path(target) as temporary:
        temporary.write_bytes(content)


def write_text(target: Path, text: str) -> None:
    """Write a text file atomically, for its owner alone."""
    write_bytes(target, utf8(text))


def write_bytes_or_over(target: Path, content: bytes) -> None:
    """Write a small file atomically; where that finds no room, over what the file has already.

    A file of at most one block takes no more room when it is written over, so that a failure can
    be told on a full disk.

    Raises:
        DiskFull: if there is no such file, or its new content is longer than a block.
    """
    try:
        write_bytes(target, content)
    except DiskFull:
        if not target.is_file() or len(content) > BLOCK_BYTES:
            raise
        with needing_room(target.name), target.open("r+b") as file:
            file.write(content)
            file.truncate()


def json_document(value: Any) -> str:
    """Render one JSON document for people and programs; NaN and infinity are refused."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(target: Path, value: Any) -> None:
    """Write one JSON document atomically; NaN and infinity are refused, not written."""
    write_text(target, json_document(value))


def json_line(record: Mapping[str, Any]) -> str:
    """Render one line of a JSON-lines file; NaN and infinity are refused.

    >>> json_line({"a": 1}).splitlines()
    ['{"a": 1}']
    """
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def for_owner(path: str, flags: int) -> int:
    """Open a file for ``open(..., opener=for_owner)``: a new one is for its owner alone."""
    return os.open(path, flags, 0o600)


def append_json_line(target: Path, record: Mapping[str, object]) -> None:
    """Append one JSON object as one line, in a single write; a new file is for its owner alone.

    A last line that a crash has torn is removed first, so only one process may write to a file.

    Raises:
        DiskFull: if there is no room; what was there before stays readable.
    """
    with needing_room(target.name), open(target, "a+b", opener=for_owner) as file:
        if _is_torn(file):
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        file.write(utf8(json_line(record)))


def _is_torn(file: BinaryIO) -> bool:
    if file.seek(0, os.SEEK_END) == 0:
        return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"


def read_json_lines(source: Path) -> list[dict[str, Any]]:
    """Read the complete lines of a JSON-lines file; a torn last line is left out.

    Raises:
        ValueError: if a complete line is no JSON object.
    """
    if not source.exists():
        return []
    content = source.read_bytes()
    complete = content[: content.rfind(b"\n") + 1].decode()
    try:
        lines = [json.loads(line) for line in complete.split("\n") if line]
    except RecursionError:
        raise ValueError(f"{source.name} is nested too deep") from None
    if not all(isinstance(line, dict) for line in lines):
        raise ValueError(f"{source.name} has a line that is no JSON object")
    return lines
