"""Read a downloaded review, believing nothing in it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, ValidationError, field_validator

from common.errors import UserError
from common.evaluation.review.packet import FORMAT, Shown
from common.files import utf8, writable
from common.records import Record

LONGEST_NAME = 80
LONGEST_TEXT = 4000
MOST_MISSING = 200
_LARGEST_FILE_BYTES = 32 * 2**20
Mark = Literal["keep", "remove", "unsure"]
Text = Annotated[str, Field(max_length=LONGEST_TEXT)]


class _FromPage(Record):
    model_config = ConfigDict(extra="ignore", strict=True)


class ReviewedList(_FromPage):
    """What a reviewer made of one list."""

    marks: Annotated[tuple[Mark | None, ...], Field(strict=False)]
    """In the order of the shown drugs; None: not marked."""
    missing: Annotated[tuple[Text, ...], Field(strict=False, max_length=MOST_MISSING)]
    overall: Annotated[int, Field(ge=1, le=5)] | None


class ReviewedCase(_FromPage):
    """What a reviewer made of one case."""

    comment: Text = ""
    lists: Mapping[str, ReviewedList]
    """By letter."""


class Review(_FromPage):
    """One reviewer's work on a packet."""

    packet: str
    """sha256 of what the page shows."""
    reviewer: Annotated[str, Field(min_length=1, max_length=LONGEST_NAME)]
    """Name or initials."""
    saved: Text
    cases: Mapping[str, ReviewedCase]
    """By number."""
    state: Text = ""
    """Names one start of the page by one person; empty of an earlier page."""
    escaped: int = 0
    """Texts that UTF-8 cannot hold as they were, see ``common.files``."""

    @field_validator("reviewer", mode="before")
    @classmethod
    def _one_line(cls, name: object) -> object:
        return " ".join(name.split()) if isinstance(name, str) else name


class _File(_FromPage):
    format: Literal["fedrx-review-1"]
    sha256: str
    body: str


def read_review(path: Path) -> Review:
    """Read one file and check that it is whole.

    Raises:
        UserError: If it is not a review file, was damaged or changed after the download, or holds
            what the page cannot have written.
    """
    what = f"review file {path.name}"
    try:
        if path.stat().st_size > _LARGEST_FILE_BYTES:
            raise UserError(f"{what} is too large", fix="import the file that the page downloads")
        file = _File.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"{what}: {error.strerror}", fix="check the path") from None
    except (ValueError, RecursionError):
        raise UserError(
            f"{what} is not a review ({FORMAT})", fix="import the JSON file that the page downloads"
        ) from None
    if hashlib.sha256(utf8(file.body)).hexdigest() != file.sha256:
        raise UserError(
            f"{what} was damaged or changed after its download",
            fix="open the page again in the same browser and download once more",
        )
    try:
        body, escaped = writable(json.loads(file.body))
        return Review.model_validate(body).model_copy(update={"escaped": escaped})
    except ValidationError as error:
        # Of the place only the names of fields: keys are what somebody wrote.
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        fields = {*Review.model_fields, *ReviewedCase.model_fields, *ReviewedList.model_fields}
        place = ".".join(str(part) for part in first["loc"] if part in fields)
        raise UserError(
            f"{what}: {place or 'it'}: {first['msg']}", fix="download it again from the page"
        ) from None
    except (ValueError, RecursionError):
        raise UserError(f"{what} holds no JSON", fix="download it again from the page") from None


def refuse_twins(reviews: Sequence[Review]) -> None:
    """Refuse one person's work under two names: it would count as two who agree.

    Args:
        reviews: Of one packet, one per reviewer.

    Raises:
        UserError: If two of them come from one start of the page, or are the same in every mark,
            missing drug and comment.
    """
    for one, other in combinations(reviews, 2):
        same = one.cases == other.cases and any(map(_touched, one.cases.values()))
        if same or (one.state and one.state == other.state):
            raise UserError(
                f"the reviews of {one.reviewer} and {other.reviewer} are one person's: "
                + ("all marks are the same" if same else "they come from one start of the page"),
                allowed="one review a person, each started on the page under the own name",
                fix="import one of them",
            )


def _touched(case: ReviewedCase) -> bool:
    lists = case.lists.values()
    return bool(case.comment) or any(
        any(one.marks) or one.missing or one.overall is not None for one in lists
    )


def check_against_packet(review: Review, shown: Shown, *, name: str) -> None:
    """Check that a review has exactly the packet's cases, lists and drugs.

    Args:
        review: From ``read_review``.
        shown: What the packet of the same sha256 shows.
        name: File name, for messages.

    Raises:
        UserError: If it has not.
    """
    packet = {case.id: {one.id: len(one.drugs) for one in case.lists} for case in shown.cases}
    given = {
        case: {label: len(one.marks) for label, one in reviewed.lists.items()}
        for case, reviewed in review.cases.items()
    }
    if given != packet:
        raise UserError(
            f"review file {name}: its cases, lists or numbers of marks are not the packet's",
            fix="download it again from the page",
        )
