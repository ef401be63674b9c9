"""``fedrx review`` and ``fedrx suggest`` as they are typed; their help and their errors."""

import json

import pytest
import torch
from line_fixtures import prediction_line
from typer.testing import CliRunner

from common.config import Config, DataConfig, EvaluationConfig, ModelConfig
from common.errors import UserError
from common.records.run import RunRecord, SavedFacts
from common.rundir import RunDirectory
from sim.assist.patient_form import WHAT_IS_RIGHT
from sim.assist.suggest import Suggestion
from sim.cli.main import app


def fedrx(*arguments):
    """Return (shown to people, JSON); raise what the command raises."""
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stderr, json.loads(result.stdout)


@pytest.fixture
def run(tmp_path):
    config = Config(
        model=ModelConfig(backbone="tiny"),
        evaluation=EvaluationConfig(max_new_tokens=16, decoding="grammar"),
        data=DataConfig(path=str(tmp_path / "absent")),
    )
    directory = RunDirectory.create(config, directory=tmp_path / "run")
    line = prediction_line("case-1", "fedrx", ["Albuterol"], truth=["Albuterol"])
    directory.write_json("run.json", RunRecord(mode="federation", resumable=True))
    directory.append("predictions.jsonl", line)
    directory.write_json("summary.json", {"source": "synthetic"})
    directory.write_status("finished")
    return directory


def test_every_verb_has_a_purpose_in_its_help():
    for verb in ("judge", "review", "suggest", "assist"):
        shown = CliRunner().invoke(app, [verb, "--help"]).output
        assert "Usage" in shown
    assert "not for clinical use" in CliRunner().invoke(app, ["suggest", "--help"]).output


def test_review_make_and_a_wrong_import(run, tmp_path):
    shown, made = fedrx("review", "make", run.path, "--out", tmp_path / "p" / "page.html")
    assert (tmp_path / "p" / "page.html").read_text().count("Albuterol") == 1
    assert made["page"] in shown
    with pytest.raises(UserError, match="not a review"):
        fedrx("review", "import", run.path, run.path / "summary.json")
    with pytest.raises(UserError, match="check the path"):
        fedrx("review", "import", run.path, tmp_path / "absent.json")


@pytest.mark.slow
def test_suggest_prints_a_list(run):
    pytest.importorskip("llguidance")
    from common.training.worker import Worker

    run.save_checkpoint(
        "round-0001", Worker().session(run.config()).adapter.state(), facts=SavedFacts()
    )
    patient = ["--sex", "f", "--age", "95", "--height", "165", "--weight", "80"]
    patient += ["-d", "I50.9", "-d", "lives [alone]", "-d", "Z99999"]
    shown, result = fedrx(
        "suggest", run.path, *patient, "-d", "I50.9", "-d", "lives [alone]", "-d", "Z99999"
    )
    assert "not for clinical use" in shown
    assert "woman, > 89 years, 165 cm, 80 kg, BMI 29.4" in shown
    assert "I50.9: Heart failure, unspecified" in shown
    assert "free text: lives [alone]" in shown
    assert shown.count("looks like a code") == 1
    assert "Z99999 looks like a code, but is not in the public ICD-10-CM" in shown
    assert result["drugs"]
    # A long name is wrapped.
    assert result["drugs"][0]["name"].split()[0][:10] in shown
    assert result["patient"]["diagnoses"][0]["code"] == "10:I509"


@pytest.fixture
def nothing_loads(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("loaded")

    for name in ("reference_of", "Assistant"):
        monkeypatch.setattr(f"sim.assist.suggest.{name}", refuse)


RIGHT = ("--sex", "F", "--age", "71", "-d", "I10")


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ((), r"Sex:.*Age:.*Diagnoses:"),
        (("--sex", "X", *RIGHT[2:]), r"^Sex: F or M \(female or male"),
        ((*RIGHT[:2], "--age", "-3", *RIGHT[4:]), "^Age: whole years, 18 to 120"),
        (RIGHT[:4], "^Diagnoses: add at least one"),
        ((*RIGHT, "--checkpoint", "round-0077"), "round-0077"),
        ((*RIGHT, "--personal", "nowhere"), "no personal adapter of nowhere"),
    ],
)
def test_suggest_refuses_what_is_wrong_before_anything_is_loaded(run, nothing_loads, typed, said):
    b = {"layers.0.q": torch.zeros(2, 2)}
    run.save_checkpoint("round-0001", b, facts=SavedFacts())
    with pytest.raises(UserError, match=said) as caught:
        fedrx("suggest", run.path, *typed)
    assert caught.value.exit_status == 2


def test_help_names_the_sexes_as_their_refusal_does():
    named = WHAT_IS_RIGHT["sex"].partition(";")[0] + ")"
    shown = CliRunner().invoke(app, ["suggest", "--help"], env={"COLUMNS": "160"}).output
    assert named == "F or M (female or male)"
    assert named in shown


def test_suggest_says_what_it_waits_for_but_not_on_standard_output(run, monkeypatch):
    monkeypatch.setattr("sim.assist.suggest.public_diagnoses", list)  # seconds to read

    class Assistant:
        def __init__(self, *_, **__):
            pass

        def suggest(self, request):
            return Suggestion(drugs=(), in_format=False, similar=0, dropped_diagnoses=0, seconds=1)

    monkeypatch.setattr("sim.assist.suggest.Assistant", Assistant)
    run.save_checkpoint("round-0001", {"a": torch.zeros(2, 2)}, facts=SavedFacts())
    result = CliRunner().invoke(app, ["suggest", str(run.path), *RIGHT])
    waits = ["reading the run's data ...", "loading the backbone ...", "answering ..."]
    assert result.stderr.splitlines() == waits
    assert "woman, 71 years" in result.stdout


def test_without_a_run_the_newest_with_a_model_is_taken_and_named(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sim.assist.suggest.public_diagnoses", list)  # seconds to read
    model = RunDirectory.create(run.config(), directory=tmp_path / "runs" / "1-model")
    checkpoint = model.path / "checkpoints" / "round-0001"
    checkpoint.mkdir(parents=True)
    for name in ("b.safetensors", "facts.json"):
        (checkpoint / name).touch()
    audit = RunDirectory.create(run.config(), directory=tmp_path / "runs" / "2-audit")
    for one, mode in ((model, "federation"), (audit, "audit")):
        one.write_json("run.json", RunRecord(mode=mode, resumable=False))
        one.write_status("finished")
    result = CliRunner().invoke(app, ["suggest", *RIGHT])
    assert f"run: {model.path}" in result.output
    assert isinstance(result.exception, UserError)
