"""What a hospital says in the handshake, and what each value may be."""

import re
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field, ValidationError

from common.choice import (
    DTYPE_NAMES,
    DTYPE_REASONS,
    KERNEL_NAMES,
    attention_reasons,
    is_device,
)
from common.records import Record
from common.wire.contract import (
    HANDSHAKE_REPLY,
    PRIVATE_HANDSHAKE_REPLY,
    ContractError,
    check_scalars,
)
from common.wire.identity import SIGNATURE, SIGNATURE_PATTERN

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""A hospital's name: it becomes a folder's."""
MOST_HOSPITALS = 10_000
MOST_COUNTED = 10**8
"""Patients or admissions of one hospital; no country has as many a year."""


def _where(good: Callable[[str], bool]) -> AfterValidator:
    def check(value: str) -> str:
        if not good(value):
            raise ValueError
        return value

    return AfterValidator(check)


def _among(choices: Callable[[], Collection[str]]) -> AfterValidator:
    return _where(lambda value: value in choices())


Text = Field(strict=True, description="one that FedRx gives")
"""A text of a hospital's own choosing could carry anything: these are known beforehand."""
Name = Annotated[
    str,
    _where(lambda value: NAME_PATTERN.fullmatch(value) is not None),
    Field(strict=True, description=f"a name like {NAME_PATTERN.pattern}"),
]
Sha256 = Annotated[
    str, Field(strict=True, pattern="^[0-9a-f]{64}$", description="a sha256 in hexadecimal")
]
Size = Annotated[
    int,
    Field(
        strict=True, ge=1, le=MOST_HOSPITALS, description=f"an integer from 1 to {MOST_HOSPITALS}"
    ),
]
Count = Field(
    strict=True, ge=0, le=MOST_COUNTED, description=f"an integer from 0 to {MOST_COUNTED}"
)


class Handshake(Record):
    """What a hospital says of itself before it takes part.

    With privacy on it tells no count, and without privacy no plan.
    """

    model_config = ConfigDict(alias_generator=lambda name: name.replace("_", "-"))

    hospital: Name
    a_sha256: Sha256
    backbone_sha256: Sha256
    source_sha256: Sha256
    federation_size: Size = Field(alias="of")
    """How many hospitals there are, by its own account."""
    device: Annotated[str, _where(is_device), Field(strict=True, description="a device")]
    dtype: Annotated[str, _among(lambda: DTYPE_NAMES), Text]
    dtype_reason: Annotated[str, _among(lambda: DTYPE_REASONS), Text]
    attention: Annotated[str, _among(lambda: KERNEL_NAMES), Text]
    attention_reason: Annotated[str, _among(attention_reasons), Text]
    privacy_plan_sha256: Sha256 = ""
    patients: Annotated[int | None, Count] = None
    samples: Annotated[int | None, Count] = None
    train_samples: Annotated[int, Count] = 0
    validation_samples: Annotated[int, Count] = 0
    signature: Annotated[
        str,
        Field(
            strict=True, pattern=f"^{SIGNATURE_PATTERN}$", description="a signature in hexadecimal"
        ),
    ] = ""


def check_handshake(record: Mapping[str, Any], *, private: bool, signed: bool = False) -> Handshake:
    """Return a handshake if each value is of its kind.

    With privacy on a plan comes, and no count.

    Raises:
        ContractError: naming the key and what it must be.
    """
    allowed = PRIVATE_HANDSHAKE_REPLY if private else HANDSHAKE_REPLY
    facts = check_scalars(record, allowed | {SIGNATURE} if signed else allowed)
    try:
        return Handshake.model_validate(facts)
    except ValidationError as error:
        key = str(error.errors(include_input=False)[0]["loc"][0])
        kinds = {field.alias: field.description for field in Handshake.model_fields.values()}
        raise ContractError(f"scalar {key!r} is not {kinds[key]}") from None


def claimed_name(record: Mapping[str, Any]) -> str | None:
    """Return the hospital that a handshake names, if that is a name at all.

    >>> claimed_name({"hospital": "north"}), claimed_name({"hospital": " "}), claimed_name({})
    ('north', None, None)
    """
    name = record.get("hospital")
    return name if isinstance(name, str) and NAME_PATTERN.fullmatch(name) else None
