"""Tables that went through a spreadsheet, a data frame or a database and say the same."""

import csv
import gzip
from collections import Counter

import pandas as pd
import pytest

from common.config import DataConfig
from common.data.mimic.tables import COLUMNS
from common.data.prepare import load_samples
from common.data.tables import NULLS

NUMBERS = {
    "patients": ("subject_id", "anchor_age", "anchor_year"),
    "admissions": ("subject_id", "hadm_id"),
    "diagnoses_icd": ("subject_id", "hadm_id", "seq_num", "icd_version"),
    "d_icd_diagnoses": ("icd_version",),
    "prescriptions": ("hadm_id",),
    "omr": ("subject_id", "seq_num"),
    "services": ("hadm_id",),
    "transfers": ("hadm_id",),
}


def samples(folder, tmp_path):
    return load_samples(DataConfig(path=str(folder)), cache_dir=tmp_path / "cache")


def same(found, expected):
    assert found.admissions == expected.admissions
    assert found.digest == expected.digest
    assert found.counts.as_json()["dropped"] == expected.counts.as_json()["dropped"]


@pytest.mark.parametrize("table", NUMBERS)
def test_whole_numbers_written_as_floats_are_read(write_tables, small, tmp_path, table):
    expected = samples(write_tables(), tmp_path)
    for row in small[table]:
        row.update({name: f"{row[name]}.0" for name in NUMBERS[table] if name in row})
    found = samples(write_tables(**small), tmp_path)
    same(found, expected)
    assert found.counts.as_json()["null_spelled"] == {}


def test_what_pandas_makes_of_a_column_with_a_gap_changes_nothing(write_tables, small, tmp_path):
    """An ED stay has no hadm_id: pandas then writes the whole column as floats."""
    small["transfers"].append(
        {"hadm_id": "", "eventtype": "ED", "careunit": "ED", "intime": "2152-03-05 09:00:00"}
    )
    folder = write_tables(suffix=".csv", **small)
    expected = samples(folder, tmp_path)
    assert expected.admissions[0].careunit == "Medicine"
    path = folder / "hosp" / "transfers.csv"
    pd.read_csv(path).to_csv(path, index=False)
    assert "11.0" in path.read_text()
    same(samples(folder, tmp_path), expected)


NULLABLE = {
    "patients": ("gender", "anchor_year_group"),
    "admissions": ("admission_type", "insurance"),
    "prescriptions": ("hadm_id", "starttime", "drug_type"),
    "services": ("hadm_id", "transfertime", "curr_service"),
    "transfers": ("hadm_id", "careunit", "intime"),
}


@pytest.mark.parametrize("spelling", [*NULLS, " NA ", "N/A", "n/a", "#N/A", "(null)"])
def test_a_null_is_null_however_it_is_spelled_and_is_counted(
    write_tables, small, tmp_path, spelling
):
    """In every column where NULL may stand: the same samples and reasons as from empty cells."""
    for table in ("prescriptions", "services", "transfers"):
        small[table] = small[table] * 3
    tables = {"empty": {}, "spelled": {}}
    cells = Counter()
    for table, rows in small.items():
        for kind, null in (("empty", ""), ("spelled", spelling)):
            copies = [dict(row) for row in rows]
            for place, column in enumerate(NULLABLE.get(table, ())):
                copies[place % len(copies)][column] = null
            tables[kind][table] = copies
        cells.update(f"{table}.{column}" for column in NULLABLE.get(table, ()))
    found = samples(write_tables(**tables["spelled"]), tmp_path)
    expected = samples(write_tables(**tables["empty"]), tmp_path)
    same(found, expected)
    assert found.counts.as_json()["null_spelled"] == dict(cells)
    assert expected.counts.as_json()["null_spelled"] == {}
    for name, rows in found.counts.as_json()["rows"].items():
        reasons = {
            k: n for k, n in found.counts.as_json()["dropped"].items() if k.startswith(f"{name}.")
        }
        assert rows == found.counts.as_json()["rows_out"][name] + sum(reasons.values()), name


@pytest.mark.parametrize("name", ["NA", "None", "NULL", "nan"])
def test_a_name_that_looks_like_null_is_a_name(write_tables, small, tmp_path, name):
    """Drugs and titles are never NULL in MIMIC-IV: such a word is what somebody wrote."""
    small["prescriptions"][0]["drug"] = name
    small["d_icd_diagnoses"][0]["long_title"] = name
    found = samples(write_tables(**small), tmp_path)
    assert name in found.admissions[0].drugs
    assert name in found.admissions[0].diagnoses


def test_a_backslash_n_is_no_name(write_tables, small, tmp_path):
    small["prescriptions"].append({**small["prescriptions"][0], "drug": r"\N"})
    small["d_icd_diagnoses"].append({"icd_code": "X", "icd_version": 10, "long_title": r"\N"})
    expected = samples(write_tables(), tmp_path)
    found = samples(write_tables(**small), tmp_path)
    assert found.admissions == expected.admissions
    assert found.counts.as_json()["dropped"]["prescriptions.empty_name"] == 1
    assert found.counts.as_json()["dropped"]["d_icd_diagnoses.no_title"] == 1


@pytest.mark.slow
def test_the_demo_spells_no_null_and_says_the_same_in_floats(mimic_demo, tmp_path):
    """Every whole number of every table as a data frame with a gap would write it."""
    expected = samples(mimic_demo, tmp_path)
    assert expected.counts.as_json()["null_spelled"] == {}
    (tmp_path / "floats" / "hosp").mkdir(parents=True)
    for table in COLUMNS:
        source = mimic_demo / "hosp" / f"{table}.csv.gz"
        with (
            gzip.open(source, "rt", encoding="utf-8", newline="") as rows,
            (tmp_path / "floats" / "hosp" / f"{table}.csv").open("w", newline="") as target,
        ):
            reader = csv.DictReader(rows)
            writer = csv.DictWriter(target, reader.fieldnames)
            writer.writeheader()
            for row in reader:
                floats = {name: f"{row[name]}.0" for name in NUMBERS[table] if row.get(name)}
                writer.writerow({**row, **floats})
    same(samples(tmp_path / "floats", tmp_path), expected)
