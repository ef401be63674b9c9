"""A deployment on loopback: real SuperLink, nginx, SuperNodes, TLS, node keys, workers."""

import contextlib
import gzip
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import httpx
import polars as pl
import psutil
import pytest
from waiting import until

import sim.flower.run_hospital
from common.config import Config
from common.data.dataset import open_hospitals
from common.data.synthetic.write import write_tables
from common.errors import RunFailed
from common.rundir import RunDirectory
from sim.flower.certificates import new_authority, new_key, private_pem, public_openssh
from sim.flower.deploy import deploy
from sim.flower.run_hospital import run_hospital
from sim.flower.superlink import free_port, script

SECONDS = 900


class Processes:
    """Processes of the test, in sessions of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[subprocess.Popen[bytes]] = []
        self.environment = {
            **os.environ,
            "PATH": os.pathsep.join([str(Path(script("flwr")).parent), os.environ["PATH"]]),
            "OMP_NUM_THREADS": "1",
            "FEDRX_TEST": str(folder),
        }

    def start(self, file: Path) -> subprocess.Popen[bytes]:
        with (self.folder / f"{file.parent.name}-{file.stem}.log").open("ab") as log:
            process = subprocess.Popen(
                [file], env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        self.started.append(process)
        return process

    def log(self, file: Path) -> str:
        return (self.folder / f"{file.parent.name}-{file.stem}.log").read_text()

    def call(self, file: Path) -> str:
        done = subprocess.run(
            [file], env=self.environment, capture_output=True, text=True, timeout=SECONDS
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def named(self, *words: str) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                ours = process.environ().get("FEDRX_TEST") == str(self.folder)
                if ours and all(word in " ".join(process.cmdline()) for word in words):
                    found.append(process)
        return found

    def stop(self) -> None:
        for process in self.named():
            with contextlib.suppress(psutil.Error):
                process.kill()
        for process in self.started:
            process.wait()


def state(run: Path) -> str:
    file = run / "status.json"
    return json.loads(file.read_text())["state"] if file.exists() else ""


@pytest.fixture
def processes(tmp_path):
    one = Processes(tmp_path)
    yield one
    one.stop()


LISTENING = """\
import socket, sys, time
with socket.socket(socket.AF_UNIX) as listening:
    listening.bind(sys.argv[1])
    listening.listen()
    time.sleep(float(sys.argv[2]))
sys.exit(3)
"""


@pytest.mark.process
@pytest.mark.parametrize("dies", ["fedrx worker", "flower-supernode", "nginx"])
def test_a_hospitals_processes_end_together(tiny_config, tmp_path, processes, monkeypatch, dies):
    """With programs in their places that only sleep, one of which dies."""
    nodes = {"north": "/x"}
    readme = deploy(tiny_config(), tmp_path / "d", hospitals=nodes, host="h", port=1)
    own = readme.parent / "hospitals" / "north"
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("fedrx", "flower-supernode", "nginx"):
        file, dying = programs / name, dies.startswith(name)
        end = "sleep 1; exit 3\n" if dying else "exec sleep 600\n"
        if name == "fedrx":
            end = f"exec {sys.executable} -c '{LISTENING}' \"$3\" {1 if dying else 600}\n"
        file.write_text(f"#!/bin/sh\numask > ../umask\n{end}")
        file.chmod(0o755)
    monkeypatch.setattr(sim.flower.run_hospital, "script", lambda name: str(programs / name))
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("FEDRX_TEST", str(tmp_path))
    before, mask = signal.getsignal(signal.SIGTERM), os.umask(0o077)
    told: list[str] = []
    try:
        with pytest.raises(RunFailed, match=r"(nginx|worker|SuperNode) ended \(status 3\)"):
            run_hospital(own, told.append)
    finally:
        signal.signal(signal.SIGTERM, before)
        os.umask(mask)
    assert not processes.named("sleep")
    assert (own / "umask").read_text() == "0077\n"
    assert "the server alone decides" in " ".join(told)


def deal(config, tmp_path) -> dict[str, str]:
    """Deal the synthetic tables to folders, as a simulation deals the patients."""
    tables = tmp_path / "all"
    data = config.data
    write_tables(tables, patients=data.synthetic_patients, seed=data.synthetic_seed)
    folders = {}
    for hospital in open_hospitals(config).hospitals:
        own = {a.patient for part in parts(hospital) for a in part}
        folder = tmp_path / "data" / hospital.name
        for source in tables.rglob("*.csv.gz"):
            frame = pl.read_csv(source, infer_schema=False)
            if "subject_id" in frame.columns:
                frame = frame.filter(pl.col("subject_id").cast(pl.Int64, strict=False).is_in(own))
            target = folder / source.relative_to(tables)
            target.parent.mkdir(parents=True, exist_ok=True)
            with gzip.open(target, "wb") as stream:
                stream.write(frame.write_csv().encode())
        folders[hospital.name] = str(folder)
    return folders


def parts(hospital):
    return hospital.train, hospital.validation, hospital.test


@dataclass
class Deployment:
    """A running SuperLink and the folders of its hospitals."""

    folder: Path
    port: int
    inside: int
    dealt: dict[str, str]
    config: Config
    processes: Processes

    @property
    def link(self) -> Path:
        return self.folder / "superlink"

    def hospital(self, name: str) -> Path:
        return self.folder / "hospitals" / name

    def flwr(self, home: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [script("flwr"), *arguments],
            env={**self.processes.environment, **QUIET, "FLWR_HOME": str(home)},
            cwd=home,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )

    def stranger(self, folder: Path, address: str) -> Path:
        """A FLWR_HOME with nothing but the authority's certificate, which every handshake shows."""
        home = folder / f"home-{address.rpartition(':')[2]}"
        home.mkdir()
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "x"\n\n[superlink.x]\naddress = "{address}"\n'
            f'root-certificates = "{self.link / "ca.pem"}"\n'
        )
        return home


QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
needs_nginx = pytest.mark.skipif(
    shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin") is None,
    reason="nginx is not installed (Debian: apt-get install nginx-light)",
)


@pytest.fixture(scope="module")
def deployment(tiny_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("deployment")
    config = tiny_config(federation__hospitals=2)
    dealt = deal(config, folder)
    port, *local = (free_port() for _ in range(6))
    readme = deploy(
        config, folder / "d", hospitals=dealt, host="127.0.0.1", port=port, local_ports=iter(local)
    )
    one = Deployment(readme.parent, port, local[0], dealt, config, Processes(folder))
    start = one.link / "start.sh"
    one.processes.start(start)
    until(lambda: "startup complete" in one.processes.log(start), "SuperLink", SECONDS)
    until(lambda: listens(port), "nginx", SECONDS)
    one.processes.call(one.link / "register.sh")
    yield one
    one.processes.stop()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


FOREIGN = {
    "pyproject.toml": """
[project]
name = "foreign"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "x"
fab-include = ["foreign/*.py"]
[tool.flwr.app.components]
serverapp = "foreign.app:server"
clientapp = "foreign.app:client"
""",
    "foreign/__init__.py": "",
    "foreign/app.py": """
from pathlib import Path
Path("MARK").touch()
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
server = ServerApp()
client = ClientApp()
""",
}


@pytest.mark.ray
@needs_nginx
def test_a_stranger_commands_nobody(deployment, tmp_path):
    """With the authority's certificate alone: no run, no registration, no list, on either port."""
    mark, app = tmp_path / "ran", tmp_path / "foreign"
    for name, text in FOREIGN.items():
        (app / name).parent.mkdir(parents=True, exist_ok=True)
        (app / name).write_text(text.replace("MARK", str(mark)))
    rogue = tmp_path / "rogue.pub"
    rogue.write_text(public_openssh(new_key()))
    for port in (deployment.port, deployment.inside):
        home = deployment.stranger(tmp_path, f"127.0.0.1:{port}")
        for command in (["run", app], ["supernode", "register", rogue], ["ls"], ["stop", "1"]):
            done = deployment.flwr(home, *command, "x")
            assert done.returncode != 0, done.stdout
            assert "registered successfully" not in done.stdout
    token = deployment.flwr(deployment.link / "home", "supernode", "list", "fedrx", "--format=json")
    nodes = json.loads(token.stdout)
    assert len(nodes["nodes"]) == len(deployment.dealt), nodes  # no rogue among them
    assert (
        json.loads(deployment.flwr(deployment.link / "home", "ls", "--format=json").stdout)["runs"]
        == []
    )
    assert not mark.exists()
    refused = (deployment.link / "nginx" / "error.log").read_text()
    assert "client sent no required SSL certificate" in refused
    assert " 400" in (deployment.link / "nginx" / "access.log").read_text()
    log = deployment.processes.log(deployment.link / "start.sh")
    assert log.count('"POST /v1/control/start-run HTTP/1.1" 401') == 1
    assert '"POST /v1/control/register-node HTTP/1.1" 401' in log


@pytest.mark.ray
@needs_nginx
def test_a_hospital_s_certificate_opens_fleet_alone(deployment, tmp_path):
    """With a hospital's own certificate: nothing but Fleet's paths is passed on."""
    context = ssl.create_default_context(cafile=str(deployment.link / "ca.pem"))
    own = deployment.hospital(sorted(deployment.dealt)[0])
    context.load_cert_chain(own / "node.pem", own / "node-tls.key")
    head = {"content-type": "application/protobuf"}
    other = ssl.create_default_context(cafile=str(deployment.link / "ca.pem"))
    key = new_key()
    for file, text in (
        ("other.pem", new_authority().client(key, own.name)),
        ("other.key", private_pem(key)),
    ):
        (tmp_path / file).write_text(text)
    other.load_cert_chain(tmp_path / "other.pem", tmp_path / "other.key")
    with httpx.Client(verify=other, headers=head) as client:  # another authority's
        url = f"https://127.0.0.1:{deployment.port}/v1/fleet/pull-messages"
        assert client.post(url).status_code == 400
    with httpx.Client(verify=context, headers=head) as client:

        def status(path: str) -> int:
            return client.post(f"https://127.0.0.1:{deployment.port}{path}").status_code

        paths = {
            *("/v1/control/start-run", "/v1/control/register-node", "/v1/runtime/acquire-task"),
            *("/v1/fleet/register-node", "/v1/fleet/../control/start-run", "/docs", "/health"),
            *("/v1/fleet/%2e%2e/control/start-run", "/v1/fleet/pull-messages/x", "/"),
        }
        assert {path: status(path) for path in paths} == dict.fromkeys(paths, 403)
        assert status("/v1/fleet/pull-messages") == 401  # passed on, and not signed with a node key
    log = (deployment.link / "nginx" / "access.log").read_text()
    assert f'"CN={own.name}" SUCCESS POST /v1/control/start-run 403' in log


@pytest.mark.ray
@needs_nginx
def test_deployment_equals_the_simulation_and_survives_a_killed_node(
    deployment, in_process, tmp_path, tmp_path_factory
):
    folder, processes, dealt = deployment.folder, deployment.processes, deployment.dealt
    link, config = deployment.link, deployment.config

    # A node whose certificate is of this deployment, and whose key is not registered.
    ports = iter([deployment.inside, free_port(), free_port()])
    hospitals = {"stranger": "/x"}
    other = deploy(
        config,
        tmp_path_factory.mktemp("s"),  # a socket's path has at most 107 bytes
        hospitals=hospitals,
        host="127.0.0.1",
        port=deployment.port,
        local_ports=ports,
    )
    stranger = other.parent / "hospitals" / "stranger"
    start = stranger / "start.sh"
    for name in ("ca.pem", "node.pem", "node-tls.key"):
        shutil.copyfile(deployment.hospital(sorted(dealt)[0]) / name, stranger / name)
    assert processes.start(start).wait(SECONDS) != 0
    assert "No SuperNode found with the given public key" in processes.log(link / "start.sh")

    for name in dealt:
        processes.start(deployment.hospital(name) / "start.sh")
    processes.start(link / "run.sh")
    run = RunDirectory(folder / "run")
    until(lambda: state(run.path) in ("finished", "failed"), "the first run", SECONDS)
    assert run.status().state == "finished", run.status()
    summary = run.read_json("summary.json")
    assert [one["name"] for one in summary["hospitals"]] == sorted(dealt)
    assert summary["b_sha256"] == in_process(config).sha
    for name in dealt:
        assert worker_loads(deployment.hospital(name)) == [1]
        assert not (deployment.hospital(name) / "home" / "apps").exists()  # no bundle is installed

    # A bundle that differs in one line, sent by the coordinator itself: nothing of it runs here.
    foreign = tmp_path / "fedrx"
    shutil.copytree(link / "fedrx", foreign)
    mark = tmp_path / "imported"
    with (foreign / "client" / "app.py").open("a") as source:
        source.write(f"\nPath({str(mark)!r}).touch()\n")
    settings = tmp_path / "settings.toml"
    settings.write_text(
        (link / "run-config.toml").read_text().replace(str(folder / "run"), str(tmp_path / "theft"))
    )
    done = deployment.flwr(link / "home", "run", foreign, "fedrx", "--run-config", settings)
    assert done.returncode == 0, done.stdout + done.stderr
    until(lambda: state(tmp_path / "theft") == "failed", "the refusal", SECONDS)
    assert "nothing of the bundle was run" in str(RunDirectory(tmp_path / "theft").status())
    assert "nothing of the bundle was run" in processes.log(
        deployment.hospital(sorted(dealt)[0]) / "start.sh"
    )
    assert not mark.exists()

    # Again with more rounds; one hospital's SuperNode dies in the middle and comes back.
    again = folder / "again"
    flat = "".join(
        line + "\n"
        for line in (link / "run-config.toml").read_text().splitlines()
        if not line.startswith(("federation.rounds", "run.directory"))
    )
    (link / "run-config.toml").write_text(
        flat + f'federation.rounds = 4\nrun.directory = "{again}"\n'
    )
    processes.start(link / "run.sh")
    second = RunDirectory(again)
    until(lambda: "round-00001" in second.checkpoint_names(), "round 1", SECONDS)
    victim = sorted(dealt)[1]
    for process in processes.named("flower-supernode", victim):
        process.kill()
    until(lambda: len(second.checkpoint_names()) >= 3, "a round without the hospital", SECONDS)
    until(lambda: not processes.named("fedrx", "hospital", victim), "its other processes", SECONDS)
    processes.start(deployment.hospital(victim) / "start.sh")
    until(lambda: state(second.path) in ("finished", "failed"), "the second run", SECONDS)
    assert second.status().state == "finished", second.status()
    rounds = {e.round for e in second.metrics("steps") if e.hospital == victim}
    assert 1 in rounds
    assert {e.round for e in second.metrics("steps")} == set(range(1, 5))


def worker_loads(own: Path) -> list[int]:
    """Backbone loads of each process that worked for a hospital."""
    return [
        json.loads(file.read_text())["backbone_loads"] for file in own.glob("runs/*/workers/*.json")
    ]
