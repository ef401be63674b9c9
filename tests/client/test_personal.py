"""Personal adapters: B_own is trained in a hospital, stays there, and changes nothing it sends."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import client.handlers
from client.kept_state import load_kept, load_state
from client.personal import PERSONAL, own_b, with_own
from common.config import AdapterConfig
from common.data.dataset import open_hospitals
from common.errors import UserError
from common.evaluation.answers import choose_cases, evaluate_answers
from common.evaluation.answers_file import read_answers
from common.evaluation.lists import ListMaker, Prompts
from common.model.adapter.layout import adapter_spec
from common.rundir import RunDirectory
from common.text.batches import encode_prompt
from common.training.hospital_data import encode_hospital
from common.training.loop import TrainState, train, validation_loss
from common.training.worker import Worker
from sim.answers.evaluate import evaluate_run
from sim.assist.patient_form import read_form
from sim.assist.suggest import Assistant, about_run, assistant_config, reference_of
from sim.checks.plan import plan
from sim.cli.main import app
from sim.report.bundle import contents
from sim.report.run_report import write_report
from sim.runs.export import export_run
from sim.runs.federate import federate

NAMES = ["hospital-1", "hospital-2", "hospital-3"]
PRIVATE = {
    "privacy__noise_multiplier": 1.0,
    "privacy__deterministic_noise": True,
    "federation__weighting": "uniform",
}


def flat_of(session, b):
    session.adapter.load(b)
    return session.adapter.flat


def own_of(run: RunDirectory) -> dict[str, dict[str, np.ndarray]]:
    return {name: own_b(run.path / "hospitals" / name) for name in NAMES}


@pytest.mark.parametrize("settings", [{}, PRIVATE, {"federation__codec": "int8"}])
def test_nothing_of_an_own_b_is_on_the_wire(settings, tiny_config, in_process):
    """By the bytes of every message, and by the B, which is that of a run without."""
    done = in_process(tiny_config(adapter__personal=True, **settings))
    assert done.sha == in_process(tiny_config(**settings)).sha
    messages = [data for _, _, data in done.grid.messages]
    for name, own in own_of(done.run).items():
        assert own
        folder = done.run.path / "hospitals" / name
        before = load_kept(folder, PERSONAL, before_round=2)
        for kept in (own, {key: one for key, one in before.items() if key.startswith("own.")}):
            for value in kept.values():
                assert np.abs(value).max() > 0
                assert not any(value.tobytes() in data for data in messages)
        for key, value in with_own(done.run.load_checkpoint().b, own).items():
            assert not any(value.tobytes() in data for data in messages), key


def test_what_is_sent_does_not_depend_on_whether_it_worked(tiny_config, in_process, monkeypatch):
    """Else a hospital's silence would tell of its patients what no epsilon has paid for."""
    sound = in_process(tiny_config(adapter__personal=True, **PRIVATE))

    def fails(*_, **__):
        raise FloatingPointError("a loss that is not finite")

    monkeypatch.setattr(client.handlers, "train_own", fails)
    broken = in_process(tiny_config(adapter__personal=True, **PRIVATE))
    assert broken.sha == sound.sha
    assert broken.refused() == []
    errors = broken.run.path / "hospitals" / "errors.txt"
    assert errors.read_text().count("a loss that is not finite\n") == 6


def test_an_own_b_is_a_plain_loop_from_what_the_server_sent(tiny_config, in_process):
    """The global B frozen, own optimizer over rounds; against training by hand."""
    config = tiny_config(adapter__personal=True)
    run = in_process(config).run
    session = Worker().session(config)
    for hospital in open_hospitals(config).hospitals:
        data, state, own = encode_hospital(hospital, session, config), TrainState(), {}
        for number in (1, 2):
            sent = run.load_checkpoint(f"round-{number - 1:05d}").b
            session.adapter.load(with_own(sent, own))
            name = f"{hospital.name} personal"
            steps = {"steps": 2, "schedule_steps": 4}
            train(session, data.train, config.train, state, stream=name, **steps)
            own = {key: value - sent[key] for key, value in session.adapter.state().items()}
        found = own_b(run.path / "hospitals" / hospital.name)
        assert all(np.allclose(found[key], own[key], atol=1e-6) for key in own)


def test_it_fits_its_own_hospital_better_than_the_global_b_alone(tiny_config, in_process):
    config = tiny_config(adapter__personal=True, federation__rounds=4, **PRIVATE)
    run = in_process(config).run
    session, b = Worker().session(config), run.load_checkpoint().b
    for hospital in open_hospitals(config).hospitals:
        data = encode_hospital(hospital, session, config)
        losses = []
        for state in (b, with_own(b, own_b(run.path / "hospitals" / hospital.name))):
            session.adapter.load(state)
            losses.append(validation_loss(session, data.train).mean)
        assert losses[1] < losses[0]


def test_a_resumed_run_has_the_same_own_b(tiny_config, in_process, copy_run):
    config = tiny_config(adapter__personal=True)
    whole = in_process(config)
    run = copy_run(whole.run)
    run.remove_checkpoint("round-00002")
    shutil.rmtree(run.path / "hospitals" / "hospital-2")
    in_process(config, resume=copy_run(whole.run))
    again = in_process(config, resume=copy_run(run))
    for name in ("hospital-1", "hospital-3"):
        ours, theirs = (own_of(one.run)[name] for one in (whole, again))
        assert all(np.array_equal(ours[key], theirs[key]) for key in ours)


@pytest.fixture(scope="module")
def answered(tiny_config, tmp_path_factory):
    """A finished private federation with personal adapters."""
    config = tiny_config(
        adapter__personal=True,
        data__synthetic_patients=60,
        evaluation__max_new_tokens=8,
        evaluation__bootstrap=100,
        evaluation__samples=6,
        run__backend="in-process",
        privacy__noise_multiplier=1.0,
        privacy__delta=1e-4,
        federation__weighting="uniform",
    )
    folder = tmp_path_factory.mktemp("personal") / "run"
    return federate(config, command_line=[], run_dir=folder).directory


def test_personal_answers_stand_beside_and_are_said_not_to_be_covered(answered):
    metrics = answered.summary().metrics
    assert metrics["personal"].samples == metrics["fedrx"].samples
    report = answered.path / "report.md"
    assert "no epsilon covers them" in report.read_text()
    metrics.pop("personal")
    answered.write_json("summary.json", answered.summary().having(metrics=metrics))
    write_report(answered)
    assert "no epsilon covers them" not in report.read_text()
    evaluate_run(answered)


def test_each_hospital_answers_with_its_own(answered):
    """Each hospital's B over all cases: of its own cases these are the personal answers."""
    config, b = answered.config(), answered.load_checkpoint().b
    hospitals = open_hospitals(config).hospitals
    session = Worker().session(config)
    alone = {name: with_own(b, own) for name, own in own_of(answered).items()}
    found = evaluate_answers(session, hospitals, config, alone).predictions
    settings = config.evaluation
    cases = choose_cases(hospitals, samples=settings.samples, seed=settings.seed)
    evaluate_run(answered)
    told = {(row.case, row.model): row.text for row in found}
    personal = {row.case: row.text for row in read_answers(answered) if row.model == "personal"}
    for case in cases:
        assert personal[case.name] == told[case.name, hospitals[case.hospital].name]
    assert len(set(personal.values())) > 1


def test_a_bundle_and_an_export_hold_no_own_b(answered, tmp_path):
    own = [value.tobytes() for each in own_of(answered).values() for value in each.values()]
    assert all(any(one) for one in own)
    texts = "".join(contents(answered).values())
    assert "own." not in texts
    common = export_run(answered, tmp_path / "common")
    b = answered.load_checkpoint().b
    weights = (common / "adapter_model.safetensors").read_bytes()
    assert all(value.tobytes() in weights for value in b.values())
    asked = export_run(answered, tmp_path / "own", personal="hospital-2")
    weights = (asked / "adapter_model.safetensors").read_bytes()
    wanted = with_own(b, own_of(answered)["hospital-2"])
    assert all(value.tobytes() in weights for value in wanted.values())
    card = (asked / "README.md").read_text()
    assert "no epsilon covers them" in card
    assert "Covered: what the weights" not in card
    with pytest.raises(UserError, match="no personal adapter of west beside round-00002; allowed"):
        export_run(answered, tmp_path / "other", personal="west")
    assert not (tmp_path / "other").exists()


def test_the_export_verb_asks(answered, tmp_path):
    out = tmp_path / "own"
    arguments = ["export", str(answered.path), "--personal", "hospital-1", "--out", str(out)]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, UserError)
    assert "trained without noise" in str(result.exception)
    assert "add --yes" in str(result.exception)
    assert not out.exists()
    assert CliRunner().invoke(app, [*arguments, "--yes"]).exit_code == 0
    assert Path(out / "README.md").exists()


def test_a_plan_counts_both_kinds_of_steps(tiny_config, in_process):
    """Against the counters that a hospital's two optimizers have kept."""
    config = tiny_config(adapter__personal=True)
    folder = in_process(config).run.path / "hospitals" / "hospital-3"
    own = load_kept(folder, PERSONAL, before_round=99)["state.step"]
    common = load_state(folder, before_round=99).step
    assert (own, common) == (4, 4)
    assert plan(config).steps == own + common


FORM = {"sex": "F", "age": "71", "height": "165", "weight": "80", "diagnoses": ["I10"]}


def test_suggest_answers_as_the_hospital_does(answered):
    """Its B, its names, its threshold: against the answers of an evaluation of it alone."""
    config = assistant_config(answered, ["evaluation.method=score"])
    (hospital,) = (one for one in open_hospitals(config).hospitals if one.name == "hospital-2")
    session = Worker().session(config)
    b = answered.load_checkpoint().b
    session.adapter.load(with_own(b, own_of(answered)["hospital-2"]))
    around = reference_of(config, personal="hospital-2")
    request = read_form(FORM, around.index)
    text, length = config.text, config.train.max_length
    ids, _ = encode_prompt(
        request.admission(), session.tokenizer, text=text, max_length_tokens=length
    )
    maker = ListMaker(session, [hospital], config)
    ((wanted,), _) = maker.answer(Prompts(ids=[ids], hospitals=[0]))
    assistant = Assistant(answered, config, reference=around, personal="hospital-2")
    found = assistant.suggest(request)
    assert [one.name for one in found.drugs] == list(wanted.drugs)
    confidences = [one.confidence for one in wanted.ranking.listed]
    assert [one.confidence for one in found.drugs] == pytest.approx(confidences)
    assert f"{len(hospital.train)} admissions of 1 training hospital " in around.note
    assert found.warnings[0] == found.uncovered
    assert found.uncovered.startswith("Made with hospital-2's own B")
    told = about_run(answered, config, assistant.checkpoint, personal=assistant.personal)
    assert told["personal"] == "hospital-2"
    common = Assistant(answered, config, reference=around)
    assert common.suggest(request).uncovered == ""
    assert torch.equal(common._session.adapter.flat, flat_of(session, b))


def test_the_suggest_verb_says_what_no_epsilon_covers(answered):
    person = ["--sex", "F", "--age", "71", "-d", "I10"]
    scored = ["--set", "evaluation.method=score", "--json"]
    arguments = ["suggest", str(answered.path), *person, *scored]
    words = "no epsilon covers this list"
    plain = CliRunner().invoke(app, arguments)
    own = CliRunner().invoke(app, [*arguments, "--personal", "hospital-1"])
    assert not any(words in one for one in json.loads(plain.stdout)["warnings"])
    assert words in json.loads(own.stdout)["warnings"][0]
    assert words in " ".join(own.stderr.split())
    for wrong, what in (
        (["--personal", "west"], "west beside round-00002"),
        (
            ["--personal", "hospital-1", "--checkpoint", "round-00001"],
            "hospital-1 beside round-00001",
        ),
    ):
        refused = CliRunner().invoke(app, [*arguments, *wrong])
        assert isinstance(refused.exception, UserError)
        assert f"has no personal adapter of {what}; allowed: the last" in str(refused.exception)


@pytest.mark.parametrize("mode", ["lora", "rolora"])
def test_it_needs_an_a_that_is_not_trained(mode):
    with pytest.raises(UserError, match=f"adapter.personal with adapter.mode={mode}"):
        adapter_spec(AdapterConfig(personal=True, mode=mode))
