"""What a person types about one patient, checked field by field."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.data.icd import Diagnosis, DiagnosisIndex
from common.data.samples import Admission
from common.files import writable
from common.text.prompts import age_text

AGES = (18, 120)
HEIGHTS_CM = (100.0, 230.0)
WEIGHTS_KG = (25.0, 350.0)
MOST_DIAGNOSES = 40
LONGEST_TEXT = 300


class FormProblems(ValueError):
    """What is wrong, by field: ``sex``, ``age``, ``height``, ``weight`` or ``diagnoses``."""

    def __init__(self, problems: Mapping[str, str]) -> None:
        super().__init__("; ".join(problems.values()))
        self.problems = dict(problems)


@dataclass(frozen=True, kw_only=True)
class PatientRequest:
    """A checked patient."""

    sex: str
    """``F`` or ``M``."""
    age: int
    height_cm: float | None
    weight_kg: float | None
    diagnoses: tuple[Diagnosis, ...]

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

    def as_dict(self) -> dict[str, Any]:
        """Return what a decision record keeps of the patient; an age above 89 is not kept."""
        return {
            "sex": self.sex,
            "age": age_text(self.age),
            "height_cm": self.height_cm,
            "weight_kg": self.weight_kg,
            "diagnoses": [{"code": d.code, "title": d.title} for d in self.diagnoses],
        }


def read_form(form: Mapping[str, Any], index: DiagnosisIndex) -> PatientRequest:
    """Check everything at once.

    Args:
        form: ``sex``; ``age``, ``height`` (cm) and ``weight`` (kg) as numbers or text, the last two
            may be empty; ``diagnoses``: texts, each a code, a title or free text.
        index: Where codes and titles are looked up.

    Raises:
        FormProblems: Naming every field that is wrong, and what would be right.
    """
    problems: dict[str, str] = {}
    sex = _sex(form.get("sex"), problems)
    age = _number(form.get("age"), "age", problems)
    if age is None or age != int(age) or not AGES[0] <= age <= AGES[1]:
        problems.setdefault(
            "age", f"Age: whole years, {AGES[0]} to {AGES[1]} (the model has seen adults only)."
        )
    height = _number(form.get("height"), "height", problems)
    if height is not None and not HEIGHTS_CM[0] <= height <= HEIGHTS_CM[1]:
        metres = f" Did you mean {height * 100:.0f}?" if 1 <= height <= 2.5 else ""
        problems["height"] = (
            f"Height: {HEIGHTS_CM[0]:.0f} to {HEIGHTS_CM[1]:.0f} cm, or empty.{metres}"
        )
    weight = _number(form.get("weight"), "weight", problems)
    if weight is not None and not WEIGHTS_KG[0] <= weight <= WEIGHTS_KG[1]:
        problems["weight"] = f"Weight: {WEIGHTS_KG[0]:.0f} to {WEIGHTS_KG[1]:.0f} kg, or empty."
    diagnoses = _diagnoses(form.get("diagnoses"), index, problems)
    if problems:
        raise FormProblems(problems)
    assert age is not None
    return PatientRequest(
        sex=sex, age=int(age), height_cm=height, weight_kg=weight, diagnoses=diagnoses
    )


def _sex(value: Any, problems: dict[str, str]) -> str:
    text = str(value).strip().upper()[:1] if isinstance(value, str) else ""
    if text not in ("F", "M"):
        problems["sex"] = "Sex: choose female or male (the data knows these two)."
    return text


def _number(value: Any, field: str, problems: dict[str, str]) -> float | None:
    """Read a number; empty is None. A decimal comma is understood."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        if isinstance(value, bool):
            raise ValueError
        number = float(value.strip().replace(",", ".") if isinstance(value, str) else value)
    except (ValueError, TypeError):
        number = float("nan")
    if not abs(number) < 1e6:
        problems[field] = f"{field.capitalize()}: write a number, without unit."
        return None
    return number


def _diagnoses(
    value: Any, index: DiagnosisIndex, problems: dict[str, str]
) -> tuple[Diagnosis, ...]:
    texts: Sequence[Any] = value if isinstance(value, list | tuple) else ()
    if not all(isinstance(text, str) and text.strip() for text in texts) or not texts:
        problems["diagnoses"] = "Diagnoses: add at least one."
        return ()
    if len(texts) > MOST_DIAGNOSES:
        problems["diagnoses"] = f"Diagnoses: at most {MOST_DIAGNOSES}."
        return ()
    if any(len(text) > LONGEST_TEXT for text in texts):
        problems["diagnoses"] = f"Diagnoses: at most {LONGEST_TEXT} characters each."
        return ()
    # A terminal passes on bytes that are no UTF-8.
    return tuple(dict.fromkeys(index.read(text) for text in writable(texts)[0]))
