"""What a hospital says in the handshake, and what each value may be."""

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from common.choice import (
    DTYPE_NAMES,
    DTYPE_REASONS,
    KERNEL_NAMES,
    attention_reasons,
    is_device,
)
from common.wire.contract import HELLO_REPLY, PRIVATE_HELLO_REPLY, ContractError, check_scalars
from common.wire.identity import SIGNATURE, SIGNATURE_PATTERN

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""A hospital's name: it becomes a folder's."""
MOST_HOSPITALS = 10_000
MOST_COUNTED = 10**8
"""Patients or admissions of one hospital; no country has as many a year."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CHOICES: dict[str, Callable[[], Collection[str]]] = {
    "dtype": lambda: DTYPE_NAMES,
    "dtype-reason": lambda: DTYPE_REASONS,
    "attention": lambda: KERNEL_NAMES,
    "attention-reason": attention_reasons,
}
"""A text of a hospital's own choosing could carry anything: these are known beforehand."""
_COUNTS = frozenset({"patients", "samples", "train-samples", "validation-samples"})


def check_hello(
    record: Mapping[str, Any], *, private: bool, signed: bool = False
) -> dict[str, Any]:
    """Return a handshake's values if each is of its kind.

    Args:
        record: What arrived.
        private: Whether differential privacy is on: then a plan comes, and no count.
        signed: Whether it was asked for a signature.

    Raises:
        ContractError: naming the key and what it must be.
    """
    allowed = PRIVATE_HELLO_REPLY if private else HELLO_REPLY
    hello = check_scalars(record, allowed | {SIGNATURE} if signed else allowed)
    for key, value in hello.items():
        good, kind = _rule(key)
        if not good(value):
            raise ContractError(f"scalar {key!r} is not {kind}")
    return hello


def claimed_name(record: Mapping[str, Any]) -> str | None:
    """Return the hospital that a handshake names, if that is a name at all.

    >>> claimed_name({"hospital": "north"}), claimed_name({"hospital": " "}), claimed_name({})
    ('north', None, None)
    """
    name = record.get("hospital")
    return name if isinstance(name, str) and NAME_PATTERN.fullmatch(name) else None


def _rule(key: str) -> tuple[Callable[[Any], bool], str]:
    if key == "hospital":
        return lambda value: _matches(NAME_PATTERN, value), f"a name like {NAME_PATTERN.pattern}"
    if key.endswith("-sha256"):
        return lambda value: _matches(_SHA256, value), "a sha256 in hexadecimal"
    if key == SIGNATURE:
        return lambda value: _matches(SIGNATURE_PATTERN, value), "a signature in hexadecimal"
    if key == "of":
        return lambda value: _whole(value) and 1 <= value <= MOST_HOSPITALS, (
            f"an integer from 1 to {MOST_HOSPITALS}"
        )
    if key in _COUNTS:
        return lambda value: _whole(value) and 0 <= value <= MOST_COUNTED, (
            f"an integer from 0 to {MOST_COUNTED}"
        )
    if key == "device":
        return lambda value: isinstance(value, str) and is_device(value), "a device"
    choices = _CHOICES[key]()
    return lambda value: isinstance(value, str) and value in choices, "one that FedRx gives"


def _matches(pattern: re.Pattern[str], value: Any) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
