"""What a person types about one patient, checked field by field."""

from collections.abc import Iterable, Mapping
from typing import Literal, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from common.data.icd import Diagnosis, DiagnosisIndex
from common.data.samples import Admission
from common.files import writable
from common.text.prompts import age_text

MOST_DIAGNOSES = 40
LONGEST_TEXT = 300
WHAT_IS_RIGHT = {
    "sex": "F or M (female or male; the data knows these two).",
    "age": "whole years, 18 to 120 (the model has seen adults only).",
    "height": "100 to 230 cm, or empty.",
    "weight": "25 to 350 kg, or empty.",
}
_NO_NUMBER = ("int_parsing", "float_parsing", "finite_number")


class FormProblems(ValueError):
    """What is wrong, by field: ``sex``, ``age``, ``height``, ``weight`` or ``diagnoses``."""

    def __init__(self, problems: Mapping[str, str]) -> None:
        super().__init__("; ".join(one.rstrip(".") for one in problems.values()))
        self.problems = dict(problems)


class PatientRequest(BaseModel):
    """A checked patient; see ``read_form`` for what is read."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    sex: Literal["F", "M"]
    age: int = Field(ge=18, le=120)
    height_cm: float | None = Field(None, alias="height", ge=100, le=230)
    weight_kg: float | None = Field(None, alias="weight", ge=25, le=350)
    diagnoses: tuple[Diagnosis, ...]

    @field_validator("sex", mode="before")
    @classmethod
    def _first_letter(cls, value: object) -> str:
        return value.strip().upper()[:1] if isinstance(value, str) else ""

    @field_validator("age", "height_cm", "weight_kg", mode="before")
    @classmethod
    def _number(cls, value: object) -> float | str | None:
        """Read a number; empty is None. A decimal comma is understood."""
        text = "" if value is None else str(value).strip().replace(",", ".")
        try:
            return float(text) if text else None
        except ValueError:
            return text

    @field_validator("diagnoses", mode="before")
    @classmethod
    def _look_up(cls, texts: object, info: ValidationInfo) -> tuple[Diagnosis, ...]:
        if not isinstance(texts, list | tuple) or not texts:
            raise ValueError("add at least one.")
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError("add at least one.")
        if len(texts) > MOST_DIAGNOSES:
            raise ValueError(f"at most {MOST_DIAGNOSES}.")
        if any(len(text) > LONGEST_TEXT for text in texts):
            raise ValueError(f"at most {LONGEST_TEXT} characters each.")
        index = cast(DiagnosisIndex, info.context)
        # A terminal passes on bytes that are no UTF-8.
        return tuple(dict.fromkeys(index.read(text) for text in writable(texts)[0]))

    @property
    def bmi(self) -> float | None:
        """Body-mass index in kg/m2, where both measures are known."""
        if self.height_cm is None or self.weight_kg is None:
            return None
        return self.weight_kg / (self.height_cm / 100) ** 2

    def admission(self) -> Admission:
        """Return the request in the form that prompts are written from."""
        return Admission(
            patient=0,
            admission=0,
            sex=self.sex,
            age=self.age,
            height_cm=self.height_cm,
            weight_kg=self.weight_kg,
            bmi=self.bmi,
            diagnoses=tuple(diagnosis.title for diagnosis in self.diagnoses),
            diagnosis_codes=self.codes,
        )

    @property
    def codes(self) -> tuple[str, ...]:
        """The codes of the diagnoses that have one."""
        return tuple(diagnosis.code for diagnosis in self.diagnoses if diagnosis.code)

    def as_dict(self) -> dict[str, object]:
        """Return what a decision record keeps of the patient; an age above 89 is not kept."""
        return {**self.model_dump(), "age": age_text(self.age)}


def read_form(form: Mapping[str, object], index: DiagnosisIndex) -> PatientRequest:
    """Check everything at once.

    Args:
        form: ``sex``; ``age``, ``height`` (cm) and ``weight`` (kg) as numbers or text, the last two
            may be empty; ``diagnoses``: texts, each a code, a title or free text.
        index: Where codes and titles are looked up.

    Raises:
        FormProblems: Naming every field that is wrong, and what would be right.
    """
    try:
        return PatientRequest.model_validate(form, context=index)
    except ValidationError as error:
        raise FormProblems(dict(_problems(error))) from None


def _problems(wrong: ValidationError) -> Iterable[tuple[str, str]]:
    for error in wrong.errors(include_url=False):
        field, value = str(error["loc"][0]), error["input"]
        right = WHAT_IS_RIGHT.get(field, "add at least one.")
        if error["type"] in _NO_NUMBER:
            right = "write a number, without unit."
        elif error["type"] == "value_error":
            right = str(error["ctx"]["error"])
        elif field == "height" and 1 <= value <= 2.5:
            right += f" Did you mean {value * 100:.0f}?"
        yield field, f"{field.capitalize()}: {right}"
