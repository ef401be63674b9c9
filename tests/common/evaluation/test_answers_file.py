"""The store of a run's evaluations: what stands together, and what takes another's place."""

import pytest

from common.config import Config, EvaluationConfig
from common.errors import UserError
from common.evaluation.answers_file import (
    Evaluation,
    EvaluationStore,
    Facts,
    Generation,
    Patient,
    Prediction,
    Way,
    read_answers,
    write_answers,
)
from common.records.summary import Summary
from common.rundir import RunDirectory

WAY = Way("round-0002", EvaluationConfig(), "cpu", "fp32")


@pytest.fixture
def run(tmp_path):
    return RunDirectory.create(Config(), directory=tmp_path / "run")


def evaluation(model, way=WAY):
    row = Prediction(
        case="case-1",
        cluster=1,
        model=model,
        patient=Patient(sex="F", age="60"),
        diagnoses=("x",),
        truth=("Aspirin",),
        text=None,
        answer=("Aspirin",),
    )
    generation = {model: Generation(seconds=1, tokens=2, cut_answers=0)}
    facts = {"samples": 1, "constrained": False, "dropped_diagnoses": 0, "generation": generation}
    return Evaluation(
        facts=Facts(**way._asdict(), **facts), metrics={model: {"f1": 1.0}}, predictions=[row]
    )


def models(run):
    summary = run.summary()
    kept = [row.model for row in read_answers(run)], list(summary.evaluation.generation)
    assert kept[0] == kept[1] == list(summary.metrics)
    return kept[0]


def test_a_damaged_summary_is_one_line_with_its_key(run):
    (run.path / "summary.json").write_text('{"evaluation": ["secret"]}')
    for reader in (read_answers, EvaluationStore, lambda run: write_answers(run, [])):
        with pytest.raises(UserError, match=r"summary\.json: evaluation: ") as refused:
            reader(run)
        assert "secret" not in str(refused.value)
    run.write_json("summary.json", {})
    EvaluationStore(run).put(evaluation("fedrx"), Summary())
    run.write_json("summary.json", run.summary().without(["metrics"]))
    with pytest.raises(UserError, match=r"summary\.json: metrics: "):
        EvaluationStore(run)


def test_answers_of_one_way_stand_together(run):
    EvaluationStore(run).put(evaluation("fedrx"), Summary())
    store = EvaluationStore(run)
    assert store.get(WAY).facts.way == WAY
    store.put(evaluation("round-0001"), run.summary())
    assert models(run) == ["fedrx", "round-0001"]


@pytest.mark.parametrize(
    "other",
    [
        {"checkpoint": "round-0003"},
        {"settings": EvaluationConfig(samples=4)},
        {"device": "cuda"},
        {"dtype": "bf16"},
    ],
)
def test_answers_of_another_way_take_their_place(run, other):
    EvaluationStore(run).put(evaluation("fedrx"), Summary())
    way = WAY._replace(**other)
    store = EvaluationStore(run)
    assert store.get(way) is None
    store.put(evaluation("round-0001", way), run.summary())
    assert models(run) == ["round-0001"]
    assert EvaluationStore(run).get(way) is not None
