"""The paper run: every checkpoint of every rank answered, beside the paper's printed numbers."""

import io
import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import sim.runs.paper
import sim.runs.paper_best
import sim.runs.single
from common.configio import parse_overrides
from common.errors import UserError
from common.rundir import RunDirectory
from sim.cli.main import main
from sim.cli.terminal import Terminal
from sim.report.html import to_markdown
from sim.runs.lifecycle import evaluate
from sim.runs.paper import BESIDE, paper, paper_config, read_ranks, renew_table, scaled_config
from sim.runs.paper_best import best_config, best_rows
from sim.runs.paper_table import (
    HEADERS,
    PAPER,
    SHORT_HEADERS,
    PaperTable,
    _pairs,
    paper_rows,
    rank_runs,
    table_blocks,
    table_parts,
)
from sim.runs.resume import resume

# As printed in the paper, with 4870 mended to 4875.
PRINTED = """
16 1950 60% 13.0% 81.1%
16 2925 45% 22.9% 79.9%
16 3900 55% 19.7% 81.1%
16 4875 55% 15.7% 85.5%
32 1950 55% 20.7% 98.2%
32 2925 55% 18.5% 87.5%
32 3900 50% 17.4% 85.1%
32 4875 55% 21.6% 91.0%
"""
TINY = [
    "model.backbone=tiny",
    "data.synthetic-patients=30",
    "train.steps=10",
    "train.max-length=256",
    "train.dtype=fp32",
    "train.device=cpu",
    "train.threads=1",
    "evaluation.samples=3",
    "evaluation.max-new-tokens=8",
]


def run_paper(path, ranks=(16, 4), best=False, extra=()):
    return paper(
        scaled_config("small", parse_overrides([*TINY, *extra])),
        scale="small",
        ranks=ranks,
        best=best,
        command_line=["fedrx", "paper"],
        run_dir=path,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("paper") / "run"
    return RunDirectory(path), run_paper(path)


def test_the_papers_numbers_are_as_printed():
    rows = [line.split() for line in PRINTED.split("\n") if line]
    assert len(rows) == len(PAPER)
    for row, (rank, steps, rate, accuracy, suitable) in zip(PAPER, rows, strict=True):
        assert (row.rank, row.steps) == (int(rank), int(steps))
        for value, text in ((row.output_rate, rate), (row.accuracy, accuracy)):
            assert f"{value:.1%}" == f"{float(text[:-1]):.1f}%"
        assert f"{row.appropriateness:.1%}" == suitable


def test_the_shipped_configuration_is_the_papers():
    config = paper_config()
    assert config.model.backbone == "meta-llama/Llama-3.1-8B-Instruct"
    assert (config.adapter.alpha, config.adapter.targets) == (16.0, "q_proj,v_proj")
    train = config.train
    assert (train.optimizer, train.learning_rate, train.batch_size) == ("sgd", 1e-3, 4)
    assert (train.max_length, train.epochs) == (2048, 5.0)
    assert [int(s) for s in train.checkpoint_steps.split(",")] == [r.steps for r in PAPER[:4]]
    # 5 epochs of the inferred samples are the paper's last step.
    assert config.data.train_samples / train.batch_size * train.epochs == PAPER[3].steps


@pytest.mark.slow
def test_every_checkpoint_of_every_rank_is_answered(finished):
    run, table = finished
    assert table.as_json() == run.read_json("summary.json")
    here = [(row.rank, row.here.steps) for row in table.rows]
    assert here == [(rank, step) for rank in (16, 4) for step in (4, 6, 8, 10)]
    assert [row.paper.steps for row in table.rows[:4]] == [1950, 2925, 3900, 4875]
    assert [row.paper for row in table.rows[4:]] == [None] * 4
    for rank in (16, 4):
        one = RunDirectory.open(run.path / f"rank-{rank}")
        answers = one.lines("predictions.jsonl")
        for model in ("fedrx", "untrained", "step-00000004", "step-00000006", "step-00000008"):
            assert len({row["case"] for row in answers if row["model"] == model}) == 3
        b = {name: one.load_checkpoint(name).b for name in one.checkpoint_names()}
        for row in (row.here for row in table.rows if row.rank == rank):
            values = np.concatenate([v.ravel() for v in b[row.checkpoint].values()])
            assert row.b_norm == pytest.approx(np.linalg.norm(values.astype(float)), rel=1e-6)
    assert {"untrained", "popularity"} <= set(table.others)
    assert run.status().state == "finished"


@pytest.mark.parametrize(
    ("steps", "pairs"),
    [
        ((4, 6, 8, 10), [(1950, 4), (2925, 6), (3900, 8), (4875, 10)]),
        ((1, 2), [(1950, 1), (2925, 1), (3900, 2), (4875, 2)]),
        ((3, 4, 10), [(None, 3), (1950, 4), (2925, None), (3900, None), (4875, 10)]),
    ],
)
def test_a_checkpoint_stands_beside_the_paper_s_at_the_same_share(steps, pairs):
    found = _pairs(paper_rows(16), [SimpleNamespace(step=step) for step in steps])
    assert [(a and a.steps, b and b.step) for a, b in found] == pairs


@pytest.mark.slow
def test_a_table_has_its_own_answers_only(finished):
    """Whoever evaluates another checkpoint, with fewer samples, does not change the table."""
    run, table = finished
    one = RunDirectory.open(run.path / "rank-16")
    evaluate(one, checkpoint="step-00000004", overrides=["evaluation.samples=2"])
    again = resume(run.path, command_line=[])
    assert again["rows"] == table.as_json()["rows"]
    assert one.read_json("summary.json")["evaluation"]["checkpoint"] == "step-00000010"
    assert {m["samples"] for m in one.read_json("summary.json")["metrics"].values()} == {3}


def test_a_rank_that_is_not_allowed_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="adapter.rank=600"):
        run_paper(tmp_path / "run", ranks=(600,))
    assert not (tmp_path / "run").exists()


def test_the_scale_stands_in_every_table(finished):
    run, table = finished
    scale = table.scale
    for text in ("scale small", "backbone tiny (paper: Llama-3.1-8B", "10 steps (paper: 4,875)"):
        assert text in scale
    blocks = [block for block in table_blocks(table) if block.rows]
    assert len(blocks) == 4
    assert all(scale in block.note for block in blocks)
    assert (run.path / "report.md").read_text().count(scale) == 4
    console = Terminal(width=80, record=True, file=io.StringIO())
    console.say(*table_parts(table))
    text = console.export_text()
    assert "…" not in text
    header = next(line for line in text.splitlines() if line.split()[:1] == ["rank"])
    assert header.split() == " ".join(SHORT_HEADERS).split()
    assert " 81.1% " in text
    shown = " ".join(text.split())
    assert shown.count("scale small: backbone tiny") == 2
    assert "model.backbone: 'meta-llama/Llama-3.1-8B-Instruct' -> 'tiny'" in table.differences


def test_a_judgement_fills_the_column(finished):
    run, table = finished
    one = RunDirectory.open(run.path / "rank-16")
    summary = one.read_json("summary.json")
    judged = {"step-00000004": {"mean": 0.5}, "fedrx": {"mean": 0.75}}
    one.write_json("summary.json", {**summary, "judge": {"appropriateness": judged}})
    again = resume(run.path, command_line=[])
    one.write_json("summary.json", summary)
    told = [row["here"]["appropriateness"] for row in again["rows"]]
    assert told == [0.5, None, None, 0.75] + [None] * 4
    assert "81.1% / 50.0%" in to_markdown("", table_blocks(PaperTable.read(again, what="")))
    assert len(HEADERS) == 8
    assert [row["here"]["b_norm"] for row in again["rows"]] == [
        row.here.b_norm for row in table.rows
    ]


def test_a_paper_run_stands_for_the_runs_inside(finished):
    run, _ = finished
    inside = rank_runs(run)
    assert [one.path.name for one in inside] == ["rank-16", "rank-4"]
    assert rank_runs(inside[0]) == [inside[0]]


def test_a_paper_run_s_page_is_its_table_anew(finished, tmp_path):
    run, _ = finished
    before = renew_table(run).read_bytes()
    assert b"The paper" in before
    (run.path / "report.html").unlink()
    assert renew_table(run) == run.path / "report.html"
    assert (run.path / "report.html").read_bytes() == before
    begun = RunDirectory(shutil.copytree(run.path, tmp_path / "begun"))
    begun.write_status("interrupted")
    with pytest.raises(UserError, match="finish it with `fedrx resume`"):
        renew_table(begun)


@pytest.mark.parametrize("verb", ["evaluate", "export"])
def test_one_run_s_verbs_point_into_a_paper_run(verb, finished, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fedrx", verb, str(finished[0].path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert f"for instance {finished[0].path / 'rank-16'}" in capsys.readouterr().err


def test_report_on_a_paper_run_writes_into_it(finished, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fedrx", "report", str(finished[0].path)])
    with pytest.raises(SystemExit):
        main()
    assert str(finished[0].path / "report.html") in "".join(capsys.readouterr().out.split())
    assert not list(tmp_path.iterdir())


LONGER = ("evaluation.max-new-tokens=60", "train.steps=4")


@pytest.mark.slow
def test_the_best_settings_stand_beside_at_the_same_steps(tmp_path, monkeypatch):
    """Interrupted between its two kinds of lists: the first are kept, the table has both."""
    answered = sim.runs.paper_best._answered

    def stopped_at_the_second(one, around, lists):
        if lists == "formulary":
            raise KeyboardInterrupt
        return answered(one, around, lists)

    monkeypatch.setattr(sim.runs.paper_best, "_answered", stopped_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        run_paper(tmp_path / "run", ranks=(4,), best=True, extra=LONGER)
    monkeypatch.undo()
    run = RunDirectory.open(tmp_path / "run")
    first = run.read_json("best.json")
    assert list(first) == ["scored"]
    again = resume(run.path, command_line=[])
    assert run.read_json("best.json")["scored"] == first["scored"]
    table = PaperTable.read(again, what="")
    steps = [row.here.steps for row in table.rows]
    told = [(one.lists, one.steps) for one in table.best]
    assert told == [(lists, step) for lists in ("scored", "formulary") for step in steps]
    assert {one.output_rate for one in table.best} == {1.0}
    inside = RunDirectory.open(run.path / "best")
    answered = {row["model"] for row in inside.lines("predictions.jsonl")}
    assert {one.checkpoint for one in table.best} - answered == {inside.checkpoint_names()[-1]}
    assert all((one.prauc is not None) == (one.lists == "scored") for one in table.best)
    inside = RunDirectory.open(run.path / "best").config()
    assert (inside.data.drug_order, inside.evaluation.method) == ("set", "score")
    # The paper's own settings are what they were.
    rank = RunDirectory.open(run.path / "rank-4").config()
    assert (rank.train.optimizer, rank.train.learning_rate) == ("sgd", 1e-3)
    assert (rank.data.drug_order, rank.evaluation.decoding) == ("first-start", "greedy")
    page = to_markdown("", table_blocks(table))
    assert page.count("The best settings found here") == 1
    console = Terminal(width=80, record=True, file=io.StringIO())
    console.say(*table_parts(table))
    assert console.export_text().count(" formulary ") == len(steps)


def test_damaged_answers_of_the_best_settings_are_one_line(tmp_path):
    run = RunDirectory(tmp_path)
    run.write_json("best.json", {"scored": 5})
    with pytest.raises(UserError, match=r"best\.json: scored: "):
        best_rows(run)
    assert best_rows(RunDirectory(tmp_path / "none")) == ()


def test_only_the_small_scale_tries_them_unasked():
    assert BESIDE == {"small": True, "full": False}
    assert best_config(paper_config()).model == paper_config().model


@pytest.mark.slow
def test_an_interrupted_paper_run_goes_on(finished, tmp_path, monkeypatch):
    _, table = finished
    single = sim.runs.single.single

    def stopped_at_the_second(config, **options):
        if config.adapter.rank == 4:
            raise KeyboardInterrupt
        return single(config, **options)

    monkeypatch.setattr(sim.runs.single, "single", stopped_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        run_paper(tmp_path / "run")
    monkeypatch.undo()
    run = RunDirectory.open(tmp_path / "run")
    assert run.status().state == "interrupted"
    first = (run.path / "rank-16" / "metrics.jsonl").read_bytes()
    again = resume(run.path, command_line=[])
    assert (run.path / "rank-16" / "metrics.jsonl").read_bytes() == first
    assert json.dumps(again["rows"]) == json.dumps(table.as_json()["rows"])


def test_bad_scale_and_ranks_are_named():
    with pytest.raises(UserError, match="--scale medium; allowed: small | full"):
        scaled_config("medium", {})
    with pytest.raises(UserError, match="--ranks 16,x"):
        read_ranks("16,x")
    assert scaled_config("small", {"train.steps": 7}).train.steps == 7
    assert scaled_config("full", {}) == paper_config()
