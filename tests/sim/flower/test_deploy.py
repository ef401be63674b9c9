"""A deployment on loopback: real SuperLink and SuperNodes, TLS, node keys, resident workers."""

import contextlib
import gzip
import json
import os
import shutil
import stat
import subprocess
import time
from pathlib import Path

import polars as pl
import psutil
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

import server.app
from client.node import hospitals_of, local_config
from common.data.synthetic.write import write_tables
from common.errors import UserError
from common.rundir import RunDirectory
from sim.flower.deploy import deploy
from sim.flower.superlink import free_port, script

SECONDS = 900


@pytest.fixture
def dealt(tiny_config, tmp_path) -> dict[str, str]:
    """The synthetic tables dealt to two folders, as a simulation deals the patients."""
    config = tiny_config(federation__hospitals=2)
    tables = tmp_path / "all"
    data = config.data
    write_tables(tables, patients=data.synthetic_patients, seed=data.synthetic_seed)
    folders = {}
    for hospital in hospitals_of(data, config.partition, 2):
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


def test_folder_of_a_deployment(tiny_config, tmp_path):
    """A hospital gets its own key and the authority's certificate, and nobody else's secrets."""
    readme = deploy(
        tiny_config(),
        tmp_path / "d",
        hospitals={"north": "/data/a b", "south": "/data/south"},
        host="fed.example.org",
        port=9092,
    )
    folder = readme.parent
    for name in ("north", "south"):
        own = folder / "hospitals" / name
        assert {p.name for p in own.iterdir()} == {
            *("node.key", "node.pub", "ca.pem", "start.sh", "empty", "home")
        }
        assert stat.S_IMODE((own / "node.key").stat().st_mode) == 0o600
    start = (folder / "hospitals" / "north" / "start.sh").read_text()
    assert "data='/data/a b'" in start
    assert "--superlink fed.example.org:9092" in start
    assert subprocess.run(["sh", "-n", folder / "hospitals" / "north" / "start.sh"]).returncode == 0
    assert stat.S_IMODE((folder / "authority" / "ca.key").stat().st_mode) == 0o600
    authority = x509.load_pem_x509_certificate((folder / "authority" / "ca.pem").read_bytes())
    server = x509.load_pem_x509_certificate((folder / "superlink" / "server.pem").read_bytes())
    server.verify_directly_issued_by(authority)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "fed.example.org" in names.get_values_for_type(x509.DNSName)
    assert isinstance(server.public_key(), ec.EllipticCurvePublicKey)
    assert "federation.hospitals = 2" in (folder / "superlink" / "run-config.toml").read_text()
    with pytest.raises(UserError, match="not empty"):
        deploy(tiny_config(), folder, hospitals={"a": "/x"}, host="h", port=1)
    for bad in ("", "../x", "a b", "ä"):
        with pytest.raises(UserError, match="--hospital"):
            deploy(tiny_config(), tmp_path / "e", hospitals={bad: "/x"}, host="h", port=1)


def test_hospital_s_own_paths_replace_the_server_s(tiny_config):
    config = tiny_config(run__directory="/server/run")
    node = {"hospital": "north", "data": "/data/north", "folder": "/own"}
    own = local_config(config, node, run_id=7)
    assert own.data.path == "/data/north"
    assert Path(own.run.directory).is_relative_to("/own/runs")
    assert local_config(config, node, run_id=8) == own
    other = local_config(tiny_config(run__directory="/server/two"), node, run_id=7)
    assert other.run.directory != own.run.directory


@pytest.mark.parametrize("dies", ["fedrx", "flower-supernode"])
def test_a_hospitals_worker_and_node_end_together(tiny_config, tmp_path, processes, dies):
    """With programs in their places that only sleep, one of which dies."""
    nodes = {"north": "/x"}
    folder = deploy(tiny_config(), tmp_path / "d", hospitals=nodes, host="h", port=1).parent
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("fedrx", "flower-supernode"):
        file = programs / name
        file.write_text(
            "#!/bin/sh\numask > ../umask\n"
            + ("sleep 1; exit 3\n" if name == dies else "exec sleep 600\n")
        )
        file.chmod(0o755)
    processes.environment["PATH"] = f"{programs}:{os.environ['PATH']}"
    start = folder / "hospitals" / "north" / "start.sh"
    assert processes.start(start).wait(30) == (1 if dies == "fedrx" else 3)
    assert ("the resident worker ended" in processes.log(start)) == (dies == "fedrx")
    wait_for(lambda: not processes.named("sleep"), "both to end")
    assert (start.parent / "umask").read_text() == "0077\n"


def test_the_readme_tells_how_to_go_on(tiny_config, tmp_path, in_process):
    """And that is what the code does: the same run directory, from its last checkpoint."""
    readme = deploy(
        tiny_config(), tmp_path / "d", hospitals={"a": "/x"}, host="h", port=1
    ).read_text()
    assert "`superlink/run.sh` again goes on in `run/` from its last checkpoint" in readme
    done = in_process(tiny_config())
    shutil.rmtree(done.run.path / "checkpoints" / "round-00002")
    again = in_process(tiny_config(), resume=server.app.run_directory(done.run.config()))
    assert again.run.path == done.run.path
    assert again.sha == done.sha
    rounds = [e["round"] for e in again.run.metrics("round-seconds")]
    assert rounds == [1, 2]
    assert in_process(tiny_config(), resume=again.run).sha == done.sha


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


@pytest.fixture
def processes(tmp_path):
    one = Processes(tmp_path)
    yield one
    one.stop()


def wait_for(ready, what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not ready():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


def state(run: Path) -> str:
    file = run / "status.json"
    return json.loads(file.read_text())["state"] if file.exists() else ""


@pytest.mark.slow
def test_deployment_equals_the_simulation_and_survives_a_killed_node(
    dealt, tiny_config, tmp_path, processes, in_process
):
    config = tiny_config(federation__hospitals=2, federation__rounds=3)
    port = free_port()
    folder = deploy(config, tmp_path / "d", hospitals=dealt, host="127.0.0.1", port=port).parent
    # Free ports instead of the fixed ones: other tests may run beside.
    for file in folder.glob("hospitals/*/start.sh"):
        text = file.read_text()
        fixed = text.split("--port ")[1].split()[0]
        file.write_text(text.replace(f"--port {fixed}", f"--port {free_port()}"))
    link, nodes = folder / "superlink", folder / "hospitals"
    processes.start(link / "start.sh")
    wait_for(lambda: "startup complete" in processes.log(link / "start.sh"), "SuperLink")
    processes.call(link / "register.sh")

    stranger = (
        deploy(
            config, tmp_path / "s", hospitals={"stranger": "/x"}, host="127.0.0.1", port=port
        ).parent
        / "hospitals"
        / "stranger"
    )
    (stranger / "ca.pem").write_text((link / "ca.pem").read_text())
    text = (stranger / "start.sh").read_text().replace("--port 9094", f"--port {free_port()}")
    (stranger / "start.sh").write_text(text)
    refused = processes.start(stranger / "start.sh")
    assert refused.wait(SECONDS) != 0
    assert "Failed to activate SuperNode" in processes.log(stranger / "start.sh")
    assert "No SuperNode found with the given public key" in processes.log(link / "start.sh")

    for name in dealt:
        processes.start(nodes / name / "start.sh")
    processes.start(link / "run.sh")
    run = RunDirectory(folder / "run")
    wait_for(lambda: state(run.path) in ("finished", "failed"), "the first run")
    assert run.status()["state"] == "finished", run.status()
    summary = run.read_json("summary.json")
    assert [one["name"] for one in summary["hospitals"]] == sorted(dealt)
    assert summary["b_sha256"] == in_process(config).sha
    for name in dealt:
        assert worker_loads(nodes / name) == [1]
        log = processes.log(nodes / name / "start.sh")
        assert log.count("Start `flwr-clientapp` process") >= 4  # a process each, one load in all

    # Again with more rounds; one hospital's SuperNode dies in the middle and comes back.
    again = folder / "again"
    flat = "".join(
        line + "\n"
        for line in (link / "run-config.toml").read_text().splitlines()
        if not line.startswith(("federation.rounds", "run.directory"))
    )
    (link / "run-config.toml").write_text(
        flat + f'federation.rounds = 6\nrun.directory = "{again}"\n'
    )
    processes.start(link / "run.sh")
    second = RunDirectory(again)
    wait_for(lambda: "round-00001" in second.checkpoint_names(), "round 1")
    victim = sorted(dealt)[1]
    for process in processes.named("flower-supernode", victim):
        process.kill()
    wait_for(lambda: len(second.checkpoint_names()) >= 3, "a round without the hospital")
    processes.start(nodes / victim / "start.sh")
    wait_for(lambda: state(second.path) in ("finished", "failed"), "the second run")
    assert second.status()["state"] == "finished", second.status()
    rounds = {e["round"] for e in second.metrics("steps") if e["hospital"] == victim}
    assert 1 in rounds
    assert {e["round"] for e in second.metrics("steps")} == set(range(1, 7))


def worker_loads(own: Path) -> list[int]:
    """Backbone loads of each process that worked for a hospital."""
    return [
        json.loads(file.read_text())["backbone_loads"] for file in own.glob("runs/*/workers/*.json")
    ]
