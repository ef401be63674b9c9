"""``evaluate_run`` on a run directory as a training leaves it."""

import io
import json
import shutil

import numpy as np
import pytest

import common.evaluation.answers_file
from common.config import Config, JudgeConfig
from common.configio import from_flat
from common.data.partition import assign_hospitals
from common.data.prepare import load_samples
from common.errors import UserError
from common.evaluation.answers_file import read_answers
from common.evaluation.judge.questions import questions_of
from common.provenance import tensors_sha256
from common.records.run import RunRecord, SavedFacts
from common.rundir import RunDirectory
from common.tensor_files import Altered
from common.training.worker import Worker
from sim.answers.evaluate import evaluate_run
from sim.answers.review import make_review
from sim.cli.terminal import Terminal
from sim.runs.lifecycle import evaluate
from sim.runs.resume import resume

KEYS = {
    "data.path": "synthetic",
    "data.synthetic-patients": 40,
    "data.validation-fraction": 0.2,
    "model.backbone": "tiny",
    "adapter.rank": 4,
    "train.dtype": "fp32",
    "train.device": "cpu",
    "train.threads": 1,
    "train.max-length": 1024,
    "federation.hospitals": 2,
    "evaluation.samples": 5,
    "evaluation.max-new-tokens": 12,
    "evaluation.bootstrap": 100,
}


def b_of(config: Config, scale: float) -> dict[str, np.ndarray]:
    random = np.random.default_rng(3)
    return {
        key: (scale * random.standard_normal(shape)).astype(np.float32)
        for key, shape in Worker().session(config).adapter.shapes.items()
    }


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache of its own, so that tests neither read nor fill the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDRX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def finished(cache, tmp_path_factory):
    config = from_flat(KEYS)
    run = RunDirectory.create(config, directory=tmp_path_factory.mktemp("runs") / "run")
    session = Worker().session(config)
    inputs = {
        "samples": load_samples(config.data).digest,
        "backbone": session.spec.fingerprint,
        "a": session.adapter.a_fingerprint,
    }
    run.write_json("run.json", RunRecord(mode="federation", resumable=True, inputs=inputs))
    run.save_checkpoint("round-0001", b_of(config, 0.3), facts=SavedFacts(round=1))
    run.save_checkpoint("round-0002", b_of(config, 3.0), facts=SavedFacts(round=2))
    run.write_json("summary.json", {"rounds": 2, "judge": {"appropriateness": {}}})
    run.write_status("finished")
    return run


@pytest.fixture
def run(finished, tmp_path):
    return RunDirectory(shutil.copytree(finished.path, tmp_path / "run"))


def test_predictions_and_metrics_stand_in_the_run(run):
    summary = evaluate_run(run).as_json()
    assert summary == run.read_json("summary.json")
    assert summary["rounds"] == 2
    assert summary["evaluation"]["checkpoint"] == "round-0002"
    models = ["fedrx", "untrained", "popularity", "nearest_neighbours", "logistic_regression"]
    assert list(summary["metrics"]) == models
    rows = run.lines("predictions.jsonl")
    assert [row["model"] for row in rows] == models * 5
    # Recall by hand, from the rows alone.
    for model in ("popularity", "fedrx"):
        shares = [
            len(set(map(str.casefold, row["truth"])) & set(map(str.casefold, row["answer"] or ())))
            / len(set(map(str.casefold, row["truth"])))
            for row in rows
            if row["model"] == model
        ]
        assert summary["metrics"][model]["recall"] == pytest.approx(np.mean(shares))
    assert summary["metrics"]["popularity"]["recall"] > 0


def test_rows_are_held_out_admissions_without_their_keys(run):
    evaluate_run(run)
    config = run.config()
    admissions = load_samples(config.data).admissions
    hospitals = assign_hospitals(admissions, config.partition, hospitals=2, data=config.data)
    held_out = {(one.diagnoses, one.drugs) for room in hospitals for one in room.test}
    text = (run.path / "predictions.jsonl").read_text(encoding="utf-8")
    for row in run.lines("predictions.jsonl"):
        assert (tuple(row["diagnoses"]), tuple(row["truth"])) in held_out
    for one in admissions:
        assert str(one.patient) not in text
        assert str(one.admission) not in text


def rows_of(run, model):
    return [row for row in run.lines("predictions.jsonl") if row["model"] == model]


def test_an_earlier_checkpoint_stands_beside_the_last(run):
    last = evaluate_run(run).as_json()
    rows = run.lines("predictions.jsonl")
    both = evaluate_run(run, checkpoint="round-0001").as_json()
    assert both["evaluation"]["checkpoint"] == "round-0002"
    assert list(both["evaluation"]["generation"]) == ["fedrx", "untrained", "round-0001"]
    assert {**last["metrics"], "round-0001": both["metrics"]["round-0001"]} == both["metrics"]
    assert run.lines("predictions.jsonl") == rows + rows_of(run, "round-0001")
    texts = [[row["text"] for row in rows_of(run, m)] for m in ("fedrx", "round-0001")]
    assert len(texts[1]) == 5
    assert texts[0] != texts[1]
    again = evaluate_run(run).as_json()
    assert list(again["metrics"]) == list(both["metrics"])
    assert run.lines("predictions.jsonl") == rows + rows_of(run, "round-0001")


@pytest.mark.parametrize(
    ("method", "said"),
    [("generate", "5 answers, {} tokens in"), ("score", "5 answers scored over {:,} tokens in")],
)
def test_tokens_are_called_written_only_where_the_model_wrote(run, method, said):
    shown = io.StringIO()
    settings = [f"evaluation.method={method}", "evaluation.max-new-tokens=12"]
    summary = evaluate_run(run, overrides=settings, console=Terminal(file=shown, width=400))
    tokens = summary.as_json()["evaluation"]["generation"]["fedrx"]["tokens"]
    assert (tokens <= 5 * 12) == (method == "generate")
    assert f"fedrx: {said.format(tokens)} " in shown.getvalue()


def test_answers_in_two_ways_do_not_stand_together(run):
    evaluate_run(run)
    both = evaluate_run(run, checkpoint="round-0001", overrides=["evaluation.samples=4"]).as_json()
    assert {values["samples"] for values in both["metrics"].values()} == {4}
    assert {"fedrx", "round-0001"} < set(both["metrics"])
    assert len(rows_of(run, "fedrx")) == len(rows_of(run, "round-0001")) == 4
    assert "round-0001" not in evaluate_run(run).as_json()["metrics"]
    assert not rows_of(run, "round-0001")


def test_a_judgement_lives_as_long_as_its_answers(run):
    assert "judge" not in evaluate_run(run).as_json()
    judged = {**run.read_json("summary.json"), "judge": {"appropriateness": {"fedrx": {}}}}
    run.write_json("summary.json", judged)
    assert "judge" in evaluate_run(run).as_json()
    assert "judge" in evaluate_run(run, checkpoint="round-0001").as_json()
    assert "judge" not in evaluate_run(run, overrides=["evaluation.max-new-tokens=8"]).as_json()


def test_earlier_answers_are_not_replaced_without_a_word(run):
    def told(**asked):
        shown = io.StringIO()
        evaluate_run(run, console=Terminal(file=shown, width=400), **asked)
        return shown.getvalue()

    run.write_json("summary.json", {"rounds": 2})
    first = told(overrides=["evaluation.method=score"])
    parts = {"judge": {"appropriateness": {"fedrx": {}}}, "review": {"level": "string"}}
    run.write_json("summary.json", {**run.read_json("summary.json"), **parts})
    (run.path / "judge.jsonl").write_text("{}\n")
    same = told(overrides=["evaluation.method=score"])
    beside = told(checkpoint="round-0001", overrides=["evaluation.method=score"])
    for quiet in (first, same, beside):
        assert "replaces" not in quiet
        assert "not shown" not in quiet
    other = told(overrides=["evaluation.samples=4"])
    was = "5 admissions (method score, checkpoint round-0002)"
    assert other.startswith(f"replaces the answers to {was}, their figures and report\n")
    assert "judgements of lists that are gone are not shown: judge.jsonl keeps them" in other
    assert "reviews of lists that are gone are not shown: review/ keeps them" in other
    assert (run.path / "judge.jsonl").read_text() == "{}\n"
    again = told()
    assert again.startswith("replaces the answers to 4 admissions (method generate, ")
    assert "not shown" not in again


def test_a_judgement_does_not_survive_a_kill_between_answers_and_figures(run, monkeypatch):
    judged = {**evaluate_run(run).as_json(), "judge": {"appropriateness": {"fedrx": {}}}}
    run.write_json("summary.json", judged)
    write = common.evaluation.answers_file.write_answers

    def killed(*arguments):
        write(*arguments)
        raise KeyboardInterrupt

    other = ["evaluation.max-new-tokens=8"]
    monkeypatch.setattr(common.evaluation.answers_file, "write_answers", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate_run(run, overrides=other)
    monkeypatch.undo()
    assert "judge" not in evaluate_run(run, overrides=other).as_json()


def flip_a_letter(run):
    """One bit of the answers' file, as a disk or a hand may flip it; it stays JSON."""
    file = run.path / "predictions.jsonl"
    content = bytearray(file.read_bytes())
    content[content.index(b"case-") + 1] ^= 1
    file.write_bytes(content)


def test_altered_answers_are_neither_judged_nor_reviewed_nor_reported(run):
    evaluate_run(run)
    assert len(read_answers(run)) == 25
    flip_a_letter(run)
    for read in (
        lambda: read_answers(run),
        lambda: questions_of(run, JudgeConfig(), dry_run=True),
        lambda: make_review(run),
    ):
        with pytest.raises(Altered, match=r"^predictions.jsonl is damaged or was altered: it is"):
            read()


def test_altered_answers_are_answered_anew(run):
    """With all beside them: nothing of the altered file stays, also not a judgement."""
    evaluate_run(run)
    both = evaluate_run(run, checkpoint="round-0001").as_json()
    rows = run.lines("predictions.jsonl")
    run.write_json("summary.json", {**both, "judge": {"appropriateness": {"fedrx": {}}}})
    flip_a_letter(run)
    shown = io.StringIO()
    again = evaluate_run(run, console=Terminal(file=shown, width=400)).as_json()
    assert "was altered" in shown.getvalue()
    assert "judge" not in again
    left = [row.as_json() for row in read_answers(run)]
    assert left == [row for row in rows if row["model"] != "round-0001"]
    assert list(again["metrics"]) == [name for name in both["metrics"] if name != "round-0001"]


def test_no_kill_leaves_a_digest_of_other_answers(run, monkeypatch):
    """Between answers and figures nothing is promised, so nothing is refused."""
    evaluate_run(run)

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(common.evaluation.answers_file, "write_bytes", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate_run(run, overrides=["evaluation.max-new-tokens=8"])
    monkeypatch.undo()
    assert len(read_answers(run)) == 25
    assert "answers_sha256" in evaluate_run(run).as_json()["evaluation"]

    def late(*arguments):  # the answers are there, their figures are not
        write_bytes(*arguments)
        raise KeyboardInterrupt

    write_bytes = common.evaluation.answers_file.write_bytes
    monkeypatch.setattr(common.evaluation.answers_file, "write_bytes", late)
    with pytest.raises(KeyboardInterrupt):
        evaluate_run(run, overrides=["evaluation.samples=4"])
    monkeypatch.undo()
    assert len(read_answers(run)) == 20


def test_constrained_answers_are_all_in_the_format(run):
    summary = evaluate_run(run, overrides=["evaluation.constrained=true"]).as_json()
    assert summary["metrics"]["fedrx"]["output_rate"] == 1.0
    assert summary["metrics"]["untrained"]["output_rate"] == 1.0


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["adapter.alpha=2"], "adapter.alpha: 16.0 -> 2.0"),
        (["data.synthetic-patients=41", "partition.seed=1"], "partition.seed"),
    ],
)
def test_what_was_trained_cannot_be_overridden(run, overrides, expected):
    with pytest.raises(UserError, match=expected):
        evaluate_run(run, overrides=overrides)
    assert not (run.path / "predictions.jsonl").exists()


@pytest.mark.parametrize("what", ["samples", "backbone", "a"])
def test_other_inputs_than_the_runs_are_refused(run, what):
    record = run.read_json("run.json")
    run.write_json("run.json", {**record, "inputs": {**record["inputs"], what: "0" * 64}})
    with pytest.raises(UserError, match="not what the run was trained with"):
        evaluate_run(run)


def test_an_unknown_checkpoint_names_the_known_ones(run):
    with pytest.raises(UserError, match="round-0001, round-0002"):
        evaluate_run(run, checkpoint="round-9")


def test_an_unfinished_run_is_not_evaluated(run):
    run.write_status("interrupted")
    with pytest.raises(UserError, match="interrupted"):
        evaluate(run)


def test_answers_do_not_depend_on_the_batch(run):
    """The rows of a batch of one, character for character."""
    together = evaluate_run(run).as_json()
    rows = run.lines("predictions.jsonl")
    alone = evaluate_run(run, overrides=["evaluation.batch-size=1"]).as_json()
    assert json.dumps(run.lines("predictions.jsonl")) == json.dumps(rows)
    assert alone["metrics"] == together["metrics"]


@pytest.fixture
def of_flower(run):
    """What plain ``flwr run`` leaves: neither data.json, nor a report, nor the data's source."""
    summary = {
        "rounds": 2,
        "trainable_parameters": 8,
        "adapter": {"mode": "fa-lora", "rank": 4, "alpha": 4.0, "targets": ["q_proj"]},
        "backbone": {"name": "tiny"},
        "hospitals": [{"name": "hospital-1", "patients": 20, "samples": 30}],
        "b_sha256": tensors_sha256(run.load_checkpoint().b),
        "wire": {"tensors": ["B"], "bytes_up": 1, "bytes_down": 1},
        "backbone_loads": 1,
        "workers": 1,
        "validation_loss": [],
        "peak_rss_bytes": 1,
        "seconds": 1.0,
        "device": "cpu",
        "attention": {"kernel": "sdpa", "reason": ""},
        "dtype": {"value": "fp32", "reason": ""},
    }
    run.write_json("summary.json", summary)
    run.write_json("run.json", RunRecord(mode="flower", resumable=False))
    return run


def test_a_run_of_plain_flwr_is_evaluated(of_flower):
    told = io.StringIO()
    summary = evaluate(of_flower, console=Terminal(file=told, width=200))
    assert summary.source == "synthetic"
    assert "5 held-out admissions (synthetic data)" in told.getvalue()
    page = (of_flower.path / "report.html").read_text(encoding="utf-8")
    assert "hospital-1</td><td>20</td><td>30</td><td>–</td>" in page


def test_a_run_of_plain_flwr_is_not_resumed(of_flower):
    told = io.StringIO()
    summary = resume(of_flower.path, console=Terminal(file=told, width=200), command_line=[])
    assert summary["rounds"] == 2
    assert "the run is finished" in told.getvalue()
    of_flower.write_status("failed")
    with pytest.raises(UserError, match="start it again with flwr"):
        resume(of_flower.path, command_line=[])
