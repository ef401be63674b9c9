"""The synthetic tables: MIMIC-IV's form, one seed, sound structure, and marked as synthetic."""

import csv
import gzip
import hashlib
import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from common.data.names import normalise_string
from common.data.synthetic import write
from common.data.synthetic.catalogue import (
    ADDITIVES,
    BACKGROUND,
    DRUGS,
    FLUSHES,
    GROUPS,
    STATUS_CODES,
    VEHICLES,
)
from common.data.synthetic.patients import Patient, simulate
from common.data.synthetic.write import HEADERS, MANIFEST_NAME, write_tables
from common.errors import UserError

PATIENTS = 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("synthetic") / "tables"
    write_tables(path, patients=PATIENTS, seed=5)
    return path


def table(folder: Path, name: str) -> list[dict[str, str]]:
    with gzip.open(folder / f"{name}.csv.gz", "rt", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_headers_are_mimics(folder: Path, mimic_demo: Path) -> None:
    for name in HEADERS:
        with gzip.open(mimic_demo / f"{name}.csv.gz", "rb") as theirs:
            expected = theirs.readline()
        with gzip.open(folder / f"{name}.csv.gz", "rb") as ours:
            assert ours.readline() == expected, name


def test_titles_are_those_of_the_code_books(mimic_demo: Path) -> None:
    known = {
        (row["icd_code"], int(row["icd_version"])): row["long_title"]
        for row in table(mimic_demo, "hosp/d_icd_diagnoses")
    }
    codes = [code for group in GROUPS for code in group.codes]
    codes += [code for status in STATUS_CODES for code in status]
    assert {c: known.get((c.code, c.version)) for c in codes} == {c: c.title for c in codes}


MOMENT = r"2[12]\d\d-\d\d-\d\d \d\d:\d\d:\d\d"
FORMATS = {
    "hosp/patients": {
        "subject_id": r"1\d{7}",
        "gender": "[FM]",
        "anchor_age": r"\d\d",
        "anchor_year": r"2[12]\d\d",
        "anchor_year_group": r"20\d\d - 20\d\d",
        "dod": r"(2[12]\d\d-\d\d-\d\d)?",
    },
    "hosp/admissions": {
        "subject_id": r"1\d{7}",
        "hadm_id": r"2\d{7}",
        "admittime": MOMENT,
        "dischtime": MOMENT,
        "deathtime": f"({MOMENT})?",
        "hospital_expire_flag": "[01]",
    },
    "hosp/diagnoses_icd": {"seq_num": r"\d+", "icd_code": "[0-9A-Z]{2,7}", "icd_version": "9|10"},
    "hosp/prescriptions": {
        "subject_id": r"1\d{7}",
        "pharmacy_id": r"\d+",
        "poe_id": r"1\d{7}-\d+",
        "starttime": MOMENT,
        "stoptime": MOMENT,
        "drug_type": "MAIN|BASE|ADDITIVE",
        "gsn": r"0\d{5}",
        "ndc": r"0\d{10}",
    },
    "hosp/omr": {"chartdate": r"2[12]\d\d-\d\d-\d\d", "result_value": r"[\d./]+"},
    "hosp/services": {"transfertime": MOMENT, "curr_service": "[A-Z]+"},
    "hosp/transfers": {"transfer_id": r"3\d{7}", "intime": MOMENT, "outtime": f"({MOMENT})?"},
    "icu/icustays": {"stay_id": r"3\d{7}", "los": r"\d+\.\d+"},
}


OFTEN_EMPTY_IN_THE_DEMO = {"gsn", "ndc", "poe_id", "stoptime"}


def wrong_cells(folder: Path, name: str) -> dict[str, int]:
    rows = table(folder, name)
    assert rows
    return {
        column: sum(not re.fullmatch(pattern, row[column]) for row in rows)
        for column, pattern in FORMATS[name].items()
    }


@pytest.mark.parametrize("name", FORMATS)
def test_cells_have_the_formats(folder: Path, name: str) -> None:
    assert not any(wrong_cells(folder, name).values())


@pytest.mark.parametrize("name", FORMATS)
def test_the_formats_are_mimics(mimic_demo: Path, name: str) -> None:
    wrong = wrong_cells(mimic_demo, name)
    assert {column for column, cells in wrong.items() if cells} <= OFTEN_EMPTY_IN_THE_DEMO


def test_ids_are_unique_and_refer_to_rows_that_exist(folder: Path) -> None:
    patients = [row["subject_id"] for row in table(folder, "hosp/patients")]
    stays = {row["hadm_id"]: row for row in table(folder, "hosp/admissions")}
    assert len(set(patients)) == len(patients) == PATIENTS
    assert len(stays) == len(table(folder, "hosp/admissions")) > 1.3 * PATIENTS
    assert {row["subject_id"] for row in stays.values()} == set(patients)
    for name in ("diagnoses_icd", "services", "transfers"):
        rows = table(folder, f"hosp/{name}")
        assert all(stays[row["hadm_id"]]["subject_id"] == row["subject_id"] for row in rows), name
    transfers = [row["transfer_id"] for row in table(folder, "hosp/transfers")]
    assert len(set(transfers)) == len(transfers)


def test_stays_of_a_patient_follow_each_other_and_orders_fall_near_them(folder: Path) -> None:
    stays = table(folder, "hosp/admissions")
    by_patient = defaultdict(list)
    for row in stays:
        by_patient[row["subject_id"]].append((row["admittime"], row["dischtime"]))
    assert max(map(len, by_patient.values())) >= 4
    for times in by_patient.values():
        flat = [moment for stay in sorted(times) for moment in stay]
        assert flat == sorted(flat)
    admitted = {row["hadm_id"]: row["admittime"] for row in stays}
    lines = [row for row in table(folder, "hosp/prescriptions") if row["hadm_id"] in admitted]
    assert all(row["starttime"] >= admitted[row["hadm_id"]] for row in lines)


def test_patients_differ_in_what_chance_decides(folder: Path) -> None:
    patients = table(folder, "hosp/patients")
    assert 0 < sum(row["dod"] != "" for row in patients) < 0.1 * PATIENTS
    assert {row["gender"] for row in patients} == {"F", "M"}
    stays = table(folder, "hosp/admissions")
    for column in ("admission_type", "insurance", "race", "language"):
        assert len({row[column] for row in stays}) >= 2, column
    assert len({row["curr_service"] for row in table(folder, "hosp/services")}) >= 4


def test_a_vehicle_belongs_to_an_order(folder: Path) -> None:
    rows = table(folder, "hosp/prescriptions")
    main = {(row["hadm_id"], row["pharmacy_id"]) for row in rows if row["drug_type"] == "MAIN"}
    vehicles = [row for row in rows if row["drug_type"] == "BASE"]
    assert vehicles
    assert all((row["hadm_id"], row["pharmacy_id"]) in main for row in vehicles)


def test_versions_of_codes_follow_the_calendar(folder: Path) -> None:
    """One stay is coded in one version, and both versions are in use."""
    versions = defaultdict(set)
    for row in table(folder, "hosp/diagnoses_icd"):
        versions[row["hadm_id"]].add(row["icd_version"])
    assert {len(found) for found in versions.values()} == {1}
    assert {"9", "10"} == {version for found in versions.values() for version in found}


def test_lists_are_short_enough_to_be_learnt(folder: Path) -> None:
    lists = defaultdict(set)
    for row in table(folder, "hosp/prescriptions"):
        if row["drug_type"] == "MAIN" and "Flush" not in row["drug"]:
            lists[row["hadm_id"]].add(normalise_string(row["drug"]))
    lengths = sorted(map(len, lists.values()))
    assert 8 <= sum(lengths) / len(lengths) <= 14
    within = sum(5 <= length <= 17 for length in lengths)
    assert within >= 0.85 * len(lengths)


def test_a_group_implies_its_drugs(folder: Path) -> None:
    """Insulin stands beside diabetes about as often as the catalogue says, and rarely elsewhere."""
    diabetes = {"25000", "E119", "E1165"}
    coded, drugs = defaultdict(set), defaultdict(set)
    for row in table(folder, "hosp/diagnoses_icd"):
        coded[row["hadm_id"]].add(row["icd_code"])
    for row in table(folder, "hosp/prescriptions"):
        drugs[row["hadm_id"]].add(normalise_string(row["drug"]))
    with_insulin = Counter(
        (bool(codes & diabetes), "insulin" in drugs[stay])
        for stay, codes in coded.items()
        if len(drugs[stay]) > 2
    )
    assert with_insulin[True, True] >= 0.9 * (with_insulin[True, True] + with_insulin[True, False])
    assert with_insulin[False, True] <= 0.1 * with_insulin[False, False]


def test_the_catalogue_is_closed_and_its_names_differ_at_the_string_level() -> None:
    offered = {name for group in GROUPS for name, _ in group.drugs} | {n for n, _ in BACKGROUND}
    assert offered == set(DRUGS)
    names = [*DRUGS, *(drug.name for drug in FLUSHES)]
    assert len({normalise_string(name) for name in names}) == len(names)
    assert 25 <= len(GROUPS) <= 40
    for group in GROUPS:
        assert {code.version for code in group.codes} == {9, 10}
        assert 0 < group.prevalence < 1
        assert all(0 < share < 1 for _, share in group.drugs)
    assert any("," in code.title for group in GROUPS for code in group.codes)
    extra = {drug.name for drug in (*VEHICLES, *FLUSHES)}
    assert not extra & set(DRUGS)
    assert ADDITIVES


def test_the_same_seed_writes_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    again = write_tables(tmp_path / "again", patients=PATIENTS, seed=5)
    for name in HEADERS:
        path = Path(f"{name}.csv.gz")
        assert (tmp_path / "again" / path).read_bytes() == (folder / path).read_bytes(), name
    written = json.loads((folder / MANIFEST_NAME).read_text())
    assert written["tables"] == again.as_json()["tables"]
    other = write_tables(tmp_path / "other", patients=PATIENTS, seed=6)
    same = [name for name in again.tables if other.tables[name] == again.tables[name]]
    assert same == ["hosp/d_icd_diagnoses.csv.gz"]


def test_more_patients_change_no_earlier_one(folder: Path, tmp_path: Path) -> None:
    write_tables(tmp_path, patients=40, seed=5)
    for name in HEADERS:
        few, many = table(tmp_path, name), table(folder, name)
        assert many[: len(few)] == few, name


def test_the_tables_of_a_seed_stay(tmp_path: Path) -> None:
    """A draw more, or in another place, makes other patients of every seed."""
    write_tables(tmp_path, patients=24, seed=3)
    content = b"".join(gzip.decompress((tmp_path / f"{n}.csv.gz").read_bytes()) for n in HEADERS)
    expected = "efd6c5ee659c32da15258de2887dd0fd8cc2f90bcc9717bfa579123691312e5b"
    assert hashlib.sha256(content).hexdigest() == expected


def test_the_manifest_says_synthetic_and_holds_true_hashes(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    assert manifest["source"] == "synthetic"
    assert "SYNTHETIC" in manifest["notice"]
    assert set(manifest["tables"]) == {f"{name}.csv.gz" for name in HEADERS}
    for name, entry in manifest["tables"].items():
        path = folder / name
        assert hashlib.sha256(path.read_bytes()).hexdigest() == entry["sha256"]
        assert len(table(folder, name.removesuffix(".csv.gz"))) == entry["rows"]
        header = path.read_bytes()[:60]
        assert header[4:8] == bytes(4), "the gzip header holds a time"
        assert b"SYNTHETIC" in header
    assert {row["admit_provider_id"] for row in table(folder, "hosp/admissions")} == {"PSYNTHETIC"}
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert files == {*manifest["tables"], MANIFEST_NAME}


def test_an_earlier_source_is_replaced_but_no_other_table(folder: Path, tmp_path: Path) -> None:
    write_tables(tmp_path, patients=10, seed=1)
    assert write_tables(tmp_path, patients=12, seed=1).patients == 12
    assert len(table(tmp_path, "hosp/patients")) == 12
    (tmp_path / MANIFEST_NAME).unlink()
    before = (tmp_path / "hosp/patients.csv.gz").read_bytes()
    with pytest.raises(UserError, match="other tables"):
        write_tables(tmp_path, patients=13, seed=1)
    assert (tmp_path / "hosp/patients.csv.gz").read_bytes() == before


def test_real_tables_under_any_name_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "hosp").mkdir()
    plain = tmp_path / "hosp" / "patients.csv"
    plain.write_text("subject_id\n")
    with pytest.raises(UserError, match="other tables"):
        write_tables(tmp_path, patients=10, seed=1)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["patients.csv"]


def test_a_write_that_is_cut_off_leaves_nothing_that_looks_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(seed: int, index: int) -> Patient:
        if index == 5:
            raise KeyboardInterrupt
        return simulate(seed, index)

    monkeypatch.setattr(write, "simulate", stop)
    with pytest.raises(KeyboardInterrupt):
        write_tables(tmp_path, patients=10, seed=1)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_no_patients_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="patients"):
        write_tables(tmp_path, patients=0, seed=1)
    assert list(tmp_path.iterdir()) == []
