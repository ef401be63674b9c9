"""The synthetic source: MIMIC-IV's tables about patients who never lived, with planted defects.

Same headers, column order and value formats as MIMIC-IV 2.2, written as csv.gz from one seed; a
manifest beside the tables says that they are synthetic and what their hashes are. Provider ids and
the names inside the gz headers say SYNTHETIC too.
"""

import csv
import gzip
import io
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from common.data.source import hash_files
from common.data.synthetic.catalogue import GROUPS, STATUS_CODES
from common.data.synthetic.defects import draw
from common.data.synthetic.patients import simulate
from common.data.synthetic.rows import Counts, Row, patient_rows
from common.errors import UserError
from common.files import atomic_path, write_json
from common.records import Record

if TYPE_CHECKING:
    from _csv import Writer

MANIFEST_NAME = "synthetic.json"
NOTICE = "SYNTHETIC: invented patients, written by a program. No row describes a person."
HEADERS: Mapping[str, str] = {
    "hosp/patients": "subject_id,gender,anchor_age,anchor_year,anchor_year_group,dod",
    "hosp/admissions": "subject_id,hadm_id,admittime,dischtime,deathtime,admission_type,"
    "admit_provider_id,admission_location,discharge_location,insurance,language,marital_status,"
    "race,edregtime,edouttime,hospital_expire_flag",
    "hosp/diagnoses_icd": "subject_id,hadm_id,seq_num,icd_code,icd_version",
    "hosp/d_icd_diagnoses": "icd_code,icd_version,long_title",
    "hosp/prescriptions": "subject_id,hadm_id,pharmacy_id,poe_id,poe_seq,order_provider_id,"
    "starttime,stoptime,drug_type,drug,formulary_drug_cd,gsn,ndc,prod_strength,form_rx,"
    "dose_val_rx,dose_unit_rx,form_val_disp,form_unit_disp,doses_per_24_hrs,route",
    "hosp/omr": "subject_id,chartdate,seq_num,result_name,result_value",
    "hosp/services": "subject_id,hadm_id,transfertime,prev_service,curr_service",
    "hosp/transfers": "subject_id,hadm_id,transfer_id,eventtype,careunit,intime,outtime",
    "icu/icustays": "subject_id,hadm_id,stay_id,first_careunit,last_careunit,intime,outtime,los",
}
"""Table (its path without ending): its header line in MIMIC-IV 2.2."""

_COMPRESSION = 5


class WrittenTable(Record):
    """One file of the source."""

    rows: int
    sha256: str


class SyntheticManifest(Record):
    """What was written."""

    source: str
    """Always ``synthetic``."""
    notice: str
    seed: int
    patients: int
    tables: dict[str, WrittenTable]
    """By file below the folder."""


def write_tables(directory: Path, *, patients: int, seed: int) -> SyntheticManifest:
    """Write a synthetic MIMIC-IV folder (hosp/, icu/ and the manifest).

    Patients are written one after the other, so memory does not grow with their number, and the
    first patients of a larger source are those of a smaller one. Nothing has its final name
    before everything is written; the manifest comes last.

    Args:
        directory: New, empty, or an earlier synthetic source (replaced).
        patients: How many patients to invent.
        seed: The source's seed: equal seeds give equal tables.

    Raises:
        UserError: No patients asked for, or the folder holds tables that are not synthetic.
    """
    if patients < 1:
        raise UserError(
            f"{patients} synthetic patients", allowed="1 or more", fix="ask for at least one"
        )
    manifest_path = directory / MANIFEST_NAME
    if not manifest_path.exists() and any(directory.glob("*/*.csv*")):
        raise UserError(
            "the folder for the synthetic source holds other tables",
            allowed="a new folder, or an earlier synthetic source",
            fix="name another folder",
        )
    paths = {table: directory / f"{table}.csv.gz" for table in HEADERS}
    rows: Counter[str] = Counter()
    with ExitStack() as stack:
        writers = {
            table: stack.enter_context(_table_writer(path, HEADERS[table]))
            for table, path in paths.items()
        }
        for table, cells in _rows(patients, seed):
            writers[table].writerow(cells)
            rows[table] += 1
        manifest_path.unlink(missing_ok=True)
    hashes = hash_files({f"{table}.csv.gz": path for table, path in paths.items()})
    manifest = SyntheticManifest(
        source="synthetic",
        notice=NOTICE,
        seed=seed,
        patients=patients,
        tables={
            file: WrittenTable(rows=rows[file.removesuffix(".csv.gz")], sha256=digest)
            for file, digest in hashes.items()
        },
    )
    write_json(manifest_path, manifest.as_json())
    return manifest


@contextmanager
def _table_writer(path: Path, header: str) -> Iterator["Writer"]:
    """Yield the writer of one csv.gz: the same bytes for the same rows."""
    with (
        atomic_path(path) as partial,
        partial.open("wb") as file,
        # A fixed time, and a name that says what this is, in the gzip header.
        gzip.GzipFile(f"SYNTHETIC-{path.stem}", "wb", _COMPRESSION, file, mtime=0) as packed,
        io.TextIOWrapper(packed, encoding="utf-8", newline="") as text,
    ):
        text.write(header + "\n")
        yield csv.writer(text, lineterminator="\n")


def _rows(patients: int, seed: int) -> Iterator[Row]:
    codes = {code for group in GROUPS for code in group.codes}
    codes |= {code for status in STATUS_CODES for code in status}
    for code in sorted(codes):
        yield "hosp/d_icd_diagnoses", tuple(code)
    counts = Counts()
    for index in range(patients):
        rows, counts = patient_rows(draw(simulate(seed, index), seed, index), index, counts)
        yield from rows
