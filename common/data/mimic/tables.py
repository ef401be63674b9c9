"""MIMIC-IV's tables: which there are, which columns are in use, and where they lie."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from common.data.protocols import ADMISSION, FIRST_24H, VISITS
from common.data.tables import Table, find_csv, open_table
from common.errors import UserError

COLUMNS = {
    "patients": ("subject_id", "gender", "anchor_age", "anchor_year", "anchor_year_group"),
    "admissions": ("subject_id", "hadm_id", "admittime", "admission_type", "insurance"),
    "diagnoses_icd": ("hadm_id", "seq_num", "icd_code", "icd_version"),
    "d_icd_diagnoses": ("icd_code", "icd_version", "long_title"),
    "prescriptions": ("hadm_id", "starttime", "drug_type", "drug"),
    "omr": ("subject_id", "chartdate", "seq_num", "result_name", "result_value"),
    "services": ("hadm_id", "transfertime", "curr_service"),
    "transfers": ("hadm_id", "eventtype", "careunit", "intime"),
}
"""Tables under hosp/ and the columns in use."""
PROTOCOL_COLUMNS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    ADMISSION: {},
    VISITS: {
        "procedures_icd": ("hadm_id", "seq_num", "icd_code", "icd_version"),
        "d_icd_procedures": ("icd_code", "icd_version", "long_title"),
    },
    FIRST_24H: {
        "admissions": (*COLUMNS["admissions"], "dischtime"),
        "labevents": (
            *("hadm_id", "itemid", "charttime", "storetime"),
            *("valuenum", "valueuom", "flag"),
        ),
        "d_labitems": ("itemid", "label", "fluid"),
    },
}
"""What a protocol reads beyond or instead of these."""
PAIRED = {VISITS: ("procedures_icd", "d_icd_procedures"), FIRST_24H: ("labevents", "d_labitems")}
"""Optional tables of a protocol, of use only together."""
OPTIONAL = ("services", "transfers", *PAIRED[VISITS], *PAIRED[FIRST_24H])
"""Without the first two partition attributes are ``unknown``; the others belong to protocols."""
_CLOCKED = ("admissions", "prescriptions", "services", "labevents")
"""What decides whether something was known at hour 24 must be told to the hour."""
_SEARCH_DEPTH = 4


def find_tables(folder: Path, protocol: str = ADMISSION) -> dict[str, Table]:
    """Locate and check the header of every table of a MIMIC-IV folder.

    Args:
        folder: The version's folder, which holds ``hosp/``.
        protocol: ``data.protocol``: each has tables of its own.

    Returns:
        Table by name; optional tables that are absent are left out.

    Raises:
        UserError: No such folder, a missing or misplaced table, an empty file, a foreign
            delimiter, a missing or repeated column, a damaged gz.
    """
    _check_root(folder)
    tables = {}
    for name, columns in {**COLUMNS, **PROTOCOL_COLUMNS[protocol]}.items():
        path = _locate(folder, name)
        if path is not None:
            label = path.relative_to(folder).as_posix()
            clocked = protocol == FIRST_24H and name in _CLOCKED
            tables[name] = replace(open_table(name, path, label, columns), clocked=clocked)
    pair = PAIRED.get(protocol, ())
    if not set(pair) <= tables.keys():
        tables = {name: table for name, table in tables.items() if name not in pair}
    return tables


def _check_root(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(
            f"data.path={folder} is not a folder",
            allowed="a folder of MIMIC-IV (it holds hosp/), MEDS or eICU, or synthetic",
            fix="set data.path",
        )
    if (folder / "hosp").is_dir():
        return
    if any(find_csv(folder, name) for name in ("prescriptions", "admissions")):
        raise UserError(
            f"data.path={folder} holds tables but no hosp/",
            fix="name the folder above, or move the tables into hosp/",
        )
    below = sorted(_folders_with_hosp(folder))
    raise UserError(
        f"data.path={folder} holds no hosp/",
        allowed="the folder of one MIMIC-IV version, of a MEDS data set, or of eICU's tables",
        fix=f"use data.path={' or '.join(map(str, below[:3]))}"
        if below
        else "fetch MIMIC-IV or its demo from PhysioNet, or set data.path=synthetic",
    )


def _folders_with_hosp(folder: Path) -> Iterator[Path]:
    for root, folders, _ in os.walk(folder):
        here = Path(root)
        if "hosp" in folders:
            yield here
            folders.clear()
        if len(here.relative_to(folder).parts) >= _SEARCH_DEPTH:
            folders.clear()


def _locate(folder: Path, name: str) -> Path | None:
    path = find_csv(folder / "hosp", name)
    if path is not None:
        return path
    elsewhere = next((p for p in (find_csv(d, name) for d in _other_folders(folder)) if p), None)
    if elsewhere is not None:
        raise UserError(
            f"{elsewhere.relative_to(folder).as_posix()} is in the wrong folder",
            allowed=f"hosp/{name}.csv.gz or hosp/{name}.csv",
            fix="move it into hosp/",
        )
    if name in OPTIONAL:
        return None
    raise UserError(
        f"table hosp/{name} is missing in {folder}",
        allowed=f"hosp/{name}.csv.gz or hosp/{name}.csv",
        fix="fetch it from PhysioNet (same version as the other tables)",
    )


def _other_folders(folder: Path) -> list[Path]:
    below = sorted(path for path in folder.iterdir() if path.is_dir() and path.name != "hosp")
    inside = sorted(path for path in (folder / "hosp").iterdir() if path.is_dir())
    return [folder, *below, *inside]
