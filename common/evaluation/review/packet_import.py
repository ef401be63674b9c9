"""Read a downloaded review, believing nothing in it."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.evaluation.review.packet import FORMAT, MARKS, OVERALL
from common.files import utf8, writable

LONGEST_NAME = 80
LONGEST_TEXT = 4000
MOST_MISSING = 200
_LARGEST_FILE_BYTES = 32 * 2**20


def read_review(path: Path) -> dict[str, Any]:
    """Read one file and check that it is whole.

    Returns:
        The review: ``packet`` (sha256), ``reviewer``, ``saved``, ``cases``, and ``escaped``: the
        number of texts that UTF-8 cannot hold as they were (see ``common.files``).

    Raises:
        UserError: If it is not a review file, or was damaged or changed after the download.
    """
    what = f"review file {path.name}"
    try:
        if path.stat().st_size > _LARGEST_FILE_BYTES:
            raise UserError(f"{what} is too large", fix="import the file that the page downloads")
        outer = json.loads(path.read_text(encoding="utf-8"))
        body_text, checksum = outer["body"], outer["sha256"]
        genuine = outer["format"] == FORMAT and isinstance(body_text, str)
    except OSError as error:
        raise UserError(f"{what}: {error.strerror}", fix="check the path") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        genuine, body_text, checksum = False, "", ""
    if not genuine:
        raise UserError(
            f"{what} is not a review", fix="import the JSON file that the page downloads"
        )
    if hashlib.sha256(utf8(body_text)).hexdigest() != checksum:
        raise UserError(
            f"{what} was damaged or changed after its download",
            fix="open the page again in the same browser and download once more",
        )
    try:
        body, escaped = writable(json.loads(body_text))
        named = all(isinstance(body[name], str) for name in ("packet", "reviewer", "saved"))
        complete = named and isinstance(body["cases"], dict)
    except (ValueError, KeyError, TypeError, RecursionError):
        complete = False
    if not complete:
        raise UserError(f"{what} lacks its packet, reviewer or cases", fix="download it again")
    reviewer = " ".join(body["reviewer"].split())
    if not 1 <= len(reviewer) <= LONGEST_NAME:
        raise UserError(
            f"{what} names no reviewer",
            allowed=f"1 to {LONGEST_NAME} characters",
            fix="fill in the reviewer's name or initials on the page, and download again",
        )
    return {**body, "reviewer": reviewer, "escaped": escaped}


def check_against_packet(
    review: Mapping[str, Any], shown: Mapping[str, Any], *, name: str
) -> dict[str, Any]:
    """Return the review with exactly the packet's cases and lists, every value checked.

    Args:
        review: From ``read_review``.
        shown: What the packet of the same sha256 shows.
        name: File name, for messages.

    Raises:
        UserError: If cases, lists or marks are not those of the packet.
    """

    def refuse(what: str) -> UserError:
        return UserError(f"review file {name}: {what}", fix="download it again from the page")

    cases: dict[str, Any] = {}
    if set(review["cases"]) != {case["id"] for case in shown["cases"]}:
        raise refuse("its cases are not those of the packet")
    for case in shown["cases"]:
        given = review["cases"][case["id"]]
        lists = given.get("lists") if isinstance(given, dict) else None
        if not isinstance(lists, dict) or set(lists) != {entry["id"] for entry in case["lists"]}:
            raise refuse(f"case {case['id']} has other lists than the packet")
        cases[case["id"]] = {
            "comment": _text(given.get("comment", ""), refuse),
            "lists": {
                entry["id"]: _list(lists[entry["id"]], len(entry["drugs"]), refuse)
                for entry in case["lists"]
            },
        }
    return {
        "packet": review["packet"],
        "reviewer": review["reviewer"],
        "saved": _text(review["saved"], refuse),
        "cases": cases,
        "escaped": review["escaped"],
    }


def _list(given: Any, drugs: int, refuse: Any) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise refuse("a list is not an object")
    marks, missing, overall = (given.get(name) for name in ("marks", "missing", "overall"))
    if not isinstance(marks, list) or len(marks) != drugs:
        raise refuse("a list has another number of marks than drugs")
    if any(mark is not None and mark not in MARKS for mark in marks):
        raise refuse(f"a mark is none of {', '.join(MARKS)}")
    if not isinstance(missing, list) or len(missing) > MOST_MISSING:
        raise refuse("the missing drugs are not a list of names")
    if overall is not None and (type(overall) is not int or overall not in OVERALL):
        raise refuse("an overall mark is none of 1 to 5")
    return {
        "marks": marks,
        "missing": [_text(drug, refuse) for drug in missing],
        "overall": overall,
    }


def _text(value: Any, refuse: Any) -> str:
    if not isinstance(value, str) or len(value) > LONGEST_TEXT:
        raise refuse("a text is missing or too long")
    return value
