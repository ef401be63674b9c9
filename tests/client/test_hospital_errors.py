"""What leaves a deployed hospital when its work fails, and who may read what stays there."""

import logging
import os
import pickle
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

import client.app
import client.handlers
from client.kept_state import own_folder
from client.node import hospital_of
from client.policy import POLICY
from common.configio import flatten
from common.errors import RunFailed, SettingError, UserError
from common.rundir import RunDirectory
from common.tensor_files import Altered
from common.training.worker import Worker

PLANTED = "secret-project", "10023456"


@pytest.fixture
def deployed(tmp_path, monkeypatch):
    """Make each simulated node a deployed one; returns the node configurations by index."""
    nodes = [
        {"hospital": name, "data": "synthetic", "folder": str(tmp_path / "own" / name)}
        for name in ("north", "south", "west")
    ]
    for node in nodes:
        agree(Path(node["folder"]), "")
    honest = client.app._answer

    def as_deployed(kind, message, context):
        node = nodes[context.node_config["partition-id"]]
        return honest(kind, message, replace(context, node_config=node))

    monkeypatch.setattr(client.app, "_answer", as_deployed)
    before = os.umask(0o022)
    yield nodes
    os.umask(before)


def agree(folder, policy: str) -> None:
    """Write a hospital's policy file, for its owner alone."""
    file = own_folder(folder) / POLICY
    file.touch(mode=0o600)
    file.write_text(policy)


def written(folder) -> str:
    """Everything in a folder, file names included."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return "".join(f"{file}\n{file.read_bytes().decode(errors='ignore')}" for file in files)


def user_error(path) -> None:
    raise UserError(f"{path} holds no admission of 10023456", fix=f"look into {path}")


def os_error(path) -> None:
    raise PermissionError(13, "denied", str(path))


def value_error(path) -> None:
    raise ValueError(f"patient 10023456 of {path}")


@pytest.mark.slow
@pytest.mark.parametrize("mismatch", ["stop", "refuse"])
@pytest.mark.parametrize("fail", ["data", "backbone", user_error, os_error, value_error])
def test_no_path_and_no_id_leaves_a_hospital(
    deployed, tiny_config, run_main, tmp_path, monkeypatch, caplog, fail, mismatch
):
    planted = tmp_path / "-".join(PLANTED)
    planted.mkdir()
    config = tiny_config(
        run__directory=str(tmp_path / "run"),
        federation__mismatch=mismatch,
        federation__rounds=1,
        federation__min_hospitals=2,
    )
    if isinstance(fail, str):
        deployed[2][fail] = str(planted)
    else:
        honest = Worker.tokens

        def tokens(worker, config, hospital):
            return fail(planted) if hospital.name == "west" else honest(worker, config, hospital)

        monkeypatch.setattr(Worker, "tokens", tokens)
    told = ""
    with caplog.at_level(logging.DEBUG):
        if mismatch == "stop" and isinstance(fail, str):
            with pytest.raises(RunFailed) as error:
                run_main(config)
            told = str(error.value)
        else:
            run_main(config)
    run = RunDirectory(tmp_path / "run")
    told += caplog.text + written(run.path)
    assert "the reason stays in the hospital, in errors.txt" in told
    assert not [word for word in PLANTED if word in told]
    (errors,) = (tmp_path / "own" / "west").glob("runs/*/hospitals/errors.txt")
    assert PLANTED[0] in errors.read_text()
    assert stat.S_IMODE(errors.stat().st_mode) == 0o600


@pytest.mark.parametrize("private", [False, True])
def test_errors_that_cannot_be_written_tell_no_path(
    deployed, tiny_config, run_main, tmp_path, private
):
    planted = tmp_path / "-".join(PLANTED)
    planted.write_text("a file is no folder")
    deployed[2]["folder"] = str(planted)
    keys = {"privacy__target_epsilon": 8.0, "privacy__noise_multiplier": 4.0} if private else {}
    with pytest.raises(RunFailed, match="the reason stays in the hospital") as error:
        run_main(tiny_config(run__directory=str(tmp_path / "run"), **keys))
    assert not [word for word in PLANTED if word in str(error.value)]


def test_what_stays_in_a_hospital_is_for_its_owner_alone(deployed, tiny_config, run_main, tmp_path):
    run_main(tiny_config(run__directory=str(tmp_path / "run")))
    own = tmp_path / "own"
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in [own, *own.rglob("*")]}
    assert len([path for path in modes if path.name == "steps.jsonl"]) == 3
    too_open = {
        path: oct(mode)
        for path, mode in modes.items()
        if mode != (0o700 if path.is_dir() else 0o600)
    }
    # an atomic write makes its folder by the umask; the one above it is closed
    assert not {path for path in too_open if path.is_file() or path.name != "workers"}


def query(config, node) -> Message:
    message = Message(RecordDict({"config": ConfigRecord({"round": 0})}), 1, "query")
    return client.handlers.answer(
        "query", message, Context(1, 1, node, RecordDict(), flatten(config)), Worker()
    )


def test_a_setting_that_cannot_be_had_is_told(tiny_config, tmp_path):
    node = {"hospital": "north", "data": "synthetic", "folder": str(tmp_path)}
    agree(tmp_path, "")
    with pytest.raises(UserError, match="train.device=cuda:99: .* here"):
        query(tiny_config(train__device="cuda:99"), node)


def test_what_leaves_is_decided_by_the_kind_of_error_and_not_by_its_words(tiny_config):
    said = "train.device=cuda:3: 2 CUDA device(s) here"
    private = tiny_config(privacy__noise_multiplier=1.0, privacy__sampling_rate=0.5)
    again = pickle.loads(pickle.dumps(SettingError(said, fix="set train.device")))
    assert (type(again), str(again)) == (SettingError, f"{said}; fix: set train.device")
    for error, leaves in (
        (again, True),
        (UserError(said), False),
        (RunFailed(said), True),
        (Altered(said), True),
    ):
        assert client.handlers._may_leave(error, tiny_config()) == leaves
        assert not client.handlers._may_leave(error, private)


@pytest.mark.parametrize("key", ["hospital", "data", "folder"])
def test_a_node_configuration_that_lacks_a_key_is_told(tiny_config, tmp_path, key):
    node = {"hospital": "north", "data": "synthetic", "folder": str(tmp_path)}
    del node[key]
    with pytest.raises(RunFailed, match=f"the node configuration has no '{key}'"):
        query(tiny_config(), node)


def test_a_hospital_s_own_limit_keeps_it_out_and_tells_why(
    deployed, tiny_config, run_main, tmp_path, caplog
):
    agree(Path(deployed[2]["folder"]), "max-epsilon = 8")
    config = tiny_config(
        run__directory=str(tmp_path / "run"),
        federation__mismatch="refuse",
        federation__rounds=1,
        federation__min_hospitals=2,
    )
    run_main(config)
    assert "takes part only in runs that protect every patient" in caplog.text
    lines = RunDirectory(tmp_path / "run").wire()
    answered = {line.hospital for line in lines if line.direction == "up"}
    assert {"north", "south"} <= answered
    assert "west" not in answered


def test_a_template_is_not_dropped_in_silence_where_a_prompt_shows_a_past(tiny_config):
    config = tiny_config(data__protocol="visits", text__template="Ill with\n{diagnoses}")
    with pytest.raises(UserError, match="text.template with data.protocol=visits"):
        hospital_of(config, {"partition-id": 0, "num-partitions": 3}, Worker())
