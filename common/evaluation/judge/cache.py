"""Every exchange with the judge, kept under the run directory and found by all that was sent.

What the server answered is kept, valid or not: a resumed run goes through the same replies and the
same repair in the same order, and pays for none twice. Failures of the server are not answers, but
a question that it refused (too long, say) is kept as refused, and so is the dialect that it wants.
What a broken call may have cost is kept too, so that the cost limit holds over sessions.

One process writes at a time: whoever judges holds the run's lock.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, RootModel

from common.evaluation.judge.dialect import Dialect
from common.files import append_json_line, read_json_lines
from common.records import Record


class Exchange(Record):
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


class UnansweredCall(Record):
    """What a call without an answer may have cost."""

    unanswered: Literal[True] = Field(default=True, alias="lost")
    input_tokens: int
    output_tokens: int


class RefusedQuestion(Record):
    """A question that the server did not take: the HTTP status, and its first key."""

    refused: int
    key: str


class Spoken(Record):
    """The dialect in which a judge answered; the key names server and judge."""

    dialect: Dialect
    key: str


_Line = RootModel[Exchange | UnansweredCall | RefusedQuestion | Spoken]


def exchange_key(url: str, body: Mapping[str, Any], repeat: int) -> str:
    """Return sha256 over the server, everything that is sent, and the number of the repeat."""
    content = json.dumps([url, body, repeat], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


class Exchanges:
    """What a run's judging has asked and taken so far.

    Args:
        path: A file of JSON lines, for its owner alone; made by the first ``put``.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.by_key: dict[str, Exchange] = {}
        """Oldest first."""
        self.unanswered: list[UnansweredCall] = []
        self.refused: dict[str, int] = {}
        self.dialects: dict[tuple[str, str], Dialect] = {}
        """By server and judge, where it is not the first choice."""
        for line in read_json_lines(path):
            self._take(_Line.model_validate(line).root)

    def put(self, line: Exchange | UnansweredCall | RefusedQuestion | Spoken) -> None:
        """Keep what came of a call, written before this returns.

        Raises:
            DiskFull: if there is no room.
        """
        self._take(line)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.touch(mode=0o600)
        append_json_line(self._path, line.as_json())

    def speak(self, server: str, judge: str, dialect: Dialect) -> None:
        """Keep the dialect in which a judge answered."""
        if self.dialects.get((server, judge)) != dialect:
            self.put(Spoken(dialect=dialect, key=f"{server} {judge}"))

    def _take(self, line: Exchange | UnansweredCall | RefusedQuestion | Spoken) -> None:
        match line:
            case Exchange():
                self.by_key[line.key] = line
            case UnansweredCall():
                self.unanswered.append(line)
            case RefusedQuestion():
                self.refused[line.key] = line.refused
            case Spoken():
                server, _, judge = line.key.partition(" ")
                self.dialects[server, judge] = line.dialect
