"""Automatic choices that say why."""

from dataclasses import asdict, dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Choice(Generic[T]):
    """A value that the program chose, and the reason.

    >>> Choice("fp32", "asked for").as_dict()
    {'value': 'fp32', 'reason': 'asked for'}
    """

    value: T
    reason: str

    def as_dict(self) -> dict[str, object]:
        """Return both for JSON."""
        return asdict(self)
