"""Curves: what the libraries' own readers find is what metrics.jsonl holds, each step once."""

import contextlib
import io
import json
import threading
from pathlib import Path

import numpy as np
import pytest
from answering import answering

from client import handlers
from common.config import Config
from common.configio import from_flat
from common.errors import RunFailed, UserError
from common.rundir import RunDirectory
from sim.cli.terminal import Terminal
from sim.process import extras
from sim.process.progress import SILENT
from sim.runs import curves as module
from sim.runs.curves import check_tracker, curves
from sim.runs.federate import federate
from sim.runs.resume import resume
from sim.runs.single import single
from sim.runs.single_training import SingleTraining
from sim.runs.trackers import public_configuration

SECRET_PLACE = "/srv/st-elsewhere/mimic"
PLACES = {
    "data.path": SECRET_PLACE,
    "data.drug-map": f"{SECRET_PLACE}/map.csv",
    "data.meds-codes": f"{SECRET_PLACE}/codes.toml",
    "evaluation.formulary": f"{SECRET_PLACE}/names.txt",
    "evaluation.interactions": f"{SECRET_PLACE}/pairs.csv",
    "model.backbone": f"{SECRET_PLACE}/llama",
    "run.directory": SECRET_PLACE,
    "run.hospital-keys": SECRET_PLACE,
    "judge.base-url": "http://127.0.0.1:8/st-elsewhere",
}


def read_tensorboard(run):
    """Every scalar of the event files, by TensorBoard's reader: (tag, step) -> values."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(run.path / "tensorboard"), size_guidance={"scalars": 0})
    reader.Reload()
    found = {}
    for tag in reader.Tags()["scalars"]:
        for event in reader.Scalars(tag):
            found.setdefault((tag, event.step), []).append(event.value)
    return found


def read_mlflow(run):
    """Every metric of the runs that are not deleted, by MLflow's client."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=(run.path / "mlflow").as_uri())
    experiments = [one.experiment_id for one in client.search_experiments()]
    found = {}
    for one in client.search_runs(experiments):
        for tag in one.data.metrics:
            for metric in client.get_metric_history(one.info.run_id, tag):
                found.setdefault((tag, metric.step), []).append(metric.value)
    return found


READERS = {"tensorboard": read_tensorboard, "mlflow": read_mlflow}


@pytest.fixture(params=sorted(READERS))
def tracker(request):
    pytest.importorskip(request.param)
    return request.param


def expected(run, tracker):
    """What metrics.jsonl holds, read here by hand."""
    found = {}
    for line in (run.path / "metrics.jsonl").read_text().splitlines():
        event = json.loads(line)
        step = event.pop("step", None)
        server_round = event.pop("round", None)
        hospital = event.pop("hospital", None)
        del event["time"]
        event[event.pop("name")] = event.pop("value")
        for name, value in event.items():
            if isinstance(value, (int, float)):
                tag = f"{name}-by-hospital/{hospital}" if hospital else name
                exact = float(np.float32(value)) if tracker == "tensorboard" else float(value)
                found[tag, server_round if step is None else step] = [exact]
    return found


def configuration(tracker, **changes):
    return from_flat({"run.tracker": tracker, **PLACES, **changes})


@pytest.fixture
def run(tmp_path):
    return RunDirectory.create(Config(), directory=tmp_path / "run")


def open_curves(run, tracker, console=SILENT, **changes):
    return curves(
        run,
        configuration(tracker, **changes),
        source="synthetic",
        command_line=[],
        console=console,
    )


def write_round(run, server_round, factor=1.0):
    for hospital in ("hospital-1", "Sankt Örjan, 2"):
        loss = factor / (server_round + 3)
        run.metric("train-loss", loss, round=server_round, hospital=hospital)
        run.metric("weight", 17, round=server_round, hospital=hospital)
    run.metric("validation-loss", factor / 7, round=server_round)
    run.metric("refused", f"a reason from {SECRET_PLACE}", round=server_round, hospital="x")


def plain(points):
    """MLflow takes no comma in a name."""
    return {(tag.replace(",", "_"), step): value for (tag, step), value in points.items()}


def test_curves_are_what_metrics_jsonl_holds(run, tracker):
    with open_curves(run, tracker):
        for server_round in (1, 2, 3):
            write_round(run, server_round)
        # A step of a single run: numbers beside the loss are curves too, and none of no loss.
        run.metric("train-loss", 2.5, step=7, gradient_norm=0.1, learning_rate=1e-3, tokens=81)
        run.metric("train-loss", None, step=8, learning_rate=2e-3)
    assert READERS[tracker](run) == plain(expected(run, tracker))
    assert len(expected(run, tracker)) == 3 * 5 + 5


def test_they_are_seen_while_the_run_goes_on(run, tracker):
    with open_curves(run, tracker) as drawing:
        write_round(run, 1)
        drawing.tell()
        assert READERS[tracker](run) == plain(expected(run, tracker))
        with (run.path / "metrics.jsonl").open("a") as half:
            half.write('{"name": "late", "value": 1')
        drawing.tell()
        with (run.path / "metrics.jsonl").open("a") as half:
            half.write(', "round": 2, "time": 5}\n')
    assert READERS[tracker](run)["late", 2] == [1.0]


def test_a_thread_follows_unasked(run, tracker, monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 0.01)
    told = threading.Event()
    with open_curves(run, tracker) as drawing:
        tell = drawing.tracker.tell
        drawing.tracker.tell = lambda points: (tell(points), told.set())
        write_round(run, 1)
        assert told.wait(60)


def test_a_run_directory_may_be_moved_before_it_goes_on(run, tracker):
    with open_curves(run, tracker):
        write_round(run, 1)
    moved = RunDirectory(run.path.rename(run.path.with_name("moved")))
    with open_curves(moved, tracker):
        write_round(moved, 2)
    assert READERS[tracker](moved) == plain(expected(moved, tracker))


@pytest.mark.parametrize("restored", ["before the curves", "while they are drawn"])
def test_a_resumed_run_has_every_step_once(run, tracker, restored):
    """Round 2 was begun before the kill: what is told of it in the end is what it became."""
    with open_curves(run, tracker):
        write_round(run, 1)
        write_round(run, 2, factor=5.0)
    if restored == "before the curves":
        run.forget_metrics(after=1)
    with open_curves(run, tracker) as drawing:
        drawing.tell()
        if restored == "while they are drawn":
            run.forget_metrics(after=1)
        write_round(run, 2)
        drawing.tell()
        write_round(run, 3)
    assert READERS[tracker](run) == plain(expected(run, tracker))
    assert len(READERS[tracker](run)) == 3 * 5


def test_numbers_and_public_keys_alone_are_told(run, tracker):
    with open_curves(run, tracker):
        write_round(run, 1)
    files = [file for file in (run.path / tracker).rglob("*") if file.is_file()]
    assert files
    # MLflow says where its own files lie.
    content = b"".join(file.read_bytes() for file in files).replace(str(run.path).encode(), b"")
    assert b"elsewhere" not in content
    assert b"a reason" not in content
    assert b"train.learning-rate" in content or any(f.name == "train.learning-rate" for f in files)
    told = public_configuration(configuration(tracker))
    assert not set(told) & set(PLACES)


def test_a_tracker_that_fails_ends_no_run(run, tracker):
    shown = io.StringIO()
    with open_curves(run, tracker, Terminal(file=shown, width=200)) as drawing:
        write_round(run, 1)

        def fail(points):
            raise OSError("the disk is gone")

        drawing.tracker.tell = fail
    (line,) = shown.getvalue().splitlines()
    assert line == (
        f"run.tracker={tracker} is given up: OSError: the disk is gone; "
        "metrics.jsonl has every figure"
    )


def test_one_that_cannot_begin_is_told_before_training(run, tracker):
    (run.path / tracker).write_text("in the way")
    with (
        pytest.raises(UserError, match=f"run.tracker={tracker} cannot begin: "),
        open_curves(run, tracker),
    ):
        pytest.fail("it began")


def test_none_is_nothing(run):
    with open_curves(run, "none") as drawing:
        write_round(run, 1)
    assert drawing is None
    assert threading.active_count() == len(
        [thread for thread in threading.enumerate() if thread.name != "curves"]
    )
    assert {file.name for file in run.path.iterdir()} == {
        *("config.toml", "status.json", "metrics.jsonl")
    }


@pytest.mark.parametrize(
    ("tracker", "package"), [("tensorboard", "tensorboard"), ("mlflow", "mlflow-skinny")]
)
def test_a_missing_package_is_one_line(tracker, package, monkeypatch):
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as error:
        check_tracker(configuration(tracker), [])
    line = str(error.value)
    assert line.startswith(f"run.tracker={tracker} needs the package {package}; fix: pip install '")
    assert f"'{package}" in line
    assert "\n" not in line


AGREED = "Data use agreement 2031-07"
FAR = "https://curves.example.org"


@pytest.mark.parametrize(
    ("keys", "named", "source", "refusal"),
    [
        ({"run.tracker-url": "http://127.0.0.1:5000"}, False, "credentialed", None),
        ({"run.tracker-url": "http://[::1]:5000"}, False, "credentialed", None),
        ({"run.tracker-url": FAR}, True, "demo", None),
        ({"run.tracker-url": FAR}, False, "demo", "not named on the command line"),
        ({"run.tracker-url": "http://10.0.0.5:5000"}, False, "demo", "not named on the command"),
        ({"run.tracker-url": "http://127.0.0.1.nip.io"}, False, "demo", "not named on the command"),
        ({"run.tracker-url": FAR}, True, "credentialed", "counts as credentialed"),
        ({"run.tracker-url": FAR}, True, "a new source", "counts as credentialed"),
        (
            {"run.tracker-url": FAR, "run.tracker-agreement": "yes"},
            *(True, "credentialed", "at least 12 characters"),
        ),
        (
            {"run.tracker-url": FAR, "run.tracker-agreement": AGREED},
            *(False, "credentialed", "not named on the command line"),
        ),
        (
            {"run.tracker-url": "http://curves.example.org", "run.tracker-agreement": AGREED},
            *(True, "credentialed", "over http"),
        ),
        ({"run.tracker-url": FAR, "run.tracker-agreement": AGREED}, True, "credentialed", None),
        ({"run.tracker-url": FAR, "privacy.target-epsilon": 3.0}, True, "demo", "privacy is on"),
        ({"run.tracker-url": "ftp://127.0.0.1"}, True, "demo", "not a plain http"),
        ({"run.tracker-url": "http://me:word@127.0.0.1"}, True, "demo", "not a plain http"),
        ({"run.tracker-url": FAR, "run.tracker": "none"}, True, "demo", "run.tracker=none"),
        ({"run.tracker-url": FAR, "run.tracker": "tensorboard"}, True, "demo", "=tensorboard"),
    ],
)
def test_where_figures_may_go(keys, named, source, refusal):
    pytest.importorskip("mlflow")
    config = configuration("mlflow", **keys)
    address = f"run.tracker-url={config.run.tracker_url}"
    for command_line in (["fedrx", "--set", address], [f"--set={address}"]):
        expectation = (
            pytest.raises(UserError, match=refusal) if refusal else contextlib.nullcontext()
        )
        with expectation:
            check_tracker(config, command_line if named else [], source=source)


@pytest.fixture
def server():
    """An MLflow server of a few lines: its address, and every request that it got."""
    got = []

    def answer(path, body):
        what = path.partition("?")[0].rsplit("mlflow/", 1)[-1]
        got.append((what, body.decode()))
        run = {"info": {"run_id": f"run-{len(got)}", "run_uuid": "u", "experiment_id": "4"}}
        answers = {
            "experiments/get-by-name": {"experiment": {"experiment_id": "4", "name": "fedrx"}},
            "runs/create": {"run": run},
            "runs/update": {"run_info": run["info"]},
        }
        return json.dumps(answers.get(what, {})).encode()

    with answering(answer) as address:
        yield address, got


def test_a_server_gets_numbers_and_public_keys_alone(run, server, fake_proxy, monkeypatch):
    pytest.importorskip("mlflow")
    for name, value in fake_proxy.environment().items():
        monkeypatch.setenv(name, value)
    address, got = server
    with open_curves(run, "mlflow", **{"run.tracker-url": address}):
        write_round(run, 1)
    with open_curves(run, "mlflow", **{"run.tracker-url": address}):
        pass
    told = [
        (metric["key"], metric["step"], metric["value"])
        for what, body in got
        if what == "runs/log-batch"
        for metric in json.loads(body).get("metrics", [])
    ]
    once = [(*key, *value) for key, value in plain(expected(run, "mlflow")).items()]
    assert sorted(told) == sorted(once * 2)
    # The second beginning takes the first run away, on that server.
    assert [json.loads(body)["run_id"] for what, body in got if what == "runs/delete"] == ["run-2"]
    everything = "".join(body for _, body in got)
    assert "elsewhere" not in everything
    assert "a reason" not in everything
    assert str(Path(run.path).parent) not in everything
    assert not (run.path / "mlflow").exists()
    assert fake_proxy.seen == []


def test_a_dead_server_is_one_line(run, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    config = configuration("mlflow", **{"run.tracker-url": "http://127.0.0.1:9"})
    drawing = curves(run, config, source="demo", command_line=[])
    with pytest.raises(UserError) as error, drawing:
        pytest.fail("it began")
    assert str(error.value).startswith("run.tracker=mlflow cannot begin: ")
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_federation_that_was_interrupted_has_whole_curves(tiny_config, tracker, tmp_path):
    """Round 2 ends after its training; the run goes on, and its checkpoint is round 1."""
    config = tiny_config(
        run__backend="in-process",
        run__tracker=tracker,
        evaluation__samples=2,
        evaluation__max_new_tokens=8,
    )
    begun = []

    def cut(config, message, context, worker):
        begun.append(message.content["config"]["round"])
        if begun[-1] == 2:
            raise KeyboardInterrupt
        return handlers.evaluate_round(config, message, context, worker)

    run = RunDirectory(tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(handlers.HANDLERS, "evaluate", cut)
        with pytest.raises(KeyboardInterrupt):
            federate(config, run_dir=run.path, command_line=["fedrx"])
    assert {step for _, step in READERS[tracker](run)} == {0, 1, 2}
    resume(run.path, command_line=["fedrx"])
    found = READERS[tracker](run)
    assert found == expected(run, tracker)
    assert ("validation-loss", 2) in found
    assert ("train-loss-by-hospital/hospital-3", 2) in found


@pytest.mark.slow
def test_a_single_run_has_a_curve_of_each_step(tiny_config, tracker, tmp_path):
    config = tiny_config(evaluation__samples=2, evaluation__max_new_tokens=8)
    run = RunDirectory(tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SingleTraining, "finish", lambda training: 1 / 0)
        with pytest.raises(RunFailed):
            single(config, run_dir=run.path, command_line=["fedrx"])
    # What a run is drawn with may change when it goes on.
    resume(run.path, [f"run.tracker={tracker}"], command_line=["fedrx"])
    found = READERS[tracker](run)
    assert found == expected(run, tracker)
    assert {step for tag, step in found if tag == "learning_rate"} == {1, 2, 3, 4}


@pytest.mark.parametrize("verb", [federate, single])
def test_what_may_not_be_leaves_nothing(verb, tiny_config, tmp_path):
    """It is told before the data is looked for."""
    pytest.importorskip("mlflow")
    config = tiny_config(
        run__tracker="mlflow", run__tracker_url="https://curves.example.org", data__path="/nowhere"
    )
    with pytest.raises(UserError, match="not named on the command line"):
        verb(config, command_line=[], run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
