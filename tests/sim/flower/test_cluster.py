"""A simulation joins an existing Ray cluster through RAY_ADDRESS, and only when it is told to."""

import os
import subprocess

import pytest

from sim.flower.child_environment import child_environment
from sim.flower.superlink import free_port, script


@pytest.fixture
def cluster(tmp_path_factory):
    """A local cluster of two CPUs that was started beforehand."""
    folder = tmp_path_factory.mktemp("r")
    port = free_port()
    environment = {
        **os.environ,
        "RAY_TMPDIR": str(folder),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
    }
    head = [
        *(script("ray"), "start", "--head", f"--port={port}", "--num-cpus=2"),
        *("--include-dashboard=false", "--disable-usage-stats", "--block"),
    ]
    with (folder / "ray.log").open("wb") as log:
        process = subprocess.Popen(
            head, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    yield f"127.0.0.1:{port}"
    process.terminate()
    process.wait(60)


@pytest.mark.ray
def test_simulation_joins_the_cluster_of_ray_address(base, laboratory, cluster):
    joined = laboratory.start("joined", environment={"RAY_ADDRESS": cluster}).wait()
    assert joined.code == 0, joined.error
    assert joined.summary["b_sha256"] == base.summary["b_sha256"]
    assert joined.summary["workers"] == joined.summary["backbone_loads"] == 2
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
