"""Small MIMIC-IV folders, written cell by cell."""

import csv
import gzip
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

HEADERS = {
    "patients": "subject_id,gender,anchor_age,anchor_year,anchor_year_group,dod",
    "admissions": "subject_id,hadm_id,admittime,dischtime,admission_type,insurance,race",
    "diagnoses_icd": "subject_id,hadm_id,seq_num,icd_code,icd_version",
    "d_icd_diagnoses": "icd_code,icd_version,long_title",
    "prescriptions": "subject_id,hadm_id,pharmacy_id,starttime,stoptime,drug_type,drug,ndc",
    "omr": "subject_id,chartdate,seq_num,result_name,result_value",
    "services": "subject_id,hadm_id,transfertime,prev_service,curr_service",
    "transfers": "subject_id,hadm_id,transfer_id,eventtype,careunit,intime,outtime",
    "procedures_icd": "subject_id,hadm_id,seq_num,chartdate,icd_code,icd_version",
    "d_icd_procedures": "icd_code,icd_version,long_title",
    "labevents": "labevent_id,subject_id,hadm_id,itemid,charttime,storetime,value,valuenum,"
    "valueuom,flag",
    "d_labitems": "itemid,label,fluid,category",
}

SMALL: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "patients": [
        {"subject_id": 1, "gender": "F", "anchor_age": 60, "anchor_year": 2150,
         "anchor_year_group": "2008 - 2010"},
        {"subject_id": 2, "gender": "M", "anchor_age": 88, "anchor_year": 2160,
         "anchor_year_group": "2011 - 2013"},
    ],
    "admissions": [
        {"subject_id": 1, "hadm_id": 11, "admittime": "2152-03-05 10:00:00",
         "admission_type": "URGENT", "insurance": "Other"},
        {"subject_id": 2, "hadm_id": 21, "admittime": "2162-01-01 00:00:00",
         "admission_type": "ELECTIVE", "insurance": "Medicare"},
    ],
    "diagnoses_icd": [
        {"subject_id": 1, "hadm_id": 11, "seq_num": 2, "icd_code": "0389", "icd_version": 9},
        {"subject_id": 1, "hadm_id": 11, "seq_num": 1, "icd_code": "4019", "icd_version": 9},
        {"subject_id": 2, "hadm_id": 21, "seq_num": 1, "icd_code": "I10", "icd_version": 10},
    ],
    "d_icd_diagnoses": [
        {"icd_code": "4019", "icd_version": 9, "long_title": "Hypertension, unspecified"},
        {"icd_code": "0389", "icd_version": 9, "long_title": "Septicemia"},
        {"icd_code": "I10", "icd_version": 10, "long_title": "Essential (primary) hypertension"},
    ],
    "prescriptions": [
        {"hadm_id": 11, "starttime": "2152-03-06 08:00:00", "drug_type": "MAIN",
         "drug": "Furosemide"},
        {"hadm_id": 11, "starttime": "2152-03-05 12:00:00", "drug_type": "MAIN",
         "drug": "Insulin"},
        {"hadm_id": 11, "starttime": "2152-03-05 12:00:00", "drug_type": "BASE", "drug": "Bag"},
        {"hadm_id": 21, "starttime": "2162-01-01 02:00:00", "drug_type": "MAIN",
         "drug": "Aspirin EC"},
    ],
    "omr": [
        {"subject_id": 1, "chartdate": "2152-03-05", "seq_num": 1,
         "result_name": "Height (Inches)", "result_value": "60"},
    ],
    "services": [
        {"hadm_id": 11, "transfertime": "2152-03-05 10:30:00", "curr_service": "MED"},
        {"hadm_id": 21, "transfertime": "2162-01-01 01:00:00", "curr_service": "SURG"},
    ],
    "transfers": [
        {"hadm_id": 11, "eventtype": "admit", "careunit": "Medicine",
         "intime": "2152-03-05 10:10:00"},
    ],
}  # fmt: skip

Tables = Mapping[str, Sequence[Mapping[str, Any]]]
WriteTables = Callable[..., Path]


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, header, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture(scope="session")
def write_tables(tmp_path_factory: pytest.TempPathFactory) -> WriteTables:
    """Write the small tables, with those given as keywords in their place; return the folder."""

    def write(*, suffix: str = ".csv.gz", folder: Path | None = None, **changed: Any) -> Path:
        target = folder or tmp_path_factory.mktemp("mimic")
        for name, rows in {**SMALL, **changed}.items():
            if rows is not None:
                write_csv(target / "hosp" / f"{name}{suffix}", HEADERS[name].split(","), rows)
        return target

    return write


@pytest.fixture
def small() -> dict[str, list[dict[str, Any]]]:
    """A copy of the small tables to change."""
    return {name: [dict(row) for row in rows] for name, rows in SMALL.items()}


@pytest.fixture(scope="session")
def small_tables() -> Tables:
    """The small tables as they are, to copy from."""
    return SMALL
