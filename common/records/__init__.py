"""Records: what the JSON files of a run hold, each kind as one pydantic model.

A file keeps its keys; what reads it back gets a typed value or one clear line. The version of all
of them is that of the run directory (``run.json``).
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from common.errors import UserError


class Record(BaseModel):
    """One kind of record: frozen, and no key more than it declares."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        populate_by_name=True,
        from_attributes=True,
        ser_json_inf_nan="constants",
    )

    absent_when_none: ClassVar[tuple[str, ...]] = ()
    """Keys that a file lacks where their value is None."""

    @classmethod
    def read(cls, content: str | bytes | Mapping[str, Any], *, what: str) -> Self:
        """Return the record that JSON holds.

        Args:
            content: JSON text, or what it holds.
            what: Names the file in the message.

        Raises:
            UserError: if it is no JSON or not such a record; the value is never quoted.
        """
        try:
            if isinstance(content, Mapping):
                return cls.model_validate(content)
            return cls.model_validate_json(content)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False, include_context=False)[0]
            place = ".".join(str(part) for part in first["loc"]) or "it"
            raise UserError(
                f"{what}: {place}: {first['msg']}",
                allowed=f"{cls.__name__} as fedrx writes it",
                fix="use the file as it was written",
            ) from None

    def as_json(self) -> dict[str, Any]:
        """Return the record as JSON values, under the keys of the file."""
        content = self.model_dump(mode="json", by_alias=True)
        for key in self.absent_when_none:
            if content[key] is None:
                del content[key]
        return content


class PartialRecord(Record):
    """A kind of record whose file has the keys that were given, and no others."""

    def as_json(self) -> dict[str, Any]:
        """Return the keys that were given."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)


class OpenRecord(PartialRecord):
    """A partial record that keeps what another version has added."""

    model_config = ConfigDict(extra="allow")
