"""The form's messages, and a whole answer of a tiny run."""

import io
from dataclasses import replace

import pytest

from common.config import Config, DataConfig, EvaluationConfig, FederationConfig, ModelConfig
from common.data.dataset import Dataset
from common.data.icd import Diagnosis, DiagnosisIndex
from common.data.partition import assign_hospitals
from common.data.samples import Admission, SampleTable
from common.errors import UserError
from common.records.run import RunRecord, SavedFacts
from common.rundir import RunDirectory
from sim.assist.listing import ListedDrugs
from sim.assist.orders import Orders
from sim.assist.patient_form import FormProblems, read_form
from sim.assist.suggest import (
    Assistant,
    ReferenceData,
    SuggestedDrug,
    assistant_config,
    find_run,
    reference_of,
    suggestion_blocks,
    within_formulary,
)
from sim.cli.terminal import Terminal
from sim.report.terminal import block_parts
from sim.report.words import RANDOM_WEIGHTS

INDEX = DiagnosisIndex(
    [Diagnosis(code="10:I10", title="Essential (primary) hypertension")],
    frequency={},
    origin="test",
)
RIGHT = {"sex": "F", "age": "71", "height": "165", "weight": "80,5", "diagnoses": ["i10", "pain"]}


def test_a_right_form():
    request = read_form(RIGHT, INDEX)
    admission = request.admission()
    assert (admission.sex, admission.age, admission.height_cm) == ("F", 71, 165.0)
    assert admission.bmi == pytest.approx(80.5 / 1.65**2)
    assert admission.diagnoses == ("Essential (primary) hypertension", "pain")
    assert admission.diagnosis_codes == ("10:I10",)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("sex", "", "female or male"),
        ("sex", "x", "female or male"),
        ("sex", None, "female or male"),
        ("age", "", "18 to 120"),
        ("age", "17", "18 to 120"),
        ("age", "121", "18 to 120"),
        ("age", "70.5", "whole years"),
        ("age", "old", "write a number"),
        ("age", "nan", "write a number"),
        ("age", True, "write a number"),
        ("age", [7], "write a number"),
        ("height", "1.75", "Did you mean 175?"),
        ("height", "300", "100 to 230"),
        ("height", "-170", "100 to 230"),
        ("height", "170 cm", "without unit"),
        ("weight", "0", "25 to 350"),
        ("weight", "inf", "without unit"),
        ("diagnoses", [], "at least one"),
        ("diagnoses", None, "at least one"),
        ("diagnoses", "I10", "at least one"),
        ("diagnoses", [" "], "at least one"),
        ("diagnoses", [3], "at least one"),
        ("diagnoses", ["x"] * 41, "at most 40"),
        ("diagnoses", ["x" * 301], "300 characters"),
    ],
)
def test_a_wrong_field_is_named_with_what_would_be_right(field, value, message):
    with pytest.raises(FormProblems) as caught:
        read_form({**RIGHT, field: value}, INDEX)
    assert list(caught.value.problems) == [field]
    assert message in caught.value.problems[field]


def test_all_wrong_fields_are_named_at_once():
    with pytest.raises(FormProblems) as caught:
        read_form({}, INDEX)
    assert set(caught.value.problems) == {"sex", "age", "diagnoses"}


def test_measures_may_be_unknown_and_old_age_is_not_kept():
    request = read_form({**RIGHT, "height": " ", "weight": None, "age": 93}, INDEX)
    assert request.bmi is None
    assert request.as_dict()["age"] == "> 89"


def opened(config):
    admissions = tuple(
        Admission(
            patient=number,
            admission=number,
            sex="F",
            age=60,
            diagnoses=("Essential (primary) hypertension",),
            diagnosis_codes=("10:I10",),
            drugs=("Lisinopril",),
        )
        for number in range(40)
    )
    hospitals = assign_hospitals(admissions, config.partition, hospitals=2, data=config.data)
    samples = SampleTable(admissions=admissions, counts={}, source="synthetic")
    return Dataset(samples=samples, hospitals=hospitals)


def test_support_rests_on_training_admissions_alone():
    config = Config(federation=FederationConfig(hospitals=2))
    found = reference_of(config, load=opened)
    similar = found.support.similar(["10:I10"])
    assert f"{len(similar)} admissions of 2 training hospitals" in found.note
    # A fifth is held out, a tenth validates.
    assert 20 <= len(similar) <= 36


@pytest.mark.slow
def test_without_the_data_titles_are_the_public_ones_and_there_is_no_support():
    def missing(config):
        raise UserError("gone")

    found = reference_of(Config(), load=missing)
    assert found.support is None
    assert found.index.read("I50.9").title == "Heart failure, unspecified"
    assert "not on this machine" in found.note


@pytest.fixture
def tiny_run(tmp_path):
    from common.training.worker import Worker

    config = Config(
        model=ModelConfig(backbone="tiny"),
        evaluation=EvaluationConfig(max_new_tokens=24, decoding="grammar"),
        data=DataConfig(path=str(tmp_path / "absent")),
    )
    run = RunDirectory.create(config, directory=tmp_path / "run")
    b = Worker().session(config).adapter.state()
    run.save_checkpoint("round-0001", b, facts=SavedFacts())
    run.write_json("summary.json", {"source": "credentialed"})
    run.write_status("finished")
    return run


@pytest.mark.slow
def test_a_tiny_run_answers_the_same_each_time(tiny_run):
    pytest.importorskip("llguidance")
    config = assistant_config(tiny_run)
    assistant = Assistant(tiny_run, config, reference=reference_of(config))
    request = read_form(RIGHT, assistant.reference.index)
    first, second = assistant.suggest(request), assistant.suggest(request)
    assert first.drugs
    assert first.in_format
    assert first.drugs == second.drugs
    assert all(drug.support is None for drug in first.drugs)
    assert assistant.checkpoint == "round-0001"


def test_a_run_with_another_backbone_or_a_is_refused(tiny_run):
    config = assistant_config(tiny_run)
    wrong = {"backbone": "0" * 64}
    tiny_run.write_json("run.json", RunRecord(mode="single", resumable=True, inputs=wrong))
    with pytest.raises(UserError, match="backbone is not what the run was trained with"):
        Assistant(tiny_run, config, reference=ReferenceData(index=INDEX, support=None, note=""))


def test_overrides_of_what_was_trained_are_refused(tiny_run):
    for free in ("evaluation.constrained=false", "evaluation.threshold-samples=8"):
        assert assistant_config(tiny_run, [free])
    with pytest.raises(UserError, match="adapter.rank"):
        assistant_config(tiny_run, ["adapter.rank=4"])


def test_the_newest_finished_run_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no finished run"):
        find_run(None)
    for name, mode, state in (
        ("1-a", "single", "finished"),
        ("2-b", "federation", "finished"),
        ("3-c", "single", "failed"),
        ("4-d", "audit", "finished"),
        ("5-e", "sweep", "finished"),
    ):
        run = RunDirectory.create(Config(), directory=tmp_path / "runs" / name)
        run.write_json("run.json", RunRecord(mode=mode, resumable=True))
        run.write_status(state)
    assert find_run(None).path.name == "2-b"


@pytest.mark.parametrize(
    ("asked", "settings", "orders", "decoding"),
    [
        ([], {}, True, "formulary"),
        ([], {}, False, "greedy"),
        ([], {"formulary": "names.txt"}, False, "formulary"),
        (["evaluation.decoding=greedy"], {}, True, "greedy"),
        (["model.kernels=auto"], {}, True, "formulary"),
        ([], {"method": "score"}, True, "greedy"),
        ([], {"decoding": "grammar"}, True, "grammar"),
    ],
)
def test_lists_are_held_to_the_formulary_unless_someone_decided(asked, settings, orders, decoding):
    around = ReferenceData(
        index=INDEX, support=None, note="", orders=Orders([]) if orders else None
    )
    config = Config(evaluation=EvaluationConfig(**settings))
    assert within_formulary(config, around, asked).evaluation.decoding == decoding


@pytest.mark.slow
def test_what_no_table_knows_is_said_in_json_and_on_the_terminal(tiny_run):
    """No data is at hand either: nothing can be said about names."""
    config = assistant_config(tiny_run)
    around = reference_of(config)
    assistant = Assistant(tiny_run, config, reference=around)
    request = read_form({**RIGHT, "diagnoses": ["I10", "Q99.99X", "lives alone"]}, around.index)
    suggestion = assistant.suggest(request)
    assert suggestion.warnings[0] == RANDOM_WEIGHTS
    assert suggestion.warnings[1:3] == (
        "Q99.99X looks like a code, but is not in the public ICD-10-CM: it was read as free text.",
        "Not recognised in the public ICD-10-CM, and read as free text: lives alone.",
    )
    assert suggestion.warnings[3:] == (
        "No orders are at hand: a name may be one that no hospital ever ordered.",
    )
    assert suggestion.as_dict()["warnings"] == suggestion.warnings
    told = io.StringIO()
    blocks = suggestion_blocks(tiny_run, request, suggestion, around)
    Terminal(file=told, width=200).say(*block_parts(*blocks))
    assert all(warning in told.getvalue() for warning in suggestion.warnings)
    one = SuggestedDrug(name="Aspirin", support=None)
    for drugs, title in (((one,), "1 suggested drug\n"), ((one, one), "2 suggested drugs\n")):
        told = io.StringIO()
        listed = replace(suggestion, drugs=drugs, in_format=True)
        blocks = suggestion_blocks(tiny_run, request, listed, around)
        Terminal(file=told, width=200).say(*block_parts(*blocks))
        assert title in told.getvalue()


def test_damaged_tables_are_not_called_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("sim.assist.suggest.public_diagnoses", list)  # seconds to read
    data = DataConfig(path=str(tmp_path / "tables"))
    config = Config(data=data)
    assert "are not on this machine" in reference_of(config).note
    (tmp_path / "tables" / "hosp").mkdir(parents=True)
    note = reference_of(config).note
    assert "cannot be used (" in note
    assert "is missing" in note
    assert "\n" not in note


@pytest.mark.parametrize("named", [False, True])
def test_a_list_with_interactions_says_so(tiny_run, tmp_path, monkeypatch, named):
    """The shipped pairs always; the user's file beside them, and not called high priority."""
    file = tmp_path / "pairs.csv"
    file.write_text("drug_a,drug_b\nSenna,Aspirin\n", "utf-8")
    asked = [f"evaluation.interactions={file}"] if named else []
    monkeypatch.setattr("sim.assist.suggest.public_diagnoses", list)  # seconds to read
    config = assistant_config(tiny_run, asked)
    assistant = Assistant(tiny_run, config, reference=reference_of(config))
    names = ("Senna", "Aspirin 81 mg Tab", "Haloperidol", "Citalopram 20mg Tab", "SIMVASTATIN")
    listed = ListedDrugs(names=names, confidences=(None,) * len(names))
    monkeypatch.setattr(assistant._lister, "list_drugs", lambda admission: listed)
    request = read_form(RIGHT, assistant.reference.index)
    high = (
        "High-priority interaction (QT-prolonging agents with one another): "
        "Haloperidol with Citalopram 20mg Tab."
    )
    others = ("Interaction by the named file: Senna with Aspirin 81 mg Tab.",) * named
    warnings = assistant.suggest(request).warnings
    assert tuple(one for one in warnings if "nteraction" in one) == (high, *others)
