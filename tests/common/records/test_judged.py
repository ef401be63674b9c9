"""What judges and reviewers said, as summary.json has it."""

import json

import pytest

from common.errors import UserError
from common.records.judged import Estimate, Judged, Reviewed
from common.records.summary import Summary

COUNTS = {
    "asked": 3,
    "scored": 2,
    "unscored": 1,
    "not_asked": 0,
    "repaired": 1,
    "problems": {"cut": 1},
    "escaped_texts": 1,
}
USAGE = {
    "calls": 4,
    "input_tokens": 500,
    "output_tokens": 60,
    "calls_without_usage": 1,
    "lost_input_tokens_at_most": 7,
    "lost_output_tokens_at_most": 8,
}
OF_A_MODEL = {
    "mean": 0.75,
    "interval": [0.5, 1.0],
    "scored": 2,
    "unscored": 1,
    "not_asked": 0,
    "unanswered": 1,
    "empty": 2,
    "suitable": 3,
    "unsuitable": 1,
}
ONE = {"server": "http://127.0.0.1:1", "judgements": COUNTS, "appropriateness": {"x": OF_A_MODEL}}
JUDGED = {
    "model": "a, b",
    "server": "http://127.0.0.1:1",
    "temperature": 0.0,
    "repeats": 2,
    "source": "demo",
    "agreement_stated": False,
    "complete": True,
    "judgements": COUNTS,
    "appropriateness": {"x": {**OF_A_MODEL, "mean": None, "interval": None}},
    "judges": {"a": ONE},
    "agreement": {"alpha": None, "unanimous": 0.5, "drugs": 4},
    "flip_rate": None,
    "served_by": ["a-1"],
    "usage": USAGE,
    "cost_usd": 0.25,
    "invocation": {"judges": ["a"], **COUNTS, **USAGE, "cost_usd": 0.125},
}
EARLIER = {"model": "a", "server": "http://127.0.0.1:1", "appropriateness": {"x": OF_A_MODEL}}
OF_PEOPLE = {
    "format_followed": 0.5,
    "similarity": {"jaccard": 0.25, "f1": None},
    "similarity_after_review": None,
    "kept_share": None,
    "overall": 4.0,
    "lists_reviewed": 2,
    "drugs": {"keep": 2, "remove": 1, "unsure": 1, "unmarked": 0},
    "added": 1,
}
REVIEWED = {
    "packet": "0a",
    "reviewers": ["One"],
    "cases": 2,
    "level": "string",
    "models": {"x": OF_PEOPLE},
    "agreement": {"alpha_drugs": 0.1, "alpha_overall": None, "unanimous": 0.6, "drugs": 5},
    "judge": {
        "drugs": 4,
        "agree": 0.5,
        "alpha": None,
        "keep_suitable": 2,
        "keep_unsuitable": 1,
        "remove_suitable": 1,
        "remove_unsuitable": 0,
    },
    "escaped_texts": 4,
}
ESTIMATE = {
    "lists": 2,
    "judgements": 4,
    "calls": 3,
    "cached": 1,
    "input_tokens": 500,
    "output_tokens": 60,
    "cost_usd": 0.5,
    "most_usd": 2.0,
    "spent_usd": 0.25,
    "max_cost_usd": 3.0,
    "server": "http://127.0.0.1:1",
    "source": "demo",
}
CONTENTS = [
    (Estimate, ESTIMATE),
    (Judged, JUDGED),
    (Judged, EARLIER),
    (Judged, {**JUDGED, "later": 1}),
    (Reviewed, REVIEWED),
    (Reviewed, {**REVIEWED, "judge": None}),
]


def undeclared(record):
    """Keys that no field of a record holds, nor of the records in it."""
    found = set(record.__pydantic_extra__ or {})
    for value in dict(record).values():
        inside = value.values() if isinstance(value, dict) else [value]
        found |= {key for one in inside if hasattr(one, "as_json") for key in undeclared(one)}
    return found


@pytest.mark.parametrize(("kind", "content"), CONTENTS)
def test_a_record_has_the_keys_and_values_of_its_file_in_their_order(kind, content) -> None:
    record = kind.read(content, what="summary.json")
    assert json.dumps(record.as_json()) == json.dumps(content)
    assert undeclared(record) <= {"later"}


def test_damage_is_named_without_its_value() -> None:
    damaged = {"judge": {**JUDGED, "judges": {"a": {**ONE, "judgements": {"asked": "secret"}}}}}
    with pytest.raises(UserError, match=r"^summary\.json: judge\.judges\.a\.judgements") as refused:
        Summary.read(damaged, what="summary.json")
    assert "secret" not in str(refused.value)
