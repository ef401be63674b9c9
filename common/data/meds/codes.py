"""Which codes of a MEDS data set mean what: MEDS fixes the columns, and every extraction its codes.

``MIMIC_IV`` is for the MEDS working group's extraction of MIMIC-IV (MIMIC_IV_MEDS, its
event_configs.yaml), ``EICU`` for that of eICU (https://github.com/rvandewater/eICU_MEDS, of October
2025); other extractions are told by a toml file with the same keys (``data.meds-codes``).
"""

import tomllib
from pathlib import Path
from typing import Literal

from pydantic import Field

from common.errors import UserError
from common.records import Record


class MeasureCode(Record):
    """The code of one body measure, whole, and the unit of its value."""

    kind: Literal["height", "weight", "bmi"]
    unit: Literal["in", "cm", "lb", "kg", "kg/m2"]


class Codes(Record):
    """Beginnings of codes; what follows one is its content, up to the next separator."""

    birth: str = "MEDS_BIRTH"
    """The whole code of a birth; age is counted from its time."""
    sex: str = "GENDER//"
    admission: str = "HOSPITAL_ADMISSION//"
    """Then: admission type."""
    discharge: str = "HOSPITAL_DISCHARGE//"
    diagnosis: str = "DIAGNOSIS//ICD//"
    """Then: version, code."""
    drug: str = "MEDICATION//START//"
    """Then: name."""
    careunit: str = "TRANSFER_TO//admit//"
    insurance: str = "INSURANCE//"
    service: str = "SERVICE//"
    """MIMIC-IV's extraction has none."""
    measures: dict[str, MeasureCode] = Field(
        default={
            "Height (Inches)": MeasureCode(kind="height", unit="in"),
            "Weight (Lbs)": MeasureCode(kind="weight", unit="lb"),
            "BMI (kg/m2)": MeasureCode(kind="bmi", unit="kg/m2"),
        }
    )
    admission_column: str = "hadm_id"
    """Column with the admission of an event; an event without one belongs to the admission that
    its time lies in."""
    sequence_column: str = "seq_num"
    """Column with the place of a diagnosis in its admission, and of a measure among those of its
    day; without one the file's order counts."""
    site_column: str = "hospital_id"
    """Column, in the events of admissions, with the hospital; without one there are no sites."""
    words_column: str = "diagnosis_string"
    """Of eICU's extraction: column with the words of a diagnosis."""
    priority_column: str = "diagnosis_priority"
    """Of eICU's extraction: column with the priority of a diagnosis."""
    extraction: Literal["mimic-iv", "eicu"] = "mimic-iv"
    """How events become samples: ``eicu`` where a subject is one hospital stay, whose diagnoses
    are cells of icd9code beside eICU's own words, see ``common.data.meds.eicu``."""

    @property
    def prefixes(self) -> dict[str, str]:
        """Kind of event: beginning of its codes."""
        kinds = ("sex", "admission", "discharge", "diagnosis", "drug", "careunit", "insurance")
        return {kind: getattr(self, kind) for kind in (*kinds, "service")}


MIMIC_IV = Codes()
EICU = Codes(
    extraction="eicu",
    diagnosis="DIAGNOSIS//ICD//9//",  # then a cell of icd9code, whatever versions it holds
    drug="MEDICATION//STARTED//",
    careunit="",
    insurance="",
    service="",
    measures={
        "ICU_ADMISSION_HEIGHT": MeasureCode(kind="height", unit="cm"),
        "ICU_ADMISSION_WEIGHT": MeasureCode(kind="weight", unit="kg"),
    },
    admission_column="",
    sequence_column="",
    site_column="hadm_id",  # where this extraction puts hospitalid
)


def read_codes(path: str, *, otherwise: Codes = MIMIC_IV) -> Codes:
    """Read a toml file of codes; what it leaves out is as in the extraction that it names.

    Args:
        path: The file; empty: none.
        otherwise: Without a file.

    Raises:
        UserError: It cannot be read, or holds a key or unit that does not exist.
    """
    if not path:
        return otherwise
    what = f"data.meds-codes={path}"
    try:
        with Path(path).expanduser().open("rb") as stream:
            content = tomllib.load(stream)
    except (OSError, ValueError):
        raise UserError(
            f"{what} cannot be read as toml",
            allowed="a file with keys such as admission, diagnosis, drug (common/data/README.md)",
            fix="set data.meds-codes, or leave it out for MIMIC-IV's codes",
        ) from None
    try:
        base = EICU if content.get("extraction") == EICU.extraction else MIMIC_IV
        codes = Codes.read({**base.model_dump(), **content}, what=what)
    except UserError as error:
        raise UserError(
            error.what,
            allowed=", ".join(Codes.model_fields),
            fix="mend the file (common/data/README.md)",
        ) from None
    empty = [kind for kind in ("admission", "diagnosis", "drug") if not codes.prefixes[kind]]
    if empty:
        raise UserError(f"{what}: {empty[0]} is empty", fix="name the beginning of its codes")
    return codes
