"""Records keep the keys of their file, and refuse another file in one line without its values."""

import math

import pytest
from pydantic import Field

from common.errors import UserError
from common.records import Record


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
