"""Files that are either complete or absent."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def atomic_path(target: Path, *, mode: int = 0o600) -> Iterator[Path]:
    """Yield a temporary path beside ``target`` that replaces it only when the block succeeds."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
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


def write_text(target: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(target: Path, value: Any) -> None:
    """Write one JSON document atomically; NaN and infinity are refused, not written."""
    write_text(target, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def json_line(record: dict[str, Any]) -> str:
    """Render one line of a JSON-lines file; NaN and infinity are refused.

    >>> json_line({"a": 1}).splitlines()
    ['{"a": 1}']
    """
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def append_json_line(target: Path, record: dict[str, Any]) -> None:
    """Append one JSON object as one line, in a single write."""
    with target.open("a", encoding="utf-8") as file:
        file.write(json_line(record))


def read_json_lines(source: Path) -> list[dict[str, Any]]:
    """Read the complete lines of a JSON-lines file; a torn last line is left out."""
    if not source.exists():
        return []
    text = source.read_text(encoding="utf-8")
    complete = text[: text.rfind("\n") + 1]
    return [json.loads(line) for line in complete.split("\n") if line]
