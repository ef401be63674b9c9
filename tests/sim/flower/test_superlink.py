"""The launcher on real Flower and Ray: each trap of Flower 1.41 and 1.42 that it avoids."""

import json
import os
import signal
import socket
from collections import Counter
from pathlib import Path

import pytest
from flwr.common.serde import message_from_proto
from flwr.proto.message_pb2 import Message as ProtoMessage

from common.limits import available_cpus
from sim.runs.resume import resume

pytestmark = pytest.mark.ray


def messages_of(started):
    for file in sorted(started.spy.glob("message-*.bin")):
        direction = file.stem.split("-")[-1]
        yield direction, message_from_proto(ProtoMessage.FromString(file.read_bytes()))


def port_of(processes):
    superlink = next(p["argv"] for p in processes if "--simulation" in p["argv"])
    return superlink[superlink.index("--port") + 1]


def test_run_finishes_beside_decoys(base):
    """Trap 1: started in a folder with other ``client/``, ``common/``, ``server/`` packages."""
    assert base.code == 0, base.error
    assert base.run.status().state == "finished"
    assert json.loads(base.out) == base.summary
    losses = base.summary["validation_loss"]
    assert len(losses) == 3
    assert losses[-1] < losses[0]


def test_summary_has_what_scripts_read(base):
    """The keys that summary.json promises, and the kinds of their values."""
    summary = base.summary
    assert set(summary["adapter"]) >= {"mode", "rank", "alpha", "targets"}
    assert {"name", "patients", "samples"} <= set(summary["hospitals"][0])
    assert set(summary["wire"]) >= {"tensors", "bytes_up", "bytes_down"}
    assert all(key.endswith("lora_B") for key in summary["wire"]["tensors"])
    assert {"fedrx", "untrained", "popularity"} <= set(summary["metrics"])
    assert set(summary["attention"]) == {"kernel", "reason"}
    assert set(summary["dtype"]) == {"value", "reason"}
    assert summary["source"] in ("synthetic", "demo", "credentialed")
    assert len(summary["validation_loss"]) == summary["rounds"] + 1
    assert len(summary["b_sha256"]) == 64
    numbers = ("trainable_parameters", "backbone_loads", "workers", "seconds", "peak_rss_bytes")
    assert all(summary[key] > 0 for key in numbers)
    assert {"backbone", "device"} <= set(summary)


def test_flower_and_ray_run_in_an_empty_folder(base, decoys):
    """Trap 1: nobody of the run but the command itself ever stands where it was started."""
    ours = [p for p in base.processes() if "--run-dir" not in p["argv"]]
    assert any("flwr-simulation" in part for p in ours for part in p["argv"])
    assert any("default_worker.py" in part for p in ours for part in p["argv"])
    assert {p["cwd"] for p in ours if p["cwd"] == str(decoys)} == set()


def test_dependencies_are_not_reinstalled_and_nobody_phones_home(base):
    """Traps 4 and 9, in the environment of every process of the run."""
    expected = {
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ADDRESS": "local",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    started = [p["environment"] for p in base.processes() if "FEDRX_RUN" in p["environment"]]
    assert len(started) >= 4
    for environment in started:
        assert {key: environment.get(key) for key in expected} == expected
    assert not [p for p in base.processes() if any(part == "uv" for part in p["argv"])]
    homes = {environment["FLWR_HOME"] for environment in started}
    assert len(homes) == 1
    assert not Path(homes.pop()).is_relative_to(Path.home())


def test_what_a_run_takes_beside_its_hospitals(base):
    """One command of Flower's, and a server without the libraries that only training needs."""
    commands = [Path(part).name for p in base.processes() for part in p["argv"][1:3]]
    of_flower = Counter(name for name in commands if name.startswith(("flwr", "flower")))
    expected = ("flower-superlink", "flower-superexec", "flwr", "flwr-simulation")
    assert of_flower == Counter(expected)
    imported = set(json.loads((base.spy / "server-imported.json").read_text()))
    assert {"server.rounds", "ray"} <= imported
    assert not imported & {"torch", "transformers", "polars", "sklearn", "matplotlib"}


def test_every_worker_has_its_share_of_the_cpus(base):
    """Trap 7."""
    workers = [
        base.run.read_json(f"workers/{file.name}")
        for file in (base.run.path / "workers").glob("*.json")
    ]
    assert len(workers) == 2
    assert {worker["threads"] for worker in workers} == {1}  # train.threads of the laboratory
    assert base.run.config().federation.workers == 2


def test_threads_default_to_the_share(tiny_config):
    from sim.runs.federate import threads_per_worker

    cpus = available_cpus()
    for hospitals in (1, 2, 3, 100):
        config = tiny_config(train__threads=0, federation__hospitals=hospitals)
        threads = threads_per_worker(config)
        assert threads >= 1
        assert threads * min(cpus, hospitals) <= cpus


def test_backbone_is_loaded_once_per_worker(base):
    assert base.summary["workers"] == 2
    assert base.summary["backbone_loads"] == 2


def test_real_messages_hold_b_and_allowed_scalars_only(base):
    """Decode what Flower's grid really carried in the run, and compare it with wire.jsonl."""
    keys = {f"model.layers.{n}.self_attn.{p}_proj.lora_B" for n in (0, 1) for p in "qv"}
    scalars_of = {
        ("down", "query"): {"round"},
        ("down", "train"): {"round"},
        ("down", "evaluate"): {"round"},
        ("up", "train"): {"round", "weight", "train-loss", "steps", "seconds"},
        ("up", "evaluate"): {"round", "weight", "loss"},
    }
    seen = []
    for direction, message in messages_of(base):
        kind, content = message.metadata.message_type, message.content
        arrays = list(content.array_records.values())
        records = [*content.metric_records.values(), *content.config_records.values()]
        assert len(arrays) + len(records) == len(content)
        assert len(records) == 1
        for record in arrays:
            assert set(record) == keys
        for value in records[0].values():
            assert isinstance(value, bool | int | float | str)
        if (direction, kind) in scalars_of:
            assert set(records[0]) == scalars_of[direction, kind]
        sizes = sum(len(array.data) for record in arrays for array in record.values())
        seen.append((direction, kind, sorted(k for r in arrays for k in r), sizes))
    lines = base.run.wire()
    recorded = [(r.direction, r.kind, list(r.tensors), r.bytes) for r in lines]
    assert len(seen) > 20
    assert sorted(seen) == sorted(recorded)
    wire = base.summary["wire"]
    assert wire["tensors"] == sorted(keys)
    assert wire["bytes_up"] == sum(size for way, _, _, size in seen if way == "up")
    assert wire["bytes_down"] == sum(size for way, _, _, size in seen if way == "down")


def test_nothing_is_left_behind(base):
    assert base.left() == []
    homes = {p["environment"].get("FLWR_HOME") for p in base.processes()} - {None}
    assert not any(Path(home).exists() for home in homes)


def test_two_runs_side_by_side_do_not_meet(base, laboratory):
    """One and three workers at once: other ports, homes and Ray clusters, and the same B."""
    pair = [
        laboratory.start("one worker", federation__workers=1),
        laboratory.start("three workers", federation__workers=3),
    ]
    for started in pair:
        started.wait()
        assert started.code == 0, started.error
    assert [started.summary["workers"] for started in pair] == [1, 3]
    assert [started.summary["backbone_loads"] for started in pair] == [1, 3]
    assert len({port_of(started.processes()) for started in pair}) == 2
    for name in ("FLWR_HOME", "RAY_TMPDIR"):
        values = [
            {p["environment"].get(name) for p in started.processes()} - {None} for started in pair
        ]
        assert len(values[0]) == len(values[1]) == 1
        assert values[0] != values[1]
    assert {started.summary["b_sha256"] for started in pair} == {base.summary["b_sha256"]}


def test_crashing_hospitals_fail_the_command_and_show_why(laboratory):
    """Trap 2: Flower itself would exit with 0."""
    crashed = laboratory.start("crash", environment={"FEDRX_SPY_CRASH": "1"}).wait()
    assert crashed.code == 1
    status = crashed.run.status()
    assert status.state == "failed"
    assert "hospital-1" in status.error
    assert "0 of 3 hospitals answered" in crashed.error
    assert "ValueError: planted crash of a hospital" in crashed.error
    assert "Traceback" in crashed.error
    # Nothing looks finished; the last good checkpoint (before round 1) stays.
    assert crashed.out == ""
    for name in ("summary.json", "report.html", "report.md", "adapter", "predictions.jsonl"):
        assert not (crashed.run.path / name).exists()
    assert crashed.run.checkpoint_names() == ["round-00000"]
    assert crashed.left() == []


def test_ctrl_c_stops_everything_and_the_run_can_go_on(base, laboratory):
    interrupted = laboratory.start("interrupted")
    interrupted.wait_until(lambda run: bool(run.checkpoint_names()))
    os.killpg(interrupted.process.pid, signal.SIGINT)
    interrupted.wait()
    assert interrupted.code == 130
    assert interrupted.run.status().state == "interrupted"
    assert "fedrx resume" in interrupted.error
    assert not (interrupted.run.path / "summary.json").exists()
    assert interrupted.left() == []
    # In this process: what a kill leaves goes on with Flower and Ray in test_kill.
    keys = ["run.backend=in-process"]
    resumed = resume(interrupted.run.path, keys, command_line=[])
    assert resumed["b_sha256"] == base.summary["b_sha256"]
    assert resumed["validation_loss"] == base.summary["validation_loss"]


def test_busy_port_is_one_line_and_status_two(laboratory):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        refused = laboratory.start("busy", run__port=port).wait()
    assert refused.code == 2
    line = refused.error.strip().splitlines()[-1]
    assert line.startswith(f"fedrx: run.port={port}: ")
    assert "fix:" in line
    assert "Traceback" not in refused.error
    assert not refused.run.path.exists()


def test_given_port_is_used(laboratory, base):
    """The port of the run is the one that Flower listens on."""
    port = port_of(base.processes())
    ours = [p["argv"] for p in base.processes() if "FEDRX_RUN" in p["environment"]]
    superlink = next(argv for argv in ours if "--simulation" in argv)
    assert superlink[superlink.index("--host") + 1] == "127.0.0.1"
    simulation = next(argv for argv in ours if any("flwr-simulation" in part for part in argv))
    assert any(part.endswith(f"127.0.0.1:{port}") for part in simulation), simulation
