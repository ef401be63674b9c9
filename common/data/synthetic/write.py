"""The synthetic source: MIMIC-IV's tables about patients who never lived, with planted defects.

Same headers, column order and value formats as MIMIC-IV 2.2, written as csv.gz from one seed; a
manifest beside the tables says that they are synthetic, what was planted, and what a correct
cleaning must find. Provider ids and the names inside the gz headers say SYNTHETIC too.
"""

import csv
import gzip
import hashlib
import io
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from common.data.synthetic.catalogue import GROUPS, STATUS_CODES
from common.data.synthetic.patients import simulate
from common.data.synthetic.rows import Tally, patient_rows
from common.errors import UserError
from common.files import write_json

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


@dataclass(frozen=True, kw_only=True)
class SyntheticManifest:
    """What was written, and what a correct cleaning must find in it."""

    source: str
    """Always ``synthetic``."""
    notice: str
    seed: int
    patients: int
    tables: dict[str, dict[str, Any]]
    """File below the folder: ``rows`` and ``sha256`` (of the file)."""
    planted: dict[str, int]
    """Defect: how often it was planted."""
    expected: dict[str, Any]
    """The counts of ``fedrx data describe``, counted while writing."""


def write_tables(
    directory: Path,
    *,
    patients: int,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> SyntheticManifest:
    """Write a synthetic MIMIC-IV folder (hosp/, icu/ and the manifest).

    Patients are written one after the other, so memory does not grow with their number, and the
    first patients of a larger source are those of a smaller one. Nothing has its final name
    before everything is written; the manifest comes last.

    Args:
        directory: New, empty, or an earlier synthetic source (replaced).
        patients: How many patients to invent.
        seed: The source's seed: equal seeds give equal tables.
        progress: Called with the number of patients written so far.

    Raises:
        UserError: No patients asked for, or the folder holds tables that are not synthetic.
    """
    if patients < 1:
        raise UserError(
            f"{patients} synthetic patients", allowed="1 or more", fix="ask for at least one"
        )
    paths = {table: directory / f"{table}.csv.gz" for table in HEADERS}
    manifest_path = directory / MANIFEST_NAME
    if not manifest_path.exists() and any(directory.glob("*/*.csv*")):
        raise UserError(
            "the folder for the synthetic source holds other tables",
            allowed="a new folder, or an earlier synthetic source",
            fix="name another folder",
        )
    tally = Tally()
    with ExitStack() as stack:
        writers = {
            table: stack.enter_context(_TableWriter(path, HEADERS[table]))
            for table, path in paths.items()
        }
        for row in _dictionary_rows():
            writers["hosp/d_icd_diagnoses"].write(row)
        for index in range(patients):
            for table, row in patient_rows(simulate(seed, index), seed, index, tally):
                writers[table].write(row)
            if progress is not None:
                progress(index + 1)
    manifest_path.unlink(missing_ok=True)
    tables = {}
    for table, writer in writers.items():
        writer.publish()
        tables[f"{table}.csv.gz"] = {"rows": writer.rows, "sha256": _sha256(paths[table])}
    manifest = SyntheticManifest(
        source="synthetic",
        notice=NOTICE,
        seed=seed,
        patients=patients,
        tables=tables,
        planted=dict(sorted(tally.planted.items())),
        expected=tally.expected({table.split("/")[1]: w.rows for table, w in writers.items()}),
    )
    write_json(manifest_path, asdict(manifest))
    return manifest


class _TableWriter:
    """One csv.gz under a provisional name, the same bytes for the same rows."""

    def __init__(self, path: Path, header: str) -> None:
        self.rows = 0
        self._path = path
        self._partial = path.with_suffix(".partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._partial.open("wb")
        # A fixed time, and a name that says what this is, in the gzip header.
        self._gzip = gzip.GzipFile(
            f"SYNTHETIC-{path.stem}", "wb", _COMPRESSION, self._file, mtime=0
        )
        self._text = io.TextIOWrapper(self._gzip, encoding="utf-8", newline="")
        self._writer = csv.writer(self._text, lineterminator="\n")
        self._text.write(header + "\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._text.close()
        self._gzip.close()
        self._file.close()
        if kind is not None:
            self._partial.unlink(missing_ok=True)

    def write(self, row: tuple[object, ...]) -> None:
        self._writer.writerow(row)
        self.rows += 1

    def publish(self) -> None:
        self._partial.replace(self._path)


def _dictionary_rows() -> list[tuple[object, ...]]:
    codes = {code for group in GROUPS for code in group.codes}
    codes |= {code for status in STATUS_CODES for code in status}
    return [tuple(code) for code in sorted(codes)]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
