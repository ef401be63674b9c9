"""Plain ``flwr run``, as a Flower user starts it, on SuperLinks that are not ours."""

import contextlib
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import psutil
import pytest
from waiting import until

from common.configio import flatten, from_flat, read_config, to_toml
from common.provenance import PACKAGES
from common.rundir import RunDirectory
from sim.flower.superlink import free_port, script

pytestmark = pytest.mark.ray
REPOSITORY = Path(__file__).resolve().parents[3]
SECONDS = 900


class Flower:
    """Flower as installed, with a home, ports and a working directory of the test."""

    def __init__(self, folder: Path, cwd: Path) -> None:
        self.cwd = cwd
        (folder / "home").mkdir(parents=True)
        self.runs = folder / "runs"
        self.port = free_port()
        self.environment = {
            **os.environ,
            "FLWR_HOME": str(folder / "home"),
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(self.port),
            "FLWR_LOCAL_CONTROL_API_PORT": str(self.port),
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ADDRESS": "local",
            "RAY_worker_niceness": "0",
            "FEDRX_RUNS": str(self.runs),
            "OMP_NUM_THREADS": "1",
        }

    def call(self, *arguments: str) -> str:
        done = subprocess.run(
            [script("flwr"), *arguments],
            cwd=self.cwd,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        return done.stdout + done.stderr

    def end(self) -> RunDirectory:
        """Wait for the run, and return its directory."""

        def ended() -> RunDirectory | None:
            runs = [RunDirectory(file.parent) for file in self.runs.glob("*/status.json")]
            return next((run for run in runs if run.status().state in ("finished", "failed")), None)

        return until(ended, "the run did not end", SECONDS)

    def stop(self) -> None:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get("FEDRX_RUNS") == str(self.runs):
                    process.kill()


@pytest.fixture
def flower(tmp_path):
    started = []

    def start(cwd: Path) -> Flower:
        started.append(Flower(tmp_path / f"flower-{len(started)}", cwd))
        return started[-1]

    yield start
    for one in started:
        one.stop()


def checkout(folder: Path) -> Path:
    app = folder / "fedrx"
    for package in PACKAGES:
        shutil.copytree(
            REPOSITORY / package, app / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copyfile(REPOSITORY / "pyproject.toml", app / "pyproject.toml")
    return app


def shipped_but_tiny(tiny_config, target: Path) -> Path:
    """configs/hospitals.toml, with the values of the tiny federation over it, nothing more."""
    shipped = tomllib.loads((REPOSITORY / "configs" / "hospitals.toml").read_text())
    assert set(shipped) <= {key.split(".")[0] for key in flatten(tiny_config())}
    base = flatten(read_config(REPOSITORY / "configs" / "hospitals.toml"))
    tiny = flatten(tiny_config())
    default = flatten(from_flat({}))
    changed = {key: value for key, value in tiny.items() if value != default[key]}
    target.write_text(
        to_toml(
            from_flat(
                {
                    **base,
                    **changed,
                    "data.drug-order": default["data.drug-order"],
                    "adapter.targets": default["adapter.targets"],
                    "train.schedule": "constant",
                    "train.warmup-steps": 0,
                    "train.max-grad-norm": 0.0,
                }
            )
        )
    )
    return target


def test_flwr_run_with_a_shipped_configuration(tiny_config, tmp_path, flower, in_process):
    """Flower's default number of SuperNodes decides how many hospitals there are: two."""
    started = flower(checkout(tmp_path))
    config = shipped_but_tiny(tiny_config, tmp_path / "hospitals.toml")
    answer = started.call("run", ".", "--run-config", str(config))
    assert "uccessfully" in answer, answer
    run = started.end()
    assert run.status().state == "finished", run.status()
    summary = run.read_json("summary.json")
    assert [one["name"] for one in summary["hospitals"]] == ["hospital-1", "hospital-2"]
    assert summary["b_sha256"] == in_process(tiny_config(federation__hospitals=2)).sha
    assert run.config().federation.hospitals == 2


def test_stale_superlink_with_other_code_is_found_out(tiny_config, tmp_path, flower):
    """Trap 1: a SuperLink that was started in another checkout makes hospitals run its code.

    The decoy is our own ``client`` package with one changed line, as an older checkout has it.
    """
    stale = tmp_path / "stale"
    shutil.copytree(
        REPOSITORY / "client", stale / "client", ignore=shutil.ignore_patterns("__pycache__")
    )
    old = stale / "client" / "local_update.py"
    old.write_text(old.read_text() + "\n# an older line\n")
    started = flower(stale)
    app = checkout(tmp_path)
    config = shipped_but_tiny(tiny_config, tmp_path / "hospitals.toml")
    answer = started.call("run", str(app), "--run-config", str(config))
    assert "uccessfully" in answer, answer
    run = started.end()
    status = run.status()
    assert status.state == "failed"
    assert re.match(r"hospital-\d: source fingerprint differs: server \w+, ", status.error)
    assert not (run.path / "summary.json").exists()
