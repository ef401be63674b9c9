"""``fedrx single`` and ``fedrx resume`` as a person runs them: in processes that can be killed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import until

from common.configio import read_config
from common.errors import UserError
from common.provenance import tensors_sha256
from common.rundir import RunDirectory
from sim.runs.federate import federate
from sim.runs.resume import resume
from sim.runs.single import single

CONFIG = """
[data]
path = "synthetic"
synthetic-patients = 30
[model]
backbone = "tiny"
[adapter]
rank = 4
[train]
optimizer = "adamw"
learning-rate = 0.02
schedule = "cosine"
warmup-steps = 2
weight-decay = 0.01
batch-size = 2
max-length = 256
dtype = "fp32"
device = "cpu"
threads = 1
checkpoint-steps = "3,6,10"
checkpoint-every = 2
[federation]
rounds = 2
local-steps = 5
[evaluation]
samples = 2
max-new-tokens = 8
"""


def fedrx(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sim.cli.main", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def config_file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("single") / "small.toml"
    file.write_text(CONFIG, encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def whole(config_file) -> tuple[RunDirectory, dict]:
    """An uninterrupted run, and what it printed for scripts."""
    path = config_file.with_name("whole")
    done = fedrx("single", str(config_file), "--run-dir", str(path), "--json")
    assert done.returncode == 0, done.stderr
    return RunDirectory.open(path), json.loads(done.stdout)


def killed_run(config_file: Path, path: Path) -> None:
    """Start a run, and kill -9 it once it has a checkpoint to go on from."""
    process = subprocess.Popen(
        [sys.executable, "-m", "sim.cli.main", "single", str(config_file), "--run-dir", str(path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    first = path / "checkpoints" / "step-00000003"
    until(first.exists, "the first checkpoint", 120, pause=0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert first.exists()


@pytest.mark.process
def test_summary_has_what_scripts_read(whole):
    run, summary = whole
    assert summary == run.read_json("summary.json")
    assert run.status().state == "finished"
    assert summary["mode"] == "single"
    assert [one["name"] for one in summary["hospitals"]] == ["hospital-1"]
    assert summary["wire"] == {"tensors": [], "bytes_up": 0, "bytes_down": 0}
    assert (summary["backbone_loads"], summary["workers"], summary["rounds"]) == (1, 1, 0)
    assert len(summary["validation_loss"]) == 4
    assert [one["step"] for one in summary["checkpoints"]] == [3, 6, 10]
    assert summary["b_sha256"] == tensors_sha256(run.load_checkpoint("step-00000010").b)
    assert {"fedrx", "untrained", "popularity"} <= set(summary["metrics"])
    needed = {
        *("trainable_parameters", "adapter", "backbone", "seconds", "peak_rss_bytes", "device"),
        *("attention", "dtype", "source"),
    }
    assert needed <= set(summary)
    assert (run.path / "report.md").exists()


@pytest.mark.process
def test_kill_9_and_resume_end_in_the_same_b(whole, config_file, tmp_path):
    path = tmp_path / "killed"
    killed_run(config_file, path)
    run = RunDirectory.open(path)
    assert run.status().state == "running"
    with pytest.raises(UserError, match=r"train\.learning-rate: 0\.02 -> 0\.5"):
        resume(path, ["train.learning-rate=0.5"], command_line=[])
    text = (path / "config.toml").read_text(encoding="utf-8")
    (path / "config.toml").write_text(text.replace("rank = 4", "rank = 8"), encoding="utf-8")
    with pytest.raises(UserError, match=r"adapter\.rank: 4 -> 8"):
        resume(path, command_line=[])
    (path / "config.toml").write_text(text, encoding="utf-8")
    resumed = fedrx("resume", str(path), "--json")
    assert resumed.returncode == 0, resumed.stderr
    summary = json.loads(resumed.stdout)
    assert summary["b_sha256"] == whole[1]["b_sha256"]
    assert summary["validation_loss"] == whole[1]["validation_loss"]
    assert summary["metrics"] == whole[1]["metrics"]
    assert run.read_json("environment.json")["resumed"][0]["command_line"][1] == "resume"
    assert resume(path, command_line=[]) == summary


@pytest.mark.process
def test_a_federation_of_one_hospital_gives_the_same_b(whole, config_file, tmp_path):
    """Flower's messages in between, in another process: 2 rounds of 5 steps against 10 steps."""
    keys = ["federation.hospitals=1", "run.backend=in-process"]
    config, path = read_config(config_file, keys), tmp_path / "federation"
    done = federate(config, command_line=[], run_dir=path)
    federated, alone = RunDirectory.open(path).load_checkpoint().b, whole[0].load_checkpoint().b
    assert max(abs(federated[key] - alone[key]).max() for key in alone) <= 1e-6
    assert max(abs(value).max() for value in alone.values()) > 1e-3
    assert done.result.b_sha256 == whole[1]["b_sha256"]


def test_a_run_that_can_be_resumed_has_said_what_it_reads(config_file, tmp_path, monkeypatch):
    """run.json makes a run resumable: data.json is there before it; until then it may be begun."""
    write = RunDirectory.write_json

    def killed(self, name, value):
        if name == "environment.json":
            raise KeyboardInterrupt
        write(self, name, value)

    monkeypatch.setattr(RunDirectory, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        single(read_config(config_file), command_line=[], run_dir=tmp_path / "run")
    assert (tmp_path / "run" / "data.json").exists()
    monkeypatch.undo()
    with pytest.raises(UserError, match="it has no run.json"):
        resume(tmp_path / "run", command_line=[])
    RunDirectory.require_new(read_config(config_file), directory=tmp_path / "run")
