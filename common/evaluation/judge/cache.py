"""Every exchange with the judge, kept under the run directory and found by all that was sent.

What the server answered is kept, valid or not: a resumed run goes through the same replies and the
same repair in the same order, and pays for none twice. Failures of the server are not answers, but
a question that it refused (too long, say) is kept as refused, and so is the dialect that it wants.
What a broken call may have cost is kept too, so that the cost limit holds over sessions.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from common.errors import UserError
from common.files import locked, needing_room


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """One answered call."""

    key: str
    text: str
    """What the judge said; empty when it said nothing."""
    cut: bool
    """The server stopped it at the token limit."""
    served_by: str
    """The model's name as the server gave it."""
    input_tokens: int
    output_tokens: int
    counted: bool
    """False when the server gave no usage, and the tokens are the upper bound."""


def exchange_key(url: str, body: Mapping[str, Any], repeat: int) -> str:
    """Return sha256 over the server, everything that is sent, and the number of the repeat."""
    content = json.dumps([url, body, repeat], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(kw_only=True)
class Exchanges:
    """What a run's judging has asked and taken so far."""

    by_key: dict[str, Exchange] = field(default_factory=dict)
    lost_input_tokens: int = 0
    """What calls without an answer may have cost."""
    lost_output_tokens: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    """Status with which a question was refused, by its first key."""
    dialects: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By server and judge, where it is not the first choice."""

    def get(self, key: str) -> Exchange | None:
        """Return the exchange of this key, if there was one."""
        return self.by_key.get(key)

    def all(self) -> list[Exchange]:
        """Return all exchanges, oldest first."""
        return list(self.by_key.values())


def read_exchanges(path: Path) -> Exchanges:
    """Read the complete lines of the file; an absent one holds nothing."""
    found = Exchanges()
    content = path.read_bytes() if path.exists() else b""
    for line in content[: content.rfind(b"\n") + 1].splitlines():
        record = json.loads(line)
        if "refused" in record:
            found.refused[record["key"]] = record["refused"]
        elif "dialect" in record:
            found.dialects[record["key"]] = record["dialect"]
        elif record.get("lost"):
            found.lost_input_tokens += record["input_tokens"]
            found.lost_output_tokens += record["output_tokens"]
        else:
            exchange = Exchange(**record)
            found.by_key[exchange.key] = exchange
    return found


class ExchangeCache:
    """Appends to one JSON-lines file (mode 0600) that one process holds at a time.

    Args:
        path: The file; made when absent. A line that a crash tore off is removed.

    Raises:
        UserError: If another process is judging the same run.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        busy = UserError(
            "another `fedrx judge` is at work on this run",
            fix="wait for it, or end it; what it has paid for is kept",
        )
        self._held = ExitStack()
        handle = self._held.enter_context(locked(path, refusal=busy))
        self._file = self._held.enter_context(
            os.fdopen(handle, "a", encoding="utf-8", closefd=False)
        )
        self.exchanges = read_exchanges(path)
        self._file.truncate(path.read_bytes().rfind(b"\n") + 1)

    def __enter__(self) -> "ExchangeCache":
        """Hold the file."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let the file go."""
        self._held.close()

    def put(self, exchange: Exchange) -> None:
        """Keep an exchange, written before this returns."""
        self.exchanges.by_key[exchange.key] = exchange
        self._append(asdict(exchange))

    def put_lost(self, input_tokens: int, output_tokens: int) -> None:
        """Keep what a call without an answer may have cost."""
        self.exchanges.lost_input_tokens += input_tokens
        self.exchanges.lost_output_tokens += output_tokens
        self._append({"lost": True, "input_tokens": input_tokens, "output_tokens": output_tokens})

    def put_refused(self, key: str, status: int) -> None:
        """Keep that a question was refused."""
        self.exchanges.refused[key] = status
        self._append({"refused": status, "key": key})

    def put_dialect(self, key: str, dialect: dict[str, Any]) -> None:
        """Keep the dialect in which a judge answered."""
        if self.exchanges.dialects.get(key) != dialect:
            self.exchanges.dialects[key] = dialect
            self._append({"dialect": dialect, "key": key})

    def _append(self, record: dict[str, Any]) -> None:
        with needing_room("the judge's answers"):
            self._file.write(json.dumps(record, ensure_ascii=True) + "\n")
            self._file.flush()
