"""A simulation joins an existing Ray cluster through RAY_ADDRESS, and only when it is told to."""

import json
import os
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from sim.flower.child_environment import child_environment
from sim.flower.superlink import free_port, script

NODES = ("head", "second")
SPY = Path(__file__).resolve().parents[2] / "fixtures" / "spy"


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster of two nodes of one CPU each, started beforehand."""

    address: str
    spy: Path

    def node_of(self, pid: int) -> str:
        """Return the node that a process belongs to."""
        facts = json.loads((self.spy / f"process-{pid}.json").read_text())
        return str(facts["environment"]["FEDRX_NODE"])


@pytest.fixture
def short_folder():
    """Ray's sockets lie below it, and a socket's path has at most 107 bytes."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture
def cluster(short_folder):
    folder = short_folder
    address = f"127.0.0.1:{free_port()}"
    environment = {
        **os.environ,
        "PYTHONPATH": str(SPY),
        "FEDRX_SPY": str(folder),
        "RAY_TMPDIR": str(folder),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
    }
    joining = {
        "head": ("--head", f"--port={address.partition(':')[2]}", "--include-dashboard=false"),
        "second": (f"--address={address}",),
    }
    usual = ("--num-cpus=1", "--disable-usage-stats", "--block")
    started = []
    try:
        for node in NODES:
            with (folder / f"{node}.log").open("wb") as log:
                process = subprocess.Popen(
                    [script("ray"), "start", *joining[node], *usual],
                    env={**environment, "FEDRX_NODE": node},
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            started.append(process)
            while b"Ray runtime started" not in (folder / f"{node}.log").read_bytes():
                assert process.poll() is None, (folder / f"{node}.log").read_text()
                time.sleep(0.1)
        yield Cluster(address, folder)
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(60)


@pytest.mark.ray
def test_simulation_joins_the_two_nodes_of_ray_address(base, laboratory, cluster):
    joined = laboratory.start("joined", environment={"RAY_ADDRESS": cluster.address}).wait()
    assert joined.code == 0, joined.error
    assert joined.summary["b_sha256"] == base.summary["b_sha256"]
    assert joined.summary["workers"] == joined.summary["backbone_loads"] == 2
    workers = [int(file.stem) for file in (joined.run.path / "workers").glob("*.json")]
    assert sorted(map(cluster.node_of, workers)) == sorted(NODES)
    # No Ray of its own: no raylet or worker carries the mark of the run.
    argv = [" ".join(p["argv"]) for p in joined.processes() if "FEDRX_RUN" in p["environment"]]
    assert any("flwr-simulation" in line for line in argv)
    assert not any("default_worker.py" in line for line in argv)
    assert joined.left() == []


def test_without_ray_address_a_cluster_on_the_machine_is_left_alone(tmp_path, monkeypatch):
    """Ray itself would join the last ``ray start`` of the machine unasked."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def environment():
        return child_environment(tmp_path, run=tmp_path)

    assert environment()["RAY_ADDRESS"] == "local"
    # Ray then takes 127.0.0.1 as its node's address, and listens there alone.
    assert environment()["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert environment()["RAY_ADDRESS"] == "10.0.0.1:6379"
    assert environment()["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "1"
