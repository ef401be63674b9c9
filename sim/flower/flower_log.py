"""Why Flower or Ray failed, read from their log: the first exception of the last chain."""

import re
from dataclasses import dataclass, field

TRACEBACK = "Traceback (most recent call last):"
DIRECT_CAUSE = "The above exception was the direct cause of the following exception:"
CONTEXT = "During handling of the above exception, another exception occurred:"
LONGEST_CAUSE = 400
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_TYPE = re.compile(r"[A-Za-z_][\w.]*(\(\w+\))?(: |$)")


@dataclass
class _Raised:
    """One exception as Python prints it."""

    line: str = ""
    """Its type and the first line of its message."""
    rest: list[str] = field(default_factory=list)
    """What follows, up to the next exception of the chain."""
    link: str = ""
    """How the exception that was printed before led to this one; empty if it did not."""


def true_cause(log: str) -> str:
    """Return what began the last chain of exceptions in a log; empty if there is none.

    Args:
        log: What Flower's processes wrote, colours included.

    >>> true_cause('''Traceback (most recent call last):
    ...   File "ray.py", line 1, in init
    ... PermissionError: [Errno 13] Permission denied: '/ray/gcs_server'
    ...
    ... The above exception was the direct cause of the following exception:
    ...
    ... Traceback (most recent call last):
    ...   File "flower.py", line 2, in run
    ... RuntimeError: An error was encountered. Ending simulation.
    ... ''')
    "PermissionError: [Errno 13] Permission denied: '/ray/gcs_server'"
    """
    raised = [one for one in _exceptions(_COLOURS.sub("", log)) if one.line]
    while raised and raised[-1].link == DIRECT_CAUSE and len(raised) > 1:
        raised.pop()
    if not raised:
        return ""
    cause = _remote(raised[-1])
    if raised[-1].link == CONTEXT and len(raised) > 1:
        cause = f"{cause} (while handling {_remote(raised[-2])})"
    return cause[:LONGEST_CAUSE]


def _exceptions(text: str) -> list[_Raised]:
    """Take the printed exceptions apart, in the order in which they stand."""
    found: list[_Raised] = []
    link = ""
    for line in text.splitlines():
        if line.endswith(TRACEBACK) and not line.startswith("  "):
            found.append(_Raised(link=link))
            link = ""
        elif line in (DIRECT_CAUSE, CONTEXT):
            link = line
        elif not found:
            continue
        elif not found[-1].line:
            if line and not line[0].isspace():
                found[-1].line = line.strip()
        else:
            found[-1].rest.append(line)
    return found


def _remote(raised: _Raised) -> str:
    """Return an exception's line; of one that Ray brings from a worker, the worker's own."""
    frames = False
    for line in raised.rest:
        if line.startswith("  File "):
            frames = True
        elif frames and line and not line[0].isspace():
            return line.strip() if _TYPE.match(line) else raised.line
        elif not frames and line and not line[0].isspace():
            break
    return raised.line
