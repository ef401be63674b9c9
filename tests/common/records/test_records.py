"""Records keep the keys of their file, and refuse another file in one line without its values."""

import json
import math

import pytest
from pydantic import Field

from common.errors import UserError
from common.privacy.budget.receipts import ledger_line
from common.records import Record
from common.records.run import RunRecord
from common.records.summary import Summary


class Visit(Record):
    patients: int
    mean_age: float = Field(alias="mean-age")


def test_a_record_is_read_back_as_it_was_written() -> None:
    content = {"patients": 3, "mean-age": 61.5}
    assert Visit.read(content, what="visit.json").as_json() == content
    text = '{"patients": 3, "mean-age": NaN}'
    assert math.isnan(Visit.read(text, what="visit.json").as_json()["mean-age"])


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"patients": "secret"}', '{"patients": 3, "mean-age": 1, "more": "secret"}'],
)
def test_another_file_is_refused_without_its_values(content: str) -> None:
    with pytest.raises(UserError, match=r"^visit\.json: ") as refused:
        Visit.read(content, what="visit.json")
    assert "secret" not in str(refused.value)
    assert "\n" not in str(refused.value)


SUMMARY = {
    "adapter": {"mode": "fa-lora", "rank": 4, "alpha": 16.0, "targets": ["q_proj"]},
    "validation_loss": [9.5, None],
    "wire": {"tensors": ["b"], "bytes_up": 3, "bytes_down": 0},
    "metrics": {"fedrx": {"samples": 3, "f1": 0.5, "oov_rate": None, "parsed_only": {"f1": None}}},
    "peak_device_bytes": None,
    "evaluation": {
        "samples": 2,
        "constrained": False,
        "settings": {"method": "generate", "samples": 2, "threshold": 0.5, "frequencies": False},
        "dropped_diagnoses": 0,
        "left_out": {"visits": 1},
        "generation": {"fedrx": {"seconds": 1.5, "tokens": 8, "cut_answers": 2}},
        "checkpoint": "round-00002",
        "device": "cpu",
        "dtype": "fp32",
        "answers_sha256": "0a",
    },
    "judge": {"judges": {}},
}


def test_a_summary_has_the_keys_that_it_was_given_and_no_others() -> None:
    summary = Summary.read(SUMMARY, what="summary.json")
    assert summary.as_json() == SUMMARY
    assert json.dumps(summary.as_json()["evaluation"]) == json.dumps(SUMMARY["evaluation"])
    assert not summary.evaluation.model_extra
    assert summary.without(["wire", "judge"]).as_json() == {
        key: value for key, value in SUMMARY.items() if key not in ("wire", "judge")
    }
    assert summary.metrics["fedrx"].f1 == 0.5
    assert summary.metrics["fedrx"].jaccard is None
    later = summary.having(seconds=2.5, validation_loss=[1.0])
    assert later.as_json() == {**SUMMARY, "seconds": 2.5, "validation_loss": [1.0]}
    with pytest.raises(UserError, match=r"^summary\.json: "):
        Summary.read({"metrics": {}, "undeclared": 1}, what="summary.json")


def test_a_run_record_keeps_the_kinds_of_its_values() -> None:
    """16 and 16.0 are two values of a configuration; true is neither 1."""
    config = {"adapter.rank": 16, "adapter.alpha": 16.0, "train.keep-state": True, "data.path": "1"}
    record = RunRecord(mode="single", resumable=True, config=config)
    again = RunRecord.read(record.as_json(), what="run.json").config
    assert [(key, type(value)) for key, value in again.items()] == [
        ("adapter.rank", int),
        ("adapter.alpha", float),
        ("train.keep-state", bool),
        ("data.path", str),
    ]
    assert again == config


def test_a_key_is_absent_where_its_value_is_none_and_stays_where_it_is_zero(make_plan):
    assert "layout" not in RunRecord(mode="single", resumable=True).as_json()
    line = ledger_line(make_plan(), "hospital-1", 1, 0)
    assert "least_steps" not in line.as_json()
    assert line.model_copy(update={"least_steps": 0}).as_json()["least_steps"] == 0
