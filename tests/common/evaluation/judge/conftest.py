"""A local OpenAI-compatible server that does as a test says, and runs to judge with it."""

import asyncio
import contextlib
import json
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from line_fixtures import prediction_line

from common.config import Config, JudgeConfig
from common.records.run import RunRecord
from common.rundir import RunDirectory


@dataclass
class Answer:
    """What the server does with one request."""

    text: str | None = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    raw: bytes | None = None
    """In place of a completion."""
    delay_seconds: float = 0.0
    drip_seconds: float = 0.0
    """Between bytes."""
    close: bool = False
    """Hang up in the middle of the body."""
    finish: str = "stop"
    message: dict[str, Any] = field(default_factory=dict)
    """More of the message, or other content."""
    usage: dict[str, int] | None = field(
        default_factory=lambda: {"prompt_tokens": 100, "completion_tokens": 20}
    )


Behaviour = Callable[[dict[str, Any], int], Answer]


class Server(ThreadingHTTPServer):
    """Records every request; ``behave(body, number)`` answers it (number counts from 0)."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behave: Behaviour = lambda body, number: Answer(verdicts(body))
        self.requests: list[tuple[str, bytes]] = []
        self.lock = threading.Lock()
        self.in_flight = self.most_in_flight = 0

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [json.loads(content) for _, content in self.requests]

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    """The body goes out with its head, not when that is acknowledged, 40 ms later."""
    server: Server

    def do_POST(self) -> None:
        server = self.server
        content = self.rfile.read(int(self.headers.get("content-length", 0)))
        with server.lock:
            number = len(server.requests)
            server.requests.append((str(self.headers), content))
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
        try:
            answer = server.behave(json.loads(content), number)
            time.sleep(answer.delay_seconds)
        finally:
            # Before the answer is sent: whoever has it may call again at once.
            with server.lock:
                server.in_flight -= 1
        self._answer(answer)

    def _answer(self, answer: Answer) -> None:
        content = answer.raw
        if content is None:
            choice = {"index": 0, "finish_reason": answer.finish}
            message = {"role": "assistant", "content": answer.text, **answer.message}
            document = {"id": "x", "object": "chat.completion", "model": "m", "created": 0}
            document["choices"] = [{**choice, "message": message}]
            content = json.dumps({**document, "usage": answer.usage}).encode()
        self.send_response(answer.status)
        for name, value in {"content-type": "application/json", **answer.headers}.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        if answer.close:
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return
        for start in range(0, len(content), 1 if answer.drip_seconds else len(content) or 1):
            size = 1 if answer.drip_seconds else len(content)
            self.wfile.write(content[start : start + size])
            self.wfile.flush()
            time.sleep(answer.drip_seconds)

    def log_message(self, *arguments: Any) -> None:
        pass


def listed(body: dict[str, Any]) -> list[str]:
    """Read the drugs out of a request as a judge would."""
    text = next(m["content"] for m in body["messages"] if m["role"] == "user")
    line = next(line for line in text.splitlines() if line.startswith("Drugs ("))
    names: list[str] = json.loads(line.split(": ", 1)[1])
    return names


def verdicts(body: dict[str, Any], suitable: Callable[[str], bool] = lambda _: True) -> str:
    """A right reply: one verdict per listed drug."""
    return json.dumps(
        {"drugs": [{"drug": d, "suitable": suitable(d), "reason": "so"} for d in listed(body)]}
    )


@pytest.fixture(autouse=True)
def no_authorities(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read no certificates for a client on loopback: 30 ms each."""
    monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", lambda *_: None)


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


@pytest.fixture
def other_server() -> Iterator[Server]:
    with serving() as running:
        yield running


class StandingClock:
    """Stands still but for the time that somebody waits by it, which passes at once and is kept."""

    def __init__(self) -> None:
        self.moment, self.slept = 100.0, list[float]()

    def now(self) -> float:
        return self.moment

    monotonic = now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.moment += seconds


class HeldClock(StandingClock):
    """Whoever waits by it waits until the test lets the time pass."""

    def __init__(self) -> None:
        super().__init__()
        self.over = asyncio.Event()

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        await self.over.wait()

    def passes(self, seconds: float) -> None:
        self.moment += seconds
        self.over.set()


PATIENT = {"sex": "F", "age": "> 89", "height_cm": 160.0, "weight_kg": None, "bmi": None}


def line(case: str, model: str, answer: list[str] | None, cluster: int = 0) -> dict[str, Any]:
    """One line of predictions.jsonl."""
    diagnoses = ["Sepsis, unspecified organism", "Essential (primary) hypertension"]
    told = {"cluster": cluster, "patient": PATIENT, "diagnoses": diagnoses}
    return prediction_line(case, model, answer, truth=["Truthdrug"], text="raw text", **told)


@pytest.fixture
def kit() -> SimpleNamespace:
    """What tests build servers' answers, predictions and clocks with."""
    return SimpleNamespace(
        Answer=Answer,
        verdicts=verdicts,
        listed=listed,
        line=line,
        StandingClock=StandingClock,
        HeldClock=HeldClock,
    )


MakeRun = Callable[..., RunDirectory]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Make a run directory with these predictions and this source tag."""

    def make(
        lines: list[dict[str, Any]], source: str | None = "synthetic", name: str = "run"
    ) -> RunDirectory:
        run = RunDirectory.create(Config(), directory=tmp_path / name)
        run.write_json("run.json", RunRecord(mode="federation", resumable=True))
        for record in lines:
            run.append("predictions.jsonl", record)
        run.write_json("summary.json", {"rounds": 4, **({"source": source} if source else {})})
        return run

    return make


@pytest.fixture
def judge_config(server: Server) -> Callable[..., JudgeConfig]:
    """Settings for the test server."""

    def make(**values: Any) -> JudgeConfig:
        base = {"base_url": server.url, "model": "judge-1", "timeout_seconds": 5.0, "attempts": 3}
        return JudgeConfig(**{**base, **values})

    return make
