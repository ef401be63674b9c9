"""What the processes of a run are told: whom to ask directly, where to work, what they may use."""

import contextlib
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.request
from concurrent import futures
from pathlib import Path
from types import SimpleNamespace

import grpc
import httpx
import pytest
import requests
from answering import answering

import sim.flower.child_environment
from common.config import Config
from common.errors import UserError
from common.limits import Limits
from sim.flower.child_environment import (
    LONGEST_SOCKET_BYTES,
    RAY_SMALLEST_STORE_BYTES,
    SOCKET,
    child_environment,
    ray_memory,
    without_loopback_proxy,
    working_folder,
    write_scripts,
)
from sim.flower.deploy import deploy
from sim.flower.run_hospital import run_hospital
from sim.flower.run_superlink import flower_quiet
from sim.flower.superlink import script

GIB = 2**30


@pytest.fixture
def proxy(monkeypatch, fake_proxy):
    for name in list(os.environ):
        if "proxy" in name.lower():
            monkeypatch.delenv(name)
    for name, url in fake_proxy.environment().items():
        monkeypatch.setenv(name, url)
    return fake_proxy


@pytest.fixture
def server():
    with answering(lambda *_: b"ok") as address:
        yield f"{address}/"


@pytest.fixture
def rpc():
    handler = grpc.unary_unary_rpc_method_handler(lambda request, context: b"ok")
    running = grpc.server(futures.ThreadPoolExecutor(1))
    running.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("test.Test", {"Ask": handler}),)
    )
    port = running.add_insecure_port("127.0.0.1:0")
    running.start()
    yield f"127.0.0.1:{port}"
    running.stop(0)


def by_urllib(server, rpc):
    return urllib.request.build_opener().open(server, timeout=5).read()


def by_requests(server, rpc):
    return requests.get(server, timeout=5).content


def by_httpx(server, rpc):
    return httpx.get(server, timeout=5).content


def by_grpc(server, rpc):
    with grpc.insecure_channel(rpc) as channel:
        return channel.unary_unary("/test.Test/Ask")(b"", timeout=5)


CLIENTS = (by_urllib, by_requests, by_httpx, by_grpc)


@pytest.mark.parametrize("ask", CLIENTS)
@pytest.mark.parametrize("said", ["", "example.org, .hospital.example", "*"])
def test_what_flower_and_ray_ask_with_meets_no_proxy_on_loopback(
    proxy, server, rpc, monkeypatch, ask, said
):
    monkeypatch.setenv("NO_PROXY", said)
    for name, value in without_loopback_proxy(os.environ).items():
        monkeypatch.setenv(name, value)
    assert ask(server, rpc) == b"ok"
    assert proxy.seen == []


@pytest.mark.parametrize("ask", CLIENTS)
def test_without_the_exceptions_every_one_of_them_would(proxy, server, rpc, ask):
    """The control: these clients do ask the proxy of the environment."""
    with contextlib.suppress(Exception):
        ask(server, rpc)
    assert proxy.seen


def test_a_persons_own_exceptions_and_proxies_stay():
    base = {"NO_PROXY": "a.example,localhost", "no_grpc_proxy": "b.example", "http_proxy": "p"}
    made = child_environment(Path("/tmp/f"), run=Path("/r"), base=base)
    assert made["http_proxy"] == "p"
    ray = "169.254.169.254,metadata.google.internal"
    assert made["no_proxy"] == made["NO_PROXY"] == f"a.example,localhost,127.0.0.1,::1,{ray}"
    assert made["no_grpc_proxy"] == f"b.example,127.0.0.1,localhost,::1,{ray}"
    assert without_loopback_proxy(base | {"no_proxy": "*"})["NO_PROXY"] == "*"


@pytest.mark.process
@pytest.mark.parametrize("said", ["", "a.example", "*"])
def test_a_deployments_scripts_say_the_same(tmp_path, said):
    deploy(Config(), tmp_path / "d", hospitals={"north": "/data"}, host="fl.example.org", port=9092)
    for name in ("superlink/run.sh", "superlink/register.sh"):
        text = (tmp_path / "d" / name).read_text()
        head = text[: text.index("\ncd ")]
        done = subprocess.run(
            ["sh", "-c", f'{head}\necho "$no_proxy|$NO_PROXY|$no_grpc_proxy"'],
            env={"PATH": os.environ["PATH"], "NO_PROXY": said},
            capture_output=True,
            text=True,
            check=True,
        )
        first, second, rpc = done.stdout.strip().split("|")
        assert first == second == without_loopback_proxy({"NO_PROXY": said})["no_proxy"]
        assert rpc.split(",")[-3:] == ["127.0.0.1", "localhost", "::1"] or said == "*"


def test_a_hospitals_processes_ask_loopback_directly(tmp_path, monkeypatch):
    """The verb itself, and what it starts; here the folder is empty, so it ends there."""
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.setenv(name, "a.example")
    with pytest.raises(UserError):
        run_hospital(tmp_path, print)
    for told in (os.environ, flower_quiet(tmp_path)):
        for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
            assert told[name].split(",")[:4] == ["a.example", "127.0.0.1", "localhost", "::1"]


def test_our_packages_come_before_a_persons_own_path():
    made = child_environment(Path("/tmp/f"), run=Path("/r"), base={"PYTHONPATH": "/x:/y"})
    assert made["PYTHONPATH"].split(os.pathsep) == ["/tmp/f/fedrx", "/x", "/y"]
    made = child_environment(Path("/tmp/f"), run=Path("/r"), base={})
    assert made["PYTHONPATH"] == "/tmp/f/fedrx"


@pytest.mark.parametrize("name", ["ü", "x" * 90])
def test_a_folder_that_ray_cannot_name_is_not_used(monkeypatch, name):
    with (
        tempfile.TemporaryDirectory(suffix=name, dir="/tmp") as place,
        monkeypatch.context() as elsewhere,
    ):
        elsewhere.setattr(tempfile, "tempdir", place)
        check_working_folder(Path(place))


def check_working_folder(named: Path) -> None:
    with working_folder() as folder:
        assert not folder.is_relative_to(named)
        assert folder.is_dir()
        assert str(folder).isascii()
        assert len(f"{folder}{SOCKET}") <= LONGEST_SOCKET_BYTES
        assert folder.stat().st_mode & 0o077 == 0
        # The longest name that Ray makes there can be bound.
        sockets = Path(f"{folder}{SOCKET}")
        sockets.parent.mkdir(parents=True)
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(sockets))
    assert not folder.exists()


def test_a_short_folder_with_blanks_and_brackets_is_used_as_it_is(monkeypatch):
    place = Path("/tmp") / f"f [{os.getpid()}]"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    try:
        with working_folder() as folder:
            assert folder.parent == place
    finally:
        shutil.rmtree(place)


def test_an_interpreter_that_a_shell_takes_apart_gets_a_plain_path(tmp_path):
    """Ray starts workers by ``bash -c "exec PYTHON ..."`` without quotes."""
    odd = tmp_path / "env (ö) [2]" / "bin" / "python3"
    odd.parent.mkdir(parents=True)
    odd.symlink_to(sys.executable)
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        write_scripts(folder, str(odd))
        made = child_environment(folder, run=Path("/r"))
        found = shutil.which("flwr-simulation", path=made["PATH"])
        assert found == str(folder / "bin" / "flwr-simulation")
        python = Path(found).read_text().splitlines()[0].removeprefix("#!")
        assert shlex.quote(python) == python
        assert Path(python).resolve() == Path(sys.executable).resolve()
    assert odd.exists()


def test_a_plain_interpreter_is_used_as_it_is(tmp_path):
    write_scripts(tmp_path, "/usr/bin/python3.11")
    assert list(tmp_path.iterdir()) == []


def test_without_any_place_one_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "ü"))
    monkeypatch.setattr(sim.flower.child_environment, "SHORT_FOLDERS", ("/absent",))
    with pytest.raises(UserError, match="fix: set TMPDIR"), working_folder():
        pass


def test_ray_gets_the_cgroups_memory(monkeypatch):
    """Ray itself reads the outermost group's limit, which need not be the job's."""
    limit = Limits(memory_bytes=8 * GIB, free_bytes=6 * GIB)
    monkeypatch.setattr(sim.flower.child_environment, "cgroup_limits", lambda: limit)
    monkeypatch.setattr(sim.flower.child_environment, "available_memory_bytes", lambda: 6 * GIB)
    monkeypatch.setattr(
        sim.flower.child_environment.shutil,
        "disk_usage",
        lambda place: SimpleNamespace(total=0, used=0, free=GIB),
    )
    resources = ray_memory()
    assert resources["object_store_memory"] == int(0.95 * GIB)
    assert sum(resources.values()) == 6 * GIB
    made = child_environment(Path("/tmp/f"), run=Path("/r"), base={})
    assert json.loads(made["RAY_OVERRIDE_RESOURCES"]) == resources
    own = child_environment(Path("/tmp/f"), run=Path("/r"), base={"RAY_OVERRIDE_RESOURCES": "{}"})
    assert own["RAY_OVERRIDE_RESOURCES"] == "{}"
    monkeypatch.setattr(sim.flower.child_environment, "available_memory_bytes", lambda: 2**20)
    assert ray_memory()["object_store_memory"] == RAY_SMALLEST_STORE_BYTES
    monkeypatch.setattr(sim.flower.child_environment, "cgroup_limits", Limits)
    assert ray_memory() == {}
    made = child_environment(Path("/tmp/f"), run=Path("/r"), base={})
    assert "RAY_OVERRIDE_RESOURCES" not in made


@pytest.mark.process
def test_ray_reads_what_it_is_given(monkeypatch):
    """Ray's own reader takes memory and object store from that variable, and CPUs from the call."""
    from ray._private.resource_and_label_spec import ResourceAndLabelSpec

    given = {"memory": 3 * GIB, "object_store_memory": GIB}
    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", json.dumps(given))
    read = ResourceAndLabelSpec(num_cpus=2, num_gpus=0).resolve(
        is_head=True, node_ip_address="127.0.0.1"
    )
    assert (read.num_cpus, read.memory, read.object_store_memory) == (2, 3 * GIB, GIB)


def test_scripts_of_this_environment_are_found():
    assert Path(script("flwr")).is_file()
