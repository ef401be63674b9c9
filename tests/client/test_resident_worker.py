"""The resident worker alone, in its own process."""

import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path
from socket import AF_UNIX, SHUT_RDWR
from socket import socket as Socket

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.common.serde import context_to_proto, message_to_proto
from waiting import until

import client.resident_worker
from client.handlers import answer
from common.configio import flatten
from common.errors import RunFailed, UserError
from common.provenance import source_digest
from common.training.worker import Worker

SECONDS = 300
SECRET = "mrn-10023456"
HEAD = {"kind": "query", "source": source_digest()}


@pytest.fixture
def socket(tmp_path_factory):
    folder = tmp_path_factory.mktemp("w")
    path = folder / "s.sock"
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                "from sim.cli.main import main; main()",
                "worker",
                "--socket",
                path,
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).resolve().parents[2],
            stdout=log,
            stderr=log,
        )
    until(lambda: client.resident_worker.listens(path), "the worker listens", SECONDS)
    yield path
    process.send_signal(signal.SIGTERM)
    process.wait()


def send(path: Path, data: bytes) -> None:
    """Connect, send, and go away without reading an answer."""
    with Socket(AF_UNIX) as connection:
        connection.connect(str(path))
        connection.sendall(data)


def request(config, **head) -> bytes:
    parts = [message_to_proto(query_of(config)[0]), context_to_proto(query_of(config)[1])]
    data = [part.SerializeToString() for part in parts]
    line = json.dumps({**HEAD, "sizes": [len(part) for part in data], **head})
    return line.encode() + b"\n" + b"".join(data)


@pytest.mark.process
def test_survives_torn_requests_and_clients_that_vanish(socket, tiny_config, tmp_path):
    config = tiny_config(run__directory=str(tmp_path / "run"))
    whole = request(config)
    torn = [
        b"",
        b'{"kind": "query", "source": "' + SECRET.encode(),
        b'{"note": "' + SECRET.encode() * 10_000,
        json.dumps({**HEAD, "sizes": [10, 10]}).encode() + b"\n",
        json.dumps({**HEAD, "sizes": [7, 7]}).encode() + b"\n" + SECRET.encode() * 2,
        whole[: len(whole) // 2],
        whole[:-1],
        whole,  # nobody is there any more when the answer is ready
        request(config, sizes=[-1, -1]),
        request(config, sizes=[2**40, 1]),
        request(config, sizes=["1", 1.5]),
        request(config, sizes=[1]),
        request(config, kind=SECRET),
        b"[1]\n",
    ]
    for data in torn:
        send(socket, data)
    message, context = query_of(config)
    assert client.resident_worker.ask(socket, "query", message, context).has_content()
    log = (socket.parent / "log").read_text()
    assert log.count("a request was dropped: ") == len(torn) - 1  # the empty one is a probe
    assert "BrokenPipeError" in log
    assert "MemoryError" not in log
    assert SECRET not in log


def test_does_not_wait_for_a_client_that_stalls(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(client.resident_worker, "STALL_SECONDS", 0.2)
    config = tiny_config(run__directory=str(tmp_path / "run"))

    def serve(server) -> None:
        with contextlib.suppress(OSError):
            client.resident_worker.serve(server)

    with client.resident_worker.listening(tmp_path / "s") as server, Socket(AF_UNIX) as staller:
        thread = threading.Thread(target=serve, args=(server,), daemon=True)
        thread.start()
        staller.connect(str(tmp_path / "s"))
        staller.sendall(request(config)[:-1])
        message, context = query_of(config)
        assert client.resident_worker.ask(tmp_path / "s", "query", message, context).has_content()
        server.shutdown(SHUT_RDWR)
        thread.join()


@pytest.mark.parametrize("reply", [b"", b'{"size": ', b'{"size": 9}\nabc'])
def test_a_worker_that_dies_before_its_answer_is_told(tiny_config, tmp_path, reply):
    message, context = query_of(tiny_config())
    with client.resident_worker.listening(tmp_path / "s") as server:

        def die() -> None:
            connection, _ = server.accept()
            with connection, connection.makefile("rwb") as stream:
                stream.read(sum(json.loads(stream.readline())["sizes"]))
                stream.write(reply)

        thread = threading.Thread(target=die)
        thread.start()
        with pytest.raises(RunFailed, match="the resident worker gave no answer"):
            client.resident_worker.ask(tmp_path / "s", "query", message, context)
        thread.join()


def query_of(config):
    message = Message(RecordDict({"config": ConfigRecord({"round": 0})}), 1, "query")
    node = {"partition-id": 0, "num-partitions": 3}
    context = Context(1, 1, node, RecordDict(), flatten(config))
    return message, context


@pytest.mark.process
def test_answers_as_the_app_does_with_one_load(socket, tiny_config, tmp_path):
    assert stat.S_IMODE(socket.stat().st_mode) == 0o600
    config = tiny_config(run__directory=str(tmp_path / "run"))
    message, context = query_of(config)
    direct = answer("query", message, context, Worker())
    for _ in range(4):
        reply = client.resident_worker.ask(socket, "query", message, context)
        assert dict(reply.content["config"]) == dict(direct.content["config"])
        assert reply.metadata.reply_to_message_id == direct.metadata.reply_to_message_id
    loads = [
        json.loads(f.read_text())["backbone_loads"]
        for f in (tmp_path / "run" / "workers").glob("*.json")
        if f.stem != str(os.getpid())
    ]
    assert loads == [1]


@pytest.mark.process
def test_refuses_other_code_and_keeps_answering(socket, tiny_config, tmp_path, monkeypatch):
    config = tiny_config(run__directory=str(tmp_path / "run"))
    message, context = query_of(config)
    with monkeypatch.context() as changed:
        changed.setattr(client.resident_worker, "source_digest", lambda: "e" * 64)
        with pytest.raises(RunFailed, match="runs other code"):
            client.resident_worker.ask(socket, "query", message, context)
    with pytest.raises(RunFailed):  # a train message without arrays
        client.resident_worker.ask(socket, "train", message, context)
    assert client.resident_worker.ask(socket, "query", message, context).has_content()


@pytest.mark.process
def test_second_worker_on_a_socket_is_refused(socket):
    with (
        pytest.raises(UserError, match="listens on"),
        client.resident_worker.listening(socket),
    ):
        pass


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_a_file_that_is_no_socket_stays(tmp_path, kind):
    path, target = tmp_path / "ledger", tmp_path / "target"
    if kind == "folder":
        path.mkdir()
    elif kind == "file":
        path.write_text("spent")
    else:
        target.write_text("spent")
        path.symlink_to(target)
    with (
        pytest.raises(UserError, match="is there and no socket"),
        client.resident_worker.listening(path),
    ):
        pass
    assert path.is_dir() if kind == "folder" else path.read_text() == "spent"
    assert path.is_symlink() == (kind == "link")


def test_a_socket_that_a_killed_worker_left_is_replaced(tmp_path):
    with Socket(AF_UNIX) as left:
        left.bind(str(tmp_path / "s"))
    with client.resident_worker.listening(tmp_path / "s"):
        assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o600


@pytest.mark.process
def test_refuses_the_bundle_of_other_code(socket, tiny_config):
    """What the executor found in the bundle is compared with what the worker runs."""
    message, context = query_of(tiny_config())
    with pytest.raises(RunFailed, match="runs other code"):
        client.resident_worker.ask(socket, "query", message, context, source="e" * 64)


def test_without_a_worker_the_error_says_so(tiny_config, tmp_path):
    message, context = query_of(tiny_config())
    with pytest.raises(RunFailed, match="does not answer"):
        client.resident_worker.ask(tmp_path / "none.sock", "query", message, context)
