"""predictions.jsonl: a run's answers, with their digest in summary.json.

Judge, review and report read answers only as they were evaluated. A summary without a digest (a
run of an earlier FedRx, or one killed within an evaluation) promises nothing about them, and they
are taken as they are.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

from common.files import json_line, utf8, write_bytes
from common.rundir import RunDirectory
from common.tensor_files import Altered

PREDICTIONS = "predictions.jsonl"
ANSWERS_SHA256 = "answers_sha256"
"""Key of ``evaluation`` in summary.json."""
Row = dict[str, Any]


def read_answers(run: RunDirectory) -> list[Row]:
    """Return a run's answers.

    Raises:
        Altered: if they are not those that were evaluated.
    """
    told = run.read_json("summary.json").get("evaluation", {}).get(ANSWERS_SHA256)
    file = run.path / PREDICTIONS
    content = file.read_bytes() if file.exists() else b""
    if told is not None and hashlib.sha256(content).hexdigest() != told:
        raise Altered(
            f"{PREDICTIONS} is damaged or was altered: it is not used; fix: bring it back, or let "
            "`fedrx evaluate` answer again"
        )
    return run.lines(PREDICTIONS)


def write_answers(run: RunDirectory, rows: Sequence[Row]) -> str:
    """Replace a run's answers; the old digest goes first, so that no kill leaves a wrong one.

    Returns:
        Their digest, for the ``evaluation`` that the caller writes next.
    """
    summary = run.read_json("summary.json")
    if summary.get("evaluation", {}).pop(ANSWERS_SHA256, None):
        run.write_json("summary.json", summary)
    content = utf8("".join(map(json_line, rows)))
    write_bytes(run.path / PREDICTIONS, content)
    return hashlib.sha256(content).hexdigest()
