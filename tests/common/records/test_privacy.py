"""The guarantee of a run, as summary.json has it, and the forecast of one."""

import json

import pytest

from common.errors import UserError
from common.privacy.budget.receipts import ledger_line, privacy_summary
from common.privacy.forecast import forecast
from common.records.privacy import Forecast, Privacy
from common.records.summary import Summary

GUARANTEE = {
    "unit": "patient",
    "relation": "add-or-remove-one",
    "epsilon": "infinity",
    "delta": 0.001,
    "accountant": "max(opacus prv, dp-accounting pld)",
    "noise": "discrete Gaussian, reproducible: no guarantee",
    "noise_multiplier": 1.2,
    "clip_norm": 1.0,
    "sampling_rate": 0.5,
    "expected_batch": 8.0,
    "planned_steps": 4,
    "per_hospital": [{"hospital": "hospital-1", "steps": 4, "epsilon": 6.5}],
    "not_covered": "metrics of this summary",
    "warning": "nothing will be learnt",
}
OUTLOOK = {
    "relation": "add-or-remove-one",
    "epsilon": 3.0,
    "unit": "patient",
    "sampling_rate": 0.5,
    "clip_norm": 1.0,
    "delta": 0.001,
    "noise_multiplier": 1.2,
    "accountant": "max(opacus prv, dp-accounting pld)",
    "steps": 4,
    "expected_batch": 8.0,
    "noise_to_signal": 12.5,
    "verdict": "noisy",
    "advice": [{"what": "half the rank", "noise_multiplier": 1.2, "noise_to_signal": 8.8}],
    "delta_note": "delta is at most",
}


@pytest.mark.parametrize(
    ("kind", "content"),
    [(Privacy, GUARANTEE), (Privacy, {**GUARANTEE, "later": 1}), (Forecast, OUTLOOK)],
)
def test_a_record_has_the_keys_and_values_of_its_file_in_their_order(kind, content) -> None:
    again = kind.read(content, what="file").as_json()
    assert json.dumps(again) == json.dumps(content)
    assert {*content} - {*kind.model_fields} <= {"later"}


@pytest.mark.usefixtures("quick_accounting", "quick_calibration")
def test_what_is_computed_has_the_keys_of_the_file(make_plan) -> None:
    plan = make_plan()
    found = privacy_summary(plan, [ledger_line(plan, "hospital-1", 1, 2)]).as_json()
    assert [*found] == [key for key in GUARANTEE if key != "warning"]
    assert [*found["per_hospital"][0]] == [*GUARANTEE["per_hospital"][0]]
    assert [*forecast(plan, 100).as_json()] == [key for key in OUTLOOK if key != "delta_note"]


def test_a_guarantee_is_read_inside_a_summary_and_damage_is_named_without_its_value() -> None:
    summary = Summary.read({"privacy": GUARANTEE}, what="summary.json")
    assert summary.as_json() == {"privacy": GUARANTEE}
    damaged = {"privacy": {**GUARANTEE, "delta": "secret"}}
    with pytest.raises(UserError, match=r"^summary\.json: privacy\.delta: ") as refused:
        Summary.read(damaged, what="summary.json")
    assert "secret" not in str(refused.value)
