"""One configuration key: default, meaning, limits."""

from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any, TypeVar

T = TypeVar("T", bound=bool | int | float | str)


def option(
    default: T,
    meaning: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    file: bool = False,
    content: bool = False,
    fault: Callable[[str], str] | None = None,
) -> T:
    """Declare one configuration key: default, meaning and limits.

    Where there is a choice, the key's type is a Literal that lists it.

    Args:
        default: Value when nobody sets the key; its type is the key's type.
        meaning: One sentence with the unit, shown by validation and documentation.
        low: Smallest allowed value.
        high: Largest allowed value.
        above: The value must be strictly larger than this.
        file: It names a file or folder (or one of ours): another machine is never told it.
        content: A text, or a file that holds it; the text becomes the value and travels.
        fault: Says what is wrong with a text, in one line; empty: nothing.
    """
    limits: Mapping[str, Any] = {
        "meaning": meaning,
        "low": low,
        "high": high,
        "above": above,
        "file": file,
        "content": content,
        "fault": fault,
    }
    value: T = field(default=default, metadata=limits)
    return value
