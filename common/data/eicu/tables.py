"""eICU's tables: which there are, which columns are in use, and where they lie."""

from pathlib import Path

from common.data.tables import Table, find_csv, open_table
from common.errors import UserError

COLUMNS = {
    "patient": (
        *("patientunitstayid", "patienthealthsystemstayid", "uniquepid", "hospitalid"),
        *("gender", "age", "apacheadmissiondx", "admissionheight", "admissionweight"),
        *("hospitaladmitoffset", "hospitaldischargeyear", "unittype"),
    ),
    "diagnosis": (
        *("patientunitstayid", "diagnosisoffset", "diagnosisstring", "icd9code"),
        "diagnosispriority",
    ),
    "medication": ("patientunitstayid", "drugstartoffset", "drugordercancelled", "drugname"),
}
"""Tables and the columns in use."""


def find_tables(folder: Path) -> dict[str, Table]:
    """Locate and check the header of every table.

    Raises:
        UserError: A missing table or column, an empty or damaged file.
    """
    tables = {}
    for name, columns in COLUMNS.items():
        path = find_csv(folder, name)
        if path is None:
            raise UserError(
                f"table {name} is missing in {folder}",
                allowed=f"{name}.csv.gz or {name}.csv beside the other tables of eICU",
                fix="fetch it from PhysioNet (same version as the other tables)",
            )
        tables[name] = open_table(name, path, path.name, columns)
    return tables
