"""Wrong input: one clear line each, with nothing left in the cache and no cell value shown."""

import gzip
import random
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest

from common.config import DataConfig
from common.data.prepare import load_samples
from common.errors import UserError


def refusal(folder: Path, cache: Path) -> UserError:
    with pytest.raises(UserError) as raised:
        load_samples(DataConfig(path=str(folder)), cache_dir=cache)
    assert not [path for path in cache.rglob("*") if path.is_file()]
    assert "\n" not in str(raised.value)
    assert raised.value.fix
    assert raised.value.exit_status == 2
    return raised.value


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.mark.parametrize("table", ["prescriptions", "omr", "services"])
@pytest.mark.parametrize("share", [0.05, 0.6, 0.99])
def test_truncated_gz_is_named(write_tables, small, cache, table, share):
    letters = random.Random(0)
    for row in small["prescriptions"]:
        row["ndc"] = "".join(letters.choices("0123456789abcdef", k=4000))
    folder = write_tables(**small)
    path = folder / "hosp" / f"{table}.csv.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    error = refusal(folder, cache)
    assert f"hosp/{table}.csv.gz" in error.what
    assert "truncated" in error.what


def test_a_file_that_is_no_gz_is_named(write_tables, cache):
    folder = write_tables()
    path = folder / "hosp" / "omr.csv.gz"
    path.write_bytes(gzip.decompress(path.read_bytes()))
    assert "hosp/omr.csv.gz is not a gzip file" in refusal(folder, cache).what


@pytest.mark.parametrize(
    ("table", "column"),
    [("prescriptions", "drug_type"), ("omr", "chartdate"), ("transfers", "careunit")],
)
def test_missing_column_is_named(write_tables, cache, table, column):
    folder = write_tables(suffix=".csv")
    path = folder / "hosp" / f"{table}.csv"
    path.write_text(re.sub(rf"\b{column}\b", "other", path.read_text(), count=1))
    error = refusal(folder, cache)
    assert f"hosp/{table}.csv lacks column {column}" in error.what


@pytest.mark.parametrize(
    ("table", "column"),
    [
        ("patients", "anchor_year_group"),
        ("admissions", "insurance"),
        ("diagnoses_icd", "icd_version"),
        ("d_icd_diagnoses", "long_title"),
        ("prescriptions", "drug"),
        ("omr", "result_value"),
        ("services", "curr_service"),
        ("transfers", "careunit"),
    ],
)
@pytest.mark.parametrize("more", [1, 2])
@pytest.mark.parametrize("place", [0, -1])
def test_rows_longer_than_the_header_are_refused(
    write_tables, small, cache, table, column, more, place
):
    for row in small["prescriptions"]:
        row["ndc"] = "1"
    folder = write_tables(suffix=".csv", **small)
    path = folder / "hosp" / f"{table}.csv"
    header, *rows = path.read_text().splitlines()
    cells = rows[place].split(",")
    where = header.split(",").index(column)
    rows[place] = ",".join([*cells[:where], *["Secret"] * more, *cells[where:]])
    path.write_text("\n".join([header, *rows, ""]))
    error = refusal(folder, cache)
    assert error.what == f"hosp/{table}.csv has rows with more fields than its header"
    assert "Secret" not in str(error)


@pytest.mark.parametrize(
    ("table", "old", "new"),
    [("prescriptions", "ndc", "drug"), ("omr", "result_value", "result_value,result_value")],
)
def test_columns_of_the_same_name_are_refused(write_tables, cache, table, old, new):
    folder = write_tables(suffix=".csv")
    path = folder / "hosp" / f"{table}.csv"
    path.write_text(re.sub(rf"\b{old}\b", new, path.read_text(), count=1))
    column = new.split(",")[0]
    assert refusal(folder, cache).what == f"hosp/{table}.csv has several columns named {column}"


def test_shuffled_columns_work(write_tables, tmp_path, cache):
    folder = write_tables()
    expected = load_samples(DataConfig(path=str(folder)), cache_dir=cache)
    shuffled = tmp_path / "hosp"
    shuffled.mkdir()
    for path in (folder / "hosp").iterdir():
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
        frame[sorted(frame.columns, reverse=True)].to_csv(shuffled / path.name, index=False)
    found = load_samples(DataConfig(path=str(tmp_path)), cache_dir=cache)
    assert found.file_hashes != expected.file_hashes
    assert found.admissions == expected.admissions
    assert len(found.admissions) == 2


def test_byte_order_mark_and_windows_lines_work(write_tables, cache):
    folder = write_tables(suffix=".csv")
    expected = load_samples(DataConfig(path=str(folder)), cache_dir=cache)
    for path in (folder / "hosp").iterdir():
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    found = load_samples(DataConfig(path=str(folder)), cache_dir=cache)
    assert found.file_hashes != expected.file_hashes
    assert found.admissions == expected.admissions


@pytest.mark.parametrize("wrong", ["icu", ".", "hosp/more"])
def test_table_in_the_wrong_folder_is_found(write_tables, cache, wrong):
    folder = write_tables()
    (folder / wrong).mkdir(exist_ok=True)
    shutil.move(folder / "hosp" / "omr.csv.gz", folder / wrong / "omr.csv.gz")
    error = refusal(folder, cache)
    assert error.what.startswith((Path(wrong) / "omr.csv.gz").as_posix())
    assert "wrong folder" in error.what
    assert "hosp/" in error.fix


def test_missing_table_is_named(write_tables, cache):
    folder = write_tables(omr=None)
    assert "hosp/omr is missing" in refusal(folder, cache).what


def test_lost_leading_zeros_are_named(write_tables, small, cache):
    for row in small["diagnoses_icd"]:
        row["icd_code"] = row["icd_code"].lstrip("0")
    error = refusal(write_tables(**small), cache)
    assert "hosp/diagnoses_icd.csv.gz" in error.what
    assert "icd_code lost its leading zeros" in error.what
    assert "389" not in str(error)


def test_leading_zeros_lost_in_the_dictionary_too_are_named(write_tables, small, cache):
    small["d_icd_diagnoses"].append(
        {"icd_code": "00389", "icd_version": 9, "long_title": "Another title"}
    )
    for name in ("diagnoses_icd", "d_icd_diagnoses"):
        for row in small[name]:
            row["icd_code"] = row["icd_code"].lstrip("0")
    error = refusal(write_tables(**small), cache)
    assert "hosp/d_icd_diagnoses.csv.gz" in error.what
    assert "leading zeros" in error.what


def test_single_flawed_codes_among_intact_ones_are_counted(write_tables, small, cache):
    small["diagnoses_icd"].append(
        {"subject_id": 2, "hadm_id": 21, "seq_num": 2, "icd_code": "389", "icd_version": 9}
    )
    table = load_samples(DataConfig(path=str(write_tables(**small))), cache_dir=cache)
    assert table.counts.as_json()["diagnosis_rows_unmatched"] == 1
    assert table.counts.as_json()["dropped"]["diagnoses_icd.unmatched_code"] == 1


def test_duplicate_patients_are_refused(write_tables, small, cache):
    small["patients"].append({**small["patients"][0], "anchor_age": 30})
    error = refusal(write_tables(**small), cache)
    assert error.what == "hosp/patients.csv.gz: 1 rows repeat a subject_id"


def test_prescriptions_without_admissions_are_refused(write_tables, small, cache):
    for row in small["prescriptions"]:
        row["hadm_id"] += 1000
    error = refusal(write_tables(**small), cache)
    assert "hosp/prescriptions.csv.gz: 3 of 3 rows belong to an admission" in error.what


def test_a_few_prescriptions_without_admissions_are_counted(write_tables, small, cache):
    small["prescriptions"] += [
        {"hadm_id": number, "drug_type": "MAIN", "drug": "Aspirin"} for number in (999, "")
    ]
    table = load_samples(DataConfig(path=str(write_tables(**small))), cache_dir=cache)
    assert table.counts.as_json()["dropped"]["prescriptions.unknown_admission"] == 2
    assert table.counts.as_json()["samples"] == 2


@pytest.mark.parametrize("table", ["patients", "prescriptions", "omr", "d_icd_diagnoses"])
@pytest.mark.parametrize("suffix", [".csv", ".csv.gz"])
def test_empty_tables_are_named(write_tables, small, cache, table, suffix):
    small[table] = []
    folder = write_tables(suffix=suffix, **small)
    assert f"hosp/{table}{suffix} has no rows" in refusal(folder, cache).what
    path = folder / "hosp" / f"{table}{suffix}"
    path.write_bytes(gzip.compress(b"") if suffix.endswith("gz") else b"")
    assert f"hosp/{table}{suffix} is empty" in refusal(folder, cache).what
    path.write_bytes(b"")
    assert f"hosp/{table}{suffix} is empty" in refusal(folder, cache).what


@pytest.mark.parametrize(
    ("delimiter", "word"), [(";", "semicolons"), ("\t", "tabs"), ("|", "bars")]
)
def test_another_delimiter_is_named(write_tables, cache, delimiter, word):
    folder = write_tables(suffix=".csv")
    path = folder / "hosp" / "admissions.csv"
    path.write_text(path.read_text().replace(",", delimiter))
    error = refusal(folder, cache)
    assert error.what == f"hosp/admissions.csv is delimited by {word}"


def test_the_root_of_physionets_tree_names_the_versions(write_tables, tmp_path, cache):
    root = tmp_path / "physionet.org"
    versions = [root / "files" / "mimiciv" / version for version in ("2.2", "3.1")]
    for version in versions:
        write_tables(folder=version)
    error = refusal(root, cache)
    assert "holds no hosp/" in error.what
    assert all(str(version) in error.fix for version in versions)


def test_tables_given_without_their_hosp_folder(write_tables, cache):
    assert "no hosp/" in refusal(write_tables() / "hosp", cache).what


def test_no_folder_and_no_tables(tmp_path, cache):
    assert "is not a folder" in refusal(tmp_path / "absent", cache).what
    (tmp_path / "bare").mkdir()
    assert "PhysioNet" in refusal(tmp_path / "bare", cache).fix


@pytest.mark.parametrize(
    ("table", "column", "cell"),
    [
        ("patients", "anchor_age", "sixty"),
        ("admissions", "hadm_id", "11.5"),
        ("admissions", "subject_id", "1.0E+00"),
        ("admissions", "subject_id", "12345678901234567.0"),
        ("patients", "anchor_age", "NA"),
        ("prescriptions", "hadm_id", "1.1E+01"),
        ("services", "hadm_id", "eleven"),
        ("transfers", "hadm_id", "11,0"),
        ("admissions", "admittime", "3/5/2152 10:00"),
        ("diagnoses_icd", "seq_num", ""),
        ("omr", "chartdate", "05.03.2152"),
        ("prescriptions", "starttime", "3/6/52 8:00"),
        ("services", "transfertime", "noon"),
    ],
)
def test_unreadable_cells_name_the_column_only(write_tables, small, cache, table, column, cell):
    small[table][0][column] = cell
    error = refusal(write_tables(**small), cache)
    assert error.what.startswith(f"hosp/{table}.csv.gz: 1 cells of column {column} are no")
    assert not cell or cell not in str(error)


def test_text_that_is_not_utf8_is_named(write_tables, small, cache):
    small["prescriptions"][0]["drug"] = "Secret"
    folder = write_tables(suffix=".csv", **small)
    path = folder / "hosp" / "prescriptions.csv"
    path.write_bytes(path.read_bytes().replace(b"Secret", b"Secret\xff\xfe"))
    error = refusal(folder, cache)
    assert "hosp/prescriptions.csv" in error.what
    assert "Secret" not in str(error)


def test_a_line_cut_short_is_named_without_its_content(write_tables, cache):
    folder = write_tables(suffix=".csv")
    path = folder / "hosp" / "patients.csv"
    path.write_text(path.read_text() + "3,Secret\n")
    error = refusal(folder, cache)
    assert "hosp/patients.csv: 1 cells of column anchor_age" in error.what
    assert "Secret" not in str(error)


def test_no_samples_after_cleaning(write_tables, small, cache):
    for row in small["prescriptions"]:
        row["drug"] = "Heparin Flush (10 units/ml)"
    assert "no samples after cleaning" in refusal(write_tables(**small), cache).what
    for row in small["prescriptions"]:
        row["drug_type"] = "BASE"
    assert "no rows of drug_type MAIN" in refusal(write_tables(**small), cache).what


def test_codes_that_were_floats_are_refused_by_their_column(write_tables, small, cache):
    """What stood there is not known: "389.0" was 389 or 0389."""
    for table in ("diagnoses_icd", "d_icd_diagnoses"):
        rows = [dict(row) for row in small[table]]
        rows[0]["icd_code"] = f"{rows[0]['icd_code']}.0"
        error = refusal(write_tables(**{**small, table: rows}), cache)
        assert error.what.startswith(f"hosp/{table}.csv.gz: 1 cells of column icd_code end in .0")
