"""``fedrx sweep``: which runs it plans, what its table says, and how it goes on."""

import contextlib
import io
import statistics
from dataclasses import replace
from typing import get_args, get_type_hints

import pytest

import sim.runs.cells
from common.config import AdapterConfig, FederationConfig
from common.errors import RunFailed, UserError
from common.records.checks import SweepRecord
from common.records.run import RunRecord
from common.records.summary import Figures, Summary
from common.rundir import RunDirectory
from common.training.budget import steps_in_all
from common.training.worker import Worker
from sim.cli.terminal import Terminal
from sim.process.lock import exclusive
from sim.report.terminal import block_parts
from sim.runs.federate import resolved
from sim.runs.single import one_node
from sim.runs.sweep import (
    ARMS,
    FIGURES,
    ArmRow,
    Interval,
    arms_block,
    default_arms,
    markdown,
    plan_cells,
    sweep,
    tabulate,
)


def summary(f1, loss=1.0):
    return Summary(
        b_sha256="b" * 64,
        metrics={"fedrx": {"f1": f1, "jaccard": f1 / 2}},
        validation_loss=(9.0, loss),
        wire={"tensors": (), "bytes_up": 2_000_000, "bytes_down": 0},
    )


def write_run(config, folder, found, state="finished"):
    """Write what of a run the sweep reads."""
    run = RunDirectory.create(config, directory=folder)
    run.write_json("run.json", RunRecord(mode="federation", resumable=True))
    run.write_json("summary.json", found)
    run.write_status(state)


@pytest.fixture
def trained(monkeypatch):
    """Replace training by a run directory with a result; lists the runs that were started."""
    started = []

    def fake(resolve):
        def start(config, *, run_dir, **_):
            write_run(resolve(config), run_dir, summary(0.5))
            started.append(run_dir.name)

        return start

    monkeypatch.setattr(sim.runs.cells, "federate", fake(resolved))
    monkeypatch.setattr(sim.runs.cells, "single", fake(one_node))
    return started


def test_plan_covers_arms_grid_and_seeds(tiny_config):
    cells = plan_cells(
        tiny_config(), arms=["fa-lora", "lora"], seeds=[0, 1], vary=["adapter.rank=4,8"]
    )
    assert len(cells) == 8
    assert len({cell.folder for cell in cells}) == 8
    assert {cell.config.adapter.rank for cell in cells} == {4, 8}
    assert {cell.config.adapter.mode for cell in cells if cell.arm.startswith("lora")} == {"lora"}
    for cell in cells:
        seeds = (cell.config.train.seed, cell.config.adapter.seed, cell.config.federation.seed)
        assert seeds == (cell.seed,) * 3


def test_baselines_without_federation(tiny_config):
    """Local-only: one run per hospital. Centralised: one node, as many samples in all."""
    config = tiny_config()
    local = plan_cells(config, arms=["local-only"], seeds=[0])
    assert [c.config.federation.only for c in local] == ["hospital-1", "hospital-2", "hospital-3"]
    assert local[1].title == "local-only, seed 0, hospital-2"
    (central,) = plan_cells(config, arms=["centralised"], seeds=[0])
    assert not central.federated
    assert central.config.train.steps == 3 * 2 * 2


def test_unknown_arm_or_key_is_a_user_error(tiny_config):
    with pytest.raises(UserError, match="--arm nonsense"):
        plan_cells(tiny_config(), arms=["nonsense"], seeds=[0])
    with pytest.raises(UserError, match="did you mean adapter.rank"):
        plan_cells(tiny_config(), arms=["lora"], seeds=[0], vary=["adapter.rnk=4"])


def test_interval_is_student_s_over_seeds():
    """By hand: t(0.975, 2) = 4.302653."""
    values = [0.2, 0.3, 0.7]
    row = tabulate([[summary(value)] for value in values])["F1"]
    assert row.mean == pytest.approx(0.4)
    assert row.half_width == pytest.approx(4.302653 * statistics.stdev(values) / 3**0.5, rel=1e-6)
    assert tabulate([[summary(0.5)]])["F1"].half_width is None
    averaged = tabulate([[summary(0.2), summary(0.4)], [summary(0.5), summary(0.7)]])["F1"]
    assert averaged.mean == pytest.approx(0.45)


def test_the_page_draws_f1_with_its_interval_where_there_is_one():
    figures = {name: Interval(2.0, 0.1) for name in FIGURES}
    rows = [
        ArmRow(arm="a", runs=3, **{**figures, "F1": Interval(0.5, 0.7)}),
        ArmRow(arm="b", runs=1, **{**figures, "F1": Interval(0.5, None)}),
        ArmRow(arm="c", runs=1, **{**figures, "F1": Interval(None, None)}),
    ]
    found = [(bar.value, bar.interval, bar.text) for bar in arms_block(rows).bars]
    assert found == [
        (0.5, (0.0, 1.0), "F1 0.5 ± 0.7"),
        (0.5, None, "F1 0.5"),
        (None, None, "F1 –"),
    ]


def test_sweep_runs_each_cell_once_and_writes_the_table(tiny_config, tmp_path, monkeypatch):
    started = []

    def fake(config, *, run_dir, **_):
        started.append(run_dir.name)
        resolve = one_node if run_dir.name.startswith("centralised") else resolved
        if run_dir.name == "lora-seed-1" and started.count("lora-seed-1") == 1:
            raise KeyboardInterrupt
        found = summary(0.1 * (1 + config.train.seed) + (config.adapter.mode == "lora"))
        write_run(resolve(config), run_dir, found)

    monkeypatch.setattr(sim.runs.cells, "federate", fake)
    monkeypatch.setattr(sim.runs.cells, "single", fake)
    cells = plan_cells(tiny_config(), arms=["fa-lora", "lora", "centralised"], seeds=[0, 1])
    console = Terminal(file=io.StringIO(), width=200)
    with pytest.raises(KeyboardInterrupt):
        sweep(cells, tmp_path, console=console, command_line=["fedrx"])
    assert console.file.getvalue().splitlines()[0] == "1/6: fa-lora, seed 0"
    result = sweep(cells, tmp_path, console=console, command_line=["fedrx"]).as_json()
    assert sorted(started) == sorted([c.folder for c in cells] + ["lora-seed-1"])
    assert [row["arm"] for row in result["rows"]] == ["fa-lora", "lora", "centralised"]
    assert result["rows"][1]["F1"]["mean"] == pytest.approx(1.15)
    assert "| lora | 2 | 1.15 ± " in (tmp_path / "sweep.md").read_text()
    record = RunDirectory(tmp_path).record()
    assert (record.mode, record.cells) == ("sweep", tuple(cell.folder for cell in cells))
    other = plan_cells(tiny_config(adapter__rank=8), arms=["fa-lora"], seeds=[0])
    with pytest.raises(UserError, match="adapter.rank"):
        sweep(other, tmp_path, console=console, command_line=["fedrx"])


@pytest.mark.parametrize("arm", ["fa-lora", "centralised"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data__path", "other"),
        ("model__backbone", "other"),
        ("federation__hospitals", 4),
        ("train__threads", 2),
        ("privacy__noise_multiplier", 1.5),
    ],
)
def test_another_experiments_result_is_refused(
    key, value, arm, tiny_config, trained, tmp_path, monkeypatch
):
    """Of one folder and two experiments, the second neither trains nor returns the first's row."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()

    def cells(**settings):
        return plan_cells(tiny_config(**settings), arms=[arm], seeds=[0])

    sweep(cells(), tmp_path / "sweep", command_line=[])
    dotted = "train.steps" if (arm, key) == ("centralised", "federation__hospitals") else key
    with pytest.raises(UserError, match=dotted.replace("__", ".").replace("_", "-")):
        sweep(cells(**{key: value}), tmp_path / "sweep", command_line=[])
    assert len(trained) == 1


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["fa-lora", "centralised"])
def test_the_same_experiment_is_recognised_from_anywhere(
    arm, tiny_config, trained, tmp_path, monkeypatch
):
    """Relative paths, automatic threads, calibrated noise, and any number of workers."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tables").mkdir()
    settings = {"privacy__target_epsilon": 4.0, "train__threads": 0}
    here = tiny_config(data__path="tables", **settings)
    there = tiny_config(
        data__path=str(tmp_path / "tables"), federation__workers=2, run__name="other", **settings
    )
    for config in (here, there):
        cells = plan_cells(config, arms=[arm], seeds=[0])
        sweep(cells, tmp_path / "sweep", command_line=[])
    assert len(trained) == 1


def test_a_cell_that_was_killed_before_it_began_is_run(tiny_config, trained, tmp_path):
    """Killed after config.toml and status.json; files of the user in its place stay."""
    (cell,) = plan_cells(tiny_config(), arms=["fa-lora"], seeds=[0])
    RunDirectory.create(cell.config, directory=tmp_path / cell.folder)
    (tmp_path / cell.folder / ".data.json.x.part").write_text("{")
    sweep([cell], tmp_path, command_line=[])
    assert trained == [cell.folder]
    (other,) = plan_cells(tiny_config(), arms=["lora"], seeds=[0])
    (tmp_path / other.folder).mkdir()
    (tmp_path / other.folder / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        sweep([other], tmp_path, command_line=[])
    assert (tmp_path / other.folder / "precious.txt").read_text() == "mine"


def test_an_unfinished_cell_is_resumed(tiny_config, trained, tmp_path, monkeypatch):
    (cell,) = plan_cells(tiny_config(), arms=["fa-lora"], seeds=[0])
    folder = tmp_path / cell.folder
    write_run(resolved(cell.config), folder, summary(0.1), state="interrupted")

    def resumed(path, **_):
        RunDirectory(path).write_json("summary.json", summary(0.75))

    monkeypatch.setattr(sim.runs.cells, "resume", resumed)
    result = sweep([cell], tmp_path, command_line=[]).as_json()
    assert result["rows"][0]["F1"]["mean"] == 0.75
    assert trained == []


def test_status_says_how_far_a_sweep_is(tiny_config, trained, tmp_path, monkeypatch):
    """Before its first run, after a failure, after Ctrl-C, and at its end."""
    directory, seen = RunDirectory(tmp_path), []
    cells = plan_cells(tiny_config(), arms=["fa-lora", "lora"], seeds=[0])
    begin = sim.runs.cells.federate

    def broken(error):
        def start(config, *, run_dir, **keys):
            seen.append(directory.status())
            if error and "lora-seed" in run_dir.name:
                raise error
            return begin(config, run_dir=run_dir, **keys)

        return start

    errors = UserError("a quarrel"), TypeError("a newer library"), KeyboardInterrupt(), None
    for error, state in zip(errors, ("failed", "failed", "interrupted", "finished"), strict=True):
        monkeypatch.setattr(sim.runs.cells, "federate", broken(error))
        with contextlib.suppress(UserError, RunFailed, KeyboardInterrupt):
            sweep(cells, tmp_path, command_line=[])
        assert directory.status().state == state
        assert (directory.status().error != "") == (state == "failed")
    assert (seen[0].state, seen[0].stage, seen[0].cells) == ("running", "training", 0)
    assert directory.status().cells == 2


@pytest.mark.parametrize("mode", ["federation", "generalise"])
def test_a_sweep_is_not_begun_over_a_run(tiny_config, trained, tmp_path, mode):
    cells = plan_cells(tiny_config(), arms=["fa-lora"], seeds=[0])
    write_run(tiny_config(), tmp_path / "run", summary(0.5))
    inside = ("all-seed-0",) if mode == "generalise" else ()
    record = RunRecord(mode=mode, resumable=False, cells=inside)
    RunDirectory(tmp_path / "run").write_json("run.json", record)
    before = (tmp_path / "run" / "run.json").read_bytes()
    with pytest.raises(UserError, match=rf"run of another kind \({mode}\); fix: name another"):
        sweep(cells, tmp_path / "run", command_line=[])
    assert (tmp_path / "run" / "run.json").read_bytes() == before


def test_jobs_run_while_the_sweep_is_held(tiny_config, trained, tmp_path):
    cells = plan_cells(tiny_config(), arms=["fa-lora"], seeds=[0])

    def jobs(asked, folder, _console, _command_line, finished):
        run = RunDirectory(folder)
        assert (asked, run.status().state, run.status().cells) == (cells, "running", 0)
        with pytest.raises(UserError, match="another process is at work"), exclusive(run):
            pass
        write_run(resolved(cells[0].config), folder / cells[0].folder, summary(0.25))
        finished()
        assert run.status().cells == 1

    table = sweep(cells, tmp_path, command_line=[], jobs=jobs)
    assert table.rows[0].figures["F1"].mean == 0.25
    assert trained == []
    read = SweepRecord.read((tmp_path / "sweep.json").read_bytes(), what="sweep.json")
    assert read == table


def test_one_sweep_at_a_time_in_a_folder(tiny_config, trained, tmp_path):
    cells = plan_cells(tiny_config(), arms=["fa-lora"], seeds=[0])
    with (
        exclusive(RunDirectory(tmp_path)),
        pytest.raises(UserError, match="another process is at work"),
    ):
        sweep(cells, tmp_path, command_line=[])
    assert trained == []


def test_a_folder_called_like_built_in_data_is_not_taken_for_it(tiny_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("synthetic", "tiny"):
        (tmp_path / name).mkdir()
    config = tiny_config()
    for settled in (resolved(config), one_node(config)):
        assert (settled.data, settled.model) == (config.data, config.model)
    tables = replace(config, data=replace(config.data, path="./synthetic"))
    assert resolved(tables).data.path == str(tmp_path / "synthetic")


def test_a_drug_map_is_found_from_a_worker_s_folder(tiny_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "map.csv").write_text("name,code\n")
    config = tiny_config(data__drug_map="map.csv")
    for settled in (resolved(config), one_node(config)):
        assert settled.data.drug_map == str(tmp_path / "map.csv")
    assert resolved(tiny_config()).data.drug_map == ""


def test_local_only_trains_on_one_hospital_alone(tiny_config, in_process):
    """Against a plain loop on that hospital's samples: no other update enters."""
    from common.data.dataset import open_hospitals
    from common.training.hospital_data import encode_hospital
    from common.training.loop import TrainState, train
    from common.training.worker import Worker

    config = tiny_config(federation__only="hospital-2")
    done = in_process(config)
    assert {e.hospital for e in done.run.metrics("steps")} == {"hospital-2"}
    session = Worker().session(config)
    data = encode_hospital(open_hospitals(config).hospitals[1], session, config)
    session.adapter.flat.zero_()
    train(
        session, data.train, config.train, TrainState(), steps=4, schedule_steps=4, stream=data.name
    )
    ours = done.run.load_checkpoint().b
    assert max(abs(ours[k] - v).max() for k, v in session.adapter.state().items()) <= 1e-6


def test_cells_in_one_process_share_one_backbone(tiny_config, tmp_path, monkeypatch):
    """No mark allows a process here: neither SuperLink nor Ray is started."""
    worker, opened = Worker(), []
    monkeypatch.setattr("client.app.worker", lambda: worker)
    honest = Worker.session

    def session(asked, config):
        opened.append(asked)
        return honest(asked, config)

    monkeypatch.setattr(Worker, "session", session)
    short = tiny_config(
        run__backend="in-process",
        train__threads=1,
        federation__rounds=1,
        evaluation__samples=2,
        evaluation__max_new_tokens=8,
    )
    cells = plan_cells(short, arms=["fa-lora", "fedmedian", "centralised"], seeds=[0])
    sweep(cells, tmp_path, command_line=["fedrx"])
    runs = [RunDirectory.open(tmp_path / cell.folder) for cell in cells]
    assert [run.summary().backbone_loads for run in runs] == [1, 1, 1]
    assert worker.loads.total() == 1
    assert {id(one) for one in opened} == {id(worker)}
    alone = tmp_path / "alone"
    worker = Worker()
    sweep(cells[1:2], alone, command_line=["fedrx"])
    again = RunDirectory.open(alone / cells[1].folder).summary().b_sha256
    assert again == runs[1].summary().b_sha256


def test_every_arm_is_a_valid_configuration(tiny_config):
    config = tiny_config(federation__hospitals=5)
    assert default_arms(config) == (list(ARMS), [])
    assert len(plan_cells(config, arms=list(ARMS), seeds=[0])) == len(ARMS) + 4


def test_every_strategy_and_adapter_mode_is_an_arm(tiny_config):
    configs = {
        arm: plan_cells(tiny_config(federation__hospitals=5), arms=[arm], seeds=[0])[0].config
        for arm in ARMS
    }
    strategies = get_args(get_type_hints(FederationConfig)["strategy"])
    assert {configs[arm].federation.strategy for arm in configs} == {*strategies}
    assert all(configs[name].federation.strategy == name for name in {*strategies} - {"fedavg"})
    assert configs["rolora"].adapter.mode == "rolora"
    modes = get_args(get_type_hints(AdapterConfig)["mode"])
    assert {configs[arm].adapter.mode for arm in configs} == {*modes}


def test_arms_that_privacy_refuses_are_left_out_unless_named(tiny_config):
    config = tiny_config(
        federation__hospitals=5,
        privacy__noise_multiplier=1.0,
        privacy__delta=1e-4,
        federation__weighting="uniform",
    )
    arms, (reason,) = default_arms(config)
    assert set(ARMS) - set(arms) == {"q-fedavg"}
    assert reason.startswith("without the arm q-fedavg: ")
    assert "no loss leaves a hospital" in reason
    with pytest.raises(UserError, match="q-fedavg"):
        plan_cells(config, arms=["q-fedavg"], seeds=[0])


def test_arms_that_withstand_nothing_are_left_out_unless_named(tiny_config):
    arms, reasons = default_arms(tiny_config())
    assert set(ARMS) - set(arms) == {"trimmed-mean", "krum"}
    assert [reason.split(":")[0] for reason in reasons] == [
        "without the arm trimmed-mean",
        "without the arm krum",
    ]
    with pytest.raises(UserError, match="krum"):
        plan_cells(tiny_config(), arms=["krum"], seeds=[0])
    krum = tiny_config(federation__strategy="krum")
    assert len(plan_cells(krum, arms=["centralised", "local-only"], seeds=[0])) == 4


@pytest.mark.parametrize(
    ("settings", "samples_each"),
    [
        ({"train__steps": 7}, 7),
        ({"train__steps": 7, "train__epochs": 2.0}, 7),
        ({"train__epochs": 2.0}, None),
        ({}, 2 * 2),
        ({"federation__hospitals": 4, "federation__fraction": 0.5}, 2 * 2),
    ],
)
def test_centralised_sees_as_many_samples_as_the_hospitals(settings, samples_each, tiny_config):
    """Steps of the hospitals together, by the rule of the training itself; epochs stay epochs."""
    config = tiny_config(**settings)
    (central,) = plan_cells(config, arms=["centralised"], seeds=[0])
    asked = 2 if "federation__fraction" in settings else 3
    per_hospital = steps_in_all(config, train_samples=100).value
    assert per_hospital == (samples_each or 100)
    assert steps_in_all(central.config, train_samples=300).value == asked * per_hospital


def test_table_of_runs_without_a_validation_loss(tiny_config):
    """Privacy lets none out, and a validation share of 0 leaves none: the figure is missing."""
    without = summary(0.5).having(validation_loss=[])
    row = tabulate([[without], [without]])
    assert row["validation loss"] == Interval(None, None)
    assert row["F1"].mean == 0.5
    assert tabulate([[without], [summary(0.5)]])["validation loss"].mean is None
    rows = [ArmRow(arm="fa-lora", runs=2, **row)]
    assert "| fa-lora | 2 | 0.5 ± 0 | 0.25 ± 0 | – | 2 ± 0 |" in markdown(rows)
    console = Terminal(file=io.StringIO(), width=200)
    console.say(*block_parts(arms_block(rows)))
    assert "–" in console.file.getvalue()


@pytest.mark.parametrize("personal", [False, True])
def test_a_sweep_says_everywhere_that_no_epsilon_covers_personal_answers(
    personal, tmp_path, tiny_config, monkeypatch
):
    metrics = {"fedrx": Figures(f1=0.5), "personal": Figures(f1=0.7)}
    found = summary(0.5).having(metrics=metrics) if personal else summary(0.5)

    def train(config, *, run_dir, **_):
        write_run(resolved(config), run_dir, found)

    monkeypatch.setattr(sim.runs.cells, "federate", train)
    console = Terminal(file=io.StringIO(), width=4000)
    cells = plan_cells(tiny_config(), arms=["fa-lora", "personal"], seeds=[0])
    sweep(cells, tmp_path / "s", console=console, command_line=())
    files = [(tmp_path / "s" / name).read_text() for name in ("sweep.md", "sweep.html")]
    told = [text.count("no epsilon covers them") for text in (*files, console.file.getvalue())]
    assert told == [personal] * 3
    assert ("0.7" in files[0]) is personal
