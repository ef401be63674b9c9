"""One row per admission: fields by hand, and rows in = rows out + reasons for hostile tables."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import DataConfig
from common.data.mimic.admissions import prepare_tables
from common.data.prepare import load_samples, sample_table
from common.errors import UserError


def samples(folder):
    table = sample_table(prepare_tables(folder), source="credentialed", file_hashes={})
    return {one.admission: one for one in table.admissions}


def test_fields_by_hand(write_tables):
    one, two = samples(write_tables()).values()
    assert (one.patient, one.admission, one.sex, one.age) == (1, 11, "F", 62)
    assert (one.height_cm, one.weight_kg, one.bmi) == (152.4, None, None)
    assert one.diagnoses == ("Hypertension, unspecified", "Septicemia")
    assert one.diagnosis_codes == ("9:4019", "9:0389")
    assert one.drugs == ("Insulin", "Furosemide")
    assert (one.service, one.careunit) == ("MED", "Medicine")
    assert (one.admission_type, one.insurance) == ("URGENT", "Other")
    assert one.anchor_year_group == "2008 - 2010"
    assert (two.age, two.drugs, two.careunit) == (90, ("Aspirin EC",), "unknown")


def test_absent_optional_tables_leave_the_attribute_unknown(write_tables):
    found = samples(write_tables(services=None, transfers=None))
    assert {one.service for one in found.values()} == {"unknown"}
    assert {one.careunit for one in found.values()} == {"unknown"}


def test_first_service_and_first_ward_count(write_tables, small):
    small["services"] += [
        {"hadm_id": 11, "transfertime": "2152-03-05 10:00:00", "curr_service": "CMED"},
        {"hadm_id": 11, "transfertime": "", "curr_service": "AAA"},
    ]
    small["transfers"] += [
        {"hadm_id": 11, "eventtype": "ED", "careunit": "Emergency", "intime": "2152-03-05 01:00:00"}
    ]
    one = samples(write_tables(**small))[11]
    assert (one.service, one.careunit) == ("CMED", "Medicine")


def test_a_patients_admissions_stand_in_the_order_of_time(write_tables, small):
    early = {**small["admissions"][0], "hadm_id": 12, "admittime": "2151-01-01 00:00:00"}
    small["admissions"].append(early)
    for name in ("diagnoses_icd", "prescriptions"):
        small[name] += [{**row, "hadm_id": 12} for row in small[name] if row["hadm_id"] == 11]
    assert list(samples(write_tables(**small))) == [12, 11, 21]


def test_admissions_repeated_with_other_content_are_refused(write_tables, small):
    small["admissions"].append({**small["admissions"][0], "insurance": "Medicaid"})
    with pytest.raises(UserError, match="1 rows repeat a hadm_id"):
        prepare_tables(write_tables(**small))


@pytest.mark.parametrize(
    ("anchor_age", "anchor_year", "age"),
    [
        (0, 2152, 0),
        (118, 2150, 120),
        (119, 2150, None),
        (300, 2150, None),
        (-5, 2150, None),
        (-5, 2140, None),
        (130, 2180, None),
        (60, 0, None),
        (1, 2154, None),
    ],
)
def test_an_implausible_age_drops_the_admission_and_is_counted(
    write_tables, small, anchor_age, anchor_year, age
):
    small["patients"][0] |= {"anchor_age": anchor_age, "anchor_year": anchor_year}
    prepared = prepare_tables(write_tables(**small))
    ages = dict(prepared.frame.select("admission", "age").iter_rows())
    assert ages == ({21: 90} if age is None else {11: age, 21: 90})
    assert prepared.counts.as_json()["dropped"]["admissions.implausible_age"] == (age is None)
    assert prepared.counts.as_json()["rows_out"]["admissions"] == len(ages)
    assert prepared.counts.as_json()["age"] == {
        "min": min(ages.values()),
        "max": 90 if age != 120 else 120,
    }
    assert prepared.counts.as_json()["dropped"]["prescriptions.unknown_admission"] == 0


def test_no_plausible_age_is_refused(write_tables, small):
    for row in small["patients"]:
        row["anchor_year"] = 0
    with pytest.raises(UserError, match="no samples after cleaning.*plausible age"):
        prepare_tables(write_tables(**small))


def test_the_same_digits_in_both_icd_versions_keep_their_own_titles(write_tables, small):
    small["d_icd_diagnoses"].append(
        {"icd_code": "4019", "icd_version": 10, "long_title": "Something else"}
    )
    prepared = prepare_tables(write_tables(**small))
    assert "Something else" not in prepared.titles
    assert prepared.counts.as_json()["diagnosis_rows_joined"] == 3


def test_result_is_the_same_from_csv_and_from_gz(write_tables, tmp_path):
    tables = [
        load_samples(DataConfig(path=str(write_tables(suffix=suffix))), cache_dir=tmp_path)
        for suffix in (".csv", ".csv.gz")
    ]
    assert tables[0].admissions == tables[1].admissions
    assert tables[0].digest == tables[1].digest
    assert tables[0].file_hashes.keys() != tables[1].file_hashes.keys()


ADMISSIONS = (11, 12, 13, 21)
hostile = st.fixed_dictionaries(
    {
        "diagnoses_icd": st.lists(
            st.fixed_dictionaries(
                {
                    "hadm_id": st.sampled_from([*ADMISSIONS, 99]),
                    "seq_num": st.integers(1, 3),
                    "icd_code": st.sampled_from(["4019", "0389", "I10", "ZZZ", ""]),
                    "icd_version": st.sampled_from([9, 10]),
                }
            ),
            max_size=12,
        ),
        "prescriptions": st.lists(
            st.fixed_dictionaries(
                {
                    "hadm_id": st.sampled_from([*ADMISSIONS, 99, ""]),
                    "starttime": st.sampled_from(["", "2152-03-05 12:00:00"]),
                    "drug_type": st.sampled_from(["MAIN", "main ", "BASE", "BASE ", ""]),
                    "drug": st.sampled_from(["A", "a ", "B", "", "Saline Flush"]),
                }
            ),
            max_size=12,
        ),
        "omr": st.lists(
            st.fixed_dictionaries(
                {
                    "subject_id": st.sampled_from([1, 2, 77]),
                    "chartdate": st.sampled_from(["2152-03-01", "2199-01-01"]),
                    "seq_num": st.integers(1, 2),
                    "result_name": st.sampled_from(
                        ["Height (Inches)", "Weight (Lbs)", "BMI (kg/m2)", "Blood Pressure", ""]
                    ),
                    "result_value": st.sampled_from(
                        ["60", "5", "150", "4649.4", "120/80", "", "x"]
                    ),
                }
            ),
            min_size=1,
            max_size=8,
        ),
        "services": st.lists(
            st.fixed_dictionaries(
                {
                    "hadm_id": st.sampled_from([*ADMISSIONS, 99, ""]),
                    "transfertime": st.sampled_from(["", "2152-03-05 12:00:00"]),
                    "curr_service": st.sampled_from(["MED", "SURG", ""]),
                }
            ),
            min_size=1,
            max_size=6,
        ),
    }
)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(changed=hostile, copies=st.integers(0, 2))
def test_rows_in_are_rows_out_and_the_reasons(write_tables, small_tables, changed, copies):
    tables = {name: [dict(row) for row in rows] for name, rows in small_tables.items()}
    stays = tables["admissions"]
    stays += [
        {**stays[0], "hadm_id": 12},
        {**stays[0], "hadm_id": 13},
        {**stays[0], "hadm_id": 14, "subject_id": 77},
    ]
    stays += [dict(stays[1]) for _ in range(copies)]
    for name, rows in changed.items():
        # The small tables stay in, so that there are samples, and orphans are no majority.
        tables[name] = tables[name] * 5 + rows if name != "services" else rows
    prepared = prepare_tables(write_tables(**tables))
    counts = prepared.counts.as_json()
    for name, rows in counts["rows"].items():
        assert rows == len(tables[name])
        reasons = {k: n for k, n in counts["dropped"].items() if k.startswith(f"{name}.")}
        assert min(reasons.values(), default=0) >= 0
        assert rows == counts["rows_out"][name] + sum(reasons.values()), name
    table = sample_table(prepared, source="credentialed", file_hashes={})
    assert counts["rows_out"]["admissions"] == counts["samples"] == len(table.admissions)
    with_diagnosis = {
        row["hadm_id"]
        for row in tables["diagnoses_icd"]
        if (row["icd_code"], row["icd_version"]) in {("4019", 9), ("0389", 9), ("I10", 10)}
    }
    with_drug = {
        row["hadm_id"]
        for row in tables["prescriptions"]
        if row["drug_type"].strip().upper() == "MAIN"
        and row["drug"].strip()
        and "Flush" not in row["drug"]
    }
    expected = {11, 12, 13, 21} & with_diagnosis & with_drug
    assert {one.admission for one in table.admissions} == expected
    assert all(one.drugs and one.diagnoses for one in table.admissions)
