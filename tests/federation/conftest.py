"""A grid in this process: the real server app and the real client app, every byte serialised."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import psutil
import pytest
from flwr.app import Context, Error, Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

import client.app
from common.config import Config
from common.configio import flatten, from_flat
from common.rundir import RunDirectory
from server.app import federate, main, run_directory

Tamper = Callable[[Message, Message], Message | None]
"""Gets the message to a hospital and its honest reply, and returns what is sent instead."""


def through_the_wire(message: Message) -> tuple[Message, bytes]:
    data = message_to_proto(message).SerializeToString()
    return message_from_proto(ProtoMessage.FromString(data)), data


@dataclass
class FakeGrid(Grid):
    """Answers each message at once by the client app's own handlers.

    Node ids are ``100 + 7 * place``; a hospital's place is its index (from 0) unless ``places``
    says otherwise.
    """

    config: Config
    tamper: dict[int, Tamper] = field(default_factory=dict)
    places: Sequence[int] = ()
    """Hospital's index -> place of its node id."""
    order: np.random.Generator | None = None
    """Shuffles the replies, and hands them over one at a time."""
    online: Callable[[int, int], bool] = lambda index, server_round: True
    """Whether a hospital is connected, given the last round that was asked for."""
    messages: list[tuple[str, int, bytes]] = field(default_factory=list)
    """Direction, hospital index and serialised message of everything on the wire."""
    seen_round: int = 0
    on_message: Callable[["FakeGrid", Message], None] = lambda grid, message: None
    replies: dict[str, Message] = field(default_factory=dict)

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any: ...

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return [
            self.node(index)
            for index in range(self.config.federation.hospitals)
            if self.online(index, self.seen_round)
        ]

    def node(self, index: int) -> int:
        return 100 + 7 * (self.places[index] if self.places else index)

    def index(self, node: int) -> int:
        place = (node - 100) // 7
        return self.places.index(place) if self.places else place

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        names = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid4())
            arrived, data = through_the_wire(message)
            index = self.index(message.metadata.dst_node_id)
            self.seen_round = max(
                self.seen_round, next(iter(arrived.content.config_records.values()))["round"]
            )
            self.on_message(self, arrived)
            self.messages.append(("down", index, data))
            names.append(message.metadata.message_id)
            reply = self._answer(index, arrived)
            if reply is not None:
                back, data = through_the_wire(reply)
                self.messages.append(("up", index, data))
                self.replies[back.metadata.reply_to_message_id] = back
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        ready = [name for name in message_ids if name in self.replies]
        if self.order is not None and ready:
            ready = [str(self.order.choice(ready))]
        return [self.replies.pop(name) for name in ready]

    def _answer(self, index: int, message: Message) -> Message | None:
        context = Context(
            run_id=7,
            node_id=self.node(index),
            node_config={
                "partition-id": index,
                "num-partitions": self.config.federation.hospitals,
            },
            state=RecordDict(),
            run_config=flatten(self.config),
        )
        try:
            reply = client.app.app(message, context)
        except Exception as error:  # as Flower's simulation reports a failing client
            return Message(Error(code=2, reason=str(error)), reply_to=message)
        tamper = self.tamper.get(index)
        return tamper(message, reply) if tamper else reply


@dataclass(frozen=True)
class Federation:
    """A finished in-process federation."""

    run: RunDirectory
    grid: FakeGrid

    @property
    def summary(self) -> dict[str, Any]:
        return self.run.read_json("summary.json")

    @property
    def sha(self) -> str:
        return str(self.summary["b_sha256"])

    def refused(self) -> list[tuple[int, str, str]]:
        return [(e["round"], e["hospital"], e["value"]) for e in self.run.metrics("refused")]


TINY = {
    "data.synthetic-patients": 40,
    "model.backbone": "tiny",
    "adapter.rank": 4,
    "train.optimizer": "adamw",
    "train.learning-rate": 0.02,
    "train.batch-size": 2,
    "train.max-length": 192,
    "train.dtype": "fp32",
    "train.device": "cpu",
    "train.threads": 1,
    "federation.hospitals": 3,
    "federation.rounds": 2,
    "federation.local-steps": 2,
    "evaluation.validation-samples": 2,
}


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., Config]:
    """Build a configuration of the smallest federation; keywords override dotted keys."""

    def build(**overrides: Any) -> Config:
        dotted = {k.replace("__", ".").replace("_", "-"): v for k, v in overrides.items()}
        return from_flat({**TINY, **dotted})

    return build


@pytest.fixture(autouse=True, scope="session")
def task_identity() -> None:
    """Flower's messages ask who they come from."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 7, 1


@pytest.fixture
def in_process(tmp_path: Path) -> Callable[..., Federation]:
    """Run a federation in this process: ``in_process(config, tamper=..., resume=...)``."""
    count = 0

    def start(config: Config, *, resume: RunDirectory | None = None, **grid: Any) -> Federation:
        nonlocal count
        count += 1
        folder = resume.path if resume else tmp_path / f"run-{count}"
        config = replace(config, run=replace(config.run, directory=str(folder)))
        run = resume or run_directory(config)
        fake = FakeGrid(config, **grid)
        federate(fake, config, run)
        return Federation(run, fake)

    return start


@pytest.fixture
def run_main() -> Callable[[Config], None]:
    """Run a federation in this process by the server app's own entry, which writes its status."""

    def start(config: Config) -> None:
        main(FakeGrid(config), Context(7, 0, {}, RecordDict(), flatten(config)))

    return start


@pytest.fixture
def copy_run(tmp_path: Path) -> Callable[[RunDirectory], RunDirectory]:
    """Copy a run directory, as it lies on the disk."""

    def copy(run: RunDirectory) -> RunDirectory:
        target = tmp_path / f"copy-{uuid4().hex[:6]}"
        shutil.copytree(run.path, target)
        return RunDirectory(target)

    return copy


REPOSITORY = Path(__file__).resolve().parents[2]
SPY = Path(__file__).parent / "spy"
RUN_SECONDS = 900


@dataclass
class Started:
    """A ``fedrx`` process on real Flower and Ray."""

    process: subprocess.Popen[str]
    run: RunDirectory
    spy: Path
    out: str = ""
    error: str = ""

    def wait(self) -> "Started":
        self.out, self.error = self.process.communicate(timeout=RUN_SECONDS)
        return self

    @property
    def code(self) -> int:
        return self.process.returncode

    @property
    def summary(self) -> dict[str, Any]:
        return self.run.read_json("summary.json")

    def processes(self) -> list[dict[str, Any]]:
        """What every Python process of the run said about itself."""
        return [json.loads(file.read_text()) for file in sorted(self.spy.glob("process-*.json"))]

    def left(self) -> list[str]:
        """Command lines of living processes that belong to the run."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.pid != self.process.pid and self.belongs(process):
                    found.append(" ".join(process.cmdline()))
        return found

    def belongs(self, process: psutil.Process) -> bool:
        return process.environ().get("FEDRX_SPY") == str(self.spy)

    def wait_until(self, ready: Callable[[RunDirectory], bool]) -> None:
        deadline = time.monotonic() + RUN_SECONDS
        while not ready(self.run) and time.monotonic() < deadline:
            assert self.process.poll() is None, self.wait().error
            time.sleep(0.02)


def start_fedrx(
    arguments: Sequence[str], run: Path, spy: Path, *, cwd: Path, **environment: str
) -> Started:
    """Start ``fedrx`` in its own process group, from ``cwd``."""
    spy.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", STARTER, *arguments],
        cwd=cwd,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(SPY), str(REPOSITORY)]),
            "FEDRX_SPY": str(spy),
            "OMP_NUM_THREADS": "1",
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    return Started(process, RunDirectory(run), spy)


STARTER = "from sim.cli import main; main()"


def settings(config: Config) -> list[str]:
    """Return the ``--set`` options that make a configuration of the defaults."""
    return [
        part
        for key, value in flatten(config).items()
        if value != flatten(Config())[key]
        for part in ("--set", f"{key}={value}")
    ]


@dataclass
class Laboratory:
    """Starts real federations below one folder."""

    folder: Path
    config: Config

    def start(
        self, name: str, *, cwd: Path | None = None, environment: Any = None, **overrides: Any
    ) -> Started:
        dotted = {k.replace("__", ".").replace("_", "-"): v for k, v in overrides.items()}
        config = from_flat({**flatten(self.config), **dotted})
        empty = self.folder / "empty.toml"
        empty.write_text("")
        run = self.folder / name
        return start_fedrx(
            ["federate", str(empty), "--run-dir", str(run), "--json", *settings(config)],
            run,
            self.folder / f"spy {name}",
            cwd=cwd or self.folder,
            **(environment or {}),
        )

    def resume(self, run: RunDirectory, *options: str) -> Started:
        spy = self.folder / f"spy {uuid4().hex[:8]}"
        arguments = ["resume", str(run.path), "--json", *options]
        return start_fedrx(arguments, run.path, spy, cwd=self.folder)


@pytest.fixture(scope="session")
def laboratory(tmp_path_factory, tiny_config) -> Laboratory:
    config = tiny_config(federation__workers=2, evaluation__samples=2, evaluation__max_new_tokens=8)
    return Laboratory(tmp_path_factory.mktemp("laboratory"), config)


DECOY = "raise RuntimeError('the wrong package was imported')\n"


@pytest.fixture(scope="session")
def decoys(tmp_path_factory) -> Path:
    """A folder in which every package of ours has a decoy that must never be imported."""
    folder = tmp_path_factory.mktemp("decoys")
    for package in ("client", "server", "common"):
        (folder / package).mkdir()
        (folder / package / "__init__.py").write_text(DECOY)
        (folder / package / "app.py").write_text(DECOY)
    return folder


@pytest.fixture(scope="session")
def base(laboratory, decoys) -> Started:
    """One finished federation: two workers, started beside decoys, into a folder with blanks."""
    return laboratory.start("a run, größer", cwd=decoys).wait()


class FakeProxy:
    """Counts who comes, and hangs up."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.seen: list[bytes] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                with connection:
                    connection.settimeout(5)
                    with contextlib.suppress(OSError):
                        self.seen.append(connection.recv(200))

    def environment(self) -> dict[str, str]:
        """What a hospital's network sets: proxies for everything, and no exceptions."""
        schemes = ("http", "https", "all", "grpc")
        proxies = {f"{one}_proxy": self.url for one in schemes}
        return proxies | {name.upper(): url for name, url in proxies.items()}

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def fake_proxy() -> Iterator[FakeProxy]:
    proxy = FakeProxy()
    yield proxy
    proxy.close()
