"""Files of a run directory: read back as they were written, by this version or another."""

import json

import pytest

from common.config import Config
from common.errors import UserError
from common.records.run import (
    DataFacts,
    Environment,
    HospitalSizes,
    Metric,
    SavedFacts,
    Status,
    StepLine,
    WireLine,
    WorkerFacts,
)
from common.rundir import RunDirectory

OF_A_HOSPITAL = {"name": "steps", "value": 2.0, "round": 1, "hospital": "hospital-1", "time": 1.5}
OF_A_STEP = {
    "name": "train-loss",
    "value": None,
    "step": 3,
    "gradient_norm": None,
    "learning_rate": 0.02,
    "tokens": 257,
    "seconds": 0.0217,
    "time": 1.5,
}
OF_A_REASON = {"name": "refused", "value": "no answer in time", "round": 2, "time": 1.5}
COUNTED = {"name": "withstands-nothing", "value": 4, "round": 1, "time": 1.5}
OF_LATER = {"name": "loss", "value": 1.0, "time": 1.5, "split": "validation"}
SENT = {
    "direction": "down",
    "hospital": "hospital-1",
    "round": 1,
    "kind": "train",
    "tensors": ["layers.0.q_proj.lora_B"],
    "scalars": ["round"],
    "unknown": 2,
    "bytes": 12416,
}
STATUS = {
    "state": "failed",
    "updated": "2026-11-27T03:00:00+00:00",
    "stage": "evaluation",
    "round": 2,
    "step": 3,
    "rank": 4,
    "lists": "scored",
    "seconds": 1.5,
    "error": "why",
}
OF_A_ROUND = {
    "round": 1,
    "b_sha256": "0a",
    "hospitals": ["hospital-1"],
    "known": 1,
    "of": 3,
    "paces": {"train": {"seconds": 2.0, "steps": 2, "hospitals": 3}},
    "config": {"adapter.rank": 4, "adapter.alpha": 16.0, "adapter.personal": False},
    "inputs": {"a": "1a", "backbone": "2b"},
}
SIZES = {
    "name": "hospital-1",
    "patients": 12,
    "samples": 20,
    "train": 14,
    "validation": 2,
    "test": 4,
    "groups": {"Medicine": 12},
}
DATA = {
    "source": "demo",
    "file_hashes": {"hosp/patients.csv.gz": "0a"},
    "counts": {"rows": {"patients": 12}, "drugs_per_sample": {"mean": 3.5}},
    "hospitals": [SIZES],
}
OF_A_WORKER = {
    "backbone_loads": 1,
    "threads": 2,
    "tokens": 257,
    "training_seconds": 1.5,
    "peak_device_bytes": None,
}
BEGUN = {"source_digest": "0a", "cpus": 2}
RESUMED = {"time": "2026-11-27T03:00:00+00:00", "command_line": ["fedrx"], "source_digest": "0a"}
RESUMED_TWICE = {"source_digest": "0a", "resumed": [RESUMED, RESUMED]}
OF_A_SINGLE_RUN = {"step": 3, "b_sha256": "0a", "b_norm": 0.1, "seconds": 1.5}


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        *((Metric, c) for c in (OF_A_HOSPITAL, OF_A_STEP, OF_A_REASON, COUNTED, OF_LATER)),
        *((WireLine, c) for c in (SENT, {k: v for k, v in SENT.items() if k != "unknown"})),
        *((SavedFacts, c) for c in (OF_A_ROUND, OF_A_SINGLE_RUN)),
        (DataFacts, DATA),
        (WorkerFacts, OF_A_WORKER),
        (StepLine, {"round": 1, "step": 3, "loss": None, "seconds": 0.25}),
        *((Environment, c) for c in (BEGUN, {**RESUMED_TWICE, "cpus": 2})),
        *((Status, c) for c in (STATUS, {"state": "started", "paused": True})),
    ],
)
def test_a_record_has_the_keys_and_values_of_its_file_in_their_order(kind, content) -> None:
    again = kind.read(content, what="file").as_json()
    assert json.dumps(again) == json.dumps(content)
    records = [kind, *([HospitalSizes] if kind is DataFacts else [])]
    fields = {name: field for one in records for name, field in one.model_fields.items()}
    declared = {field.serialization_alias or name for name, field in fields.items()}
    keys = {*content, *(SIZES if kind is DataFacts else ())}
    assert keys - declared <= {"split", "paused", "cpus"}


def test_how_many_hospitals_there_are_is_read_out_of_its_key() -> None:
    assert SavedFacts.read(OF_A_ROUND, what="facts.json").federation_size == 3


@pytest.mark.parametrize(
    ("content", "unit", "place", "number"),
    [
        (OF_A_HOSPITAL, "round", 1, 2.0),
        (OF_A_STEP, "step", 3, None),
        (OF_A_REASON, "round", 2, None),
        (COUNTED, "round", 1, 4),
        (OF_LATER, "round", 0, 1.0),
    ],
)
def test_an_event_says_where_it_was_and_what_was_measured(content, unit, place, number) -> None:
    event = Metric.read(content, what="metrics.jsonl")
    assert (event.unit, event.place, event.number) == (unit, place, number)


@pytest.mark.parametrize(
    ("file", "content", "key"),
    [
        ("metrics.jsonl", {**OF_A_HOSPITAL, "round": "secret"}, "round"),
        ("metrics.jsonl", {"name": "secret", "time": 1.5}, "value"),
        ("wire.jsonl", {**SENT, "direction": "secret"}, "direction"),
        ("status.json", {**STATUS, "state": "secret"}, "state"),
        ("data.json", {**DATA, "source": ["secret"]}, "source"),
    ],
)
def test_a_damaged_file_of_a_run_is_one_line_without_its_values(tmp_path, file, content, key):
    run = RunDirectory.create(Config(), directory=tmp_path / "run")
    (run.path / file).write_text(json.dumps(content) + "\n")
    readers = {"metrics.jsonl": run.metrics, "wire.jsonl": run.wire}
    readers |= {"status.json": run.status, "data.json": run.data}
    with pytest.raises(UserError, match=rf"{file}: {key}: ") as refused:
        readers[file]()
    assert "secret" not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_later_events_are_forgotten_and_what_another_version_told_stays(tmp_path):
    run = RunDirectory.create(Config(), directory=tmp_path / "run")
    for content in (OF_A_HOSPITAL, OF_A_REASON, OF_LATER):
        run.append("metrics.jsonl", content)
    run.metric("train-loss", 2.5, step=2)
    run.forget_metrics(after=1)
    assert run.lines("metrics.jsonl") == [OF_A_HOSPITAL, OF_LATER]
    assert run.numbers("steps") == [2.0]
