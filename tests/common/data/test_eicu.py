"""eICU's tables, nine unit stays by hand: every rule with the cell that shows it."""

import gzip

import pytest
from eicu_fixtures import eicu_tables, write_eicu

from common.config import Config, DataConfig, FederationConfig, PartitionConfig
from common.data.dataset import open_hospitals
from common.data.eicu.source import EICU
from common.data.icd import Diagnosis
from common.data.prepare import load_samples
from common.data.sources import source_for
from common.errors import UserError
from common.text.prompts import messages


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = write_eicu(tmp_path_factory.mktemp("eicu") / "tables")
    return load_samples(DataConfig(path=str(folder)), cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def stays(table):
    return {one.admission: one for one in table.admissions}


def test_one_sample_per_hospital_stay(table, stays):
    assert sorted(stays) == [11, 12, 13, 14, 15, 17, 18]
    assert stays[11].patient == stays[18].patient
    assert len({one.patient for one in table.admissions}) == 6
    order = [one.admission for one in table.admissions if one.patient == stays[11].patient]
    assert order == [11, 18], "2014 before 2015"
    assert table.source == "credentialed"


def test_sex_age_and_unit(stays):
    assert {stay: one.sex for stay, one in stays.items() if one.sex != "F"} == {
        **dict.fromkeys((12, 13, 17), "M"),
        15: "unknown",
    }
    assert (stays[12].age, stays[11].age, stays[18].age) == (90, 67, 68)
    assert "Age: > 89" in messages(stays[12])[1]["content"]
    assert (stays[12].careunit, stays[11].site, stays[17].site) == ("SICU", "73", "200")
    assert not any("73" in line for line in messages(stays[11])[1]["content"].split("\n")[5:])


def test_measures_are_those_of_the_first_unit_and_slipped_decimals_are_rejected(table, stays):
    assert (stays[11].height_cm, stays[11].weight_kg, stays[11].bmi) == (162.6, 80.5, 30.4)
    assert stays[12].weight_kg == 68, "of the first unit, not the second"
    assert stays[13].weight_kg is None, "805 kg"
    assert stays[14].weight_kg is None, "7.21 kg"
    assert stays[18].weight_kg == 80.5, "452 kg at 163 cm; the stay before had 80.5"
    assert (stays[17].height_cm, stays[17].weight_kg) == (None, 90), "16 cm spoil no weight"
    assert table.counts.outliers.as_json() == {"height": 1, "weight": 3, "bmi": 0}


def test_diagnoses_prefer_icd10_and_keep_words_without_a_code(stays):
    assert stays[11].diagnoses == (
        "Sepsis, pulmonary",
        "sepsis (systemic/other infections)",
        "acute respiratory failure (respiratory failure)",
    )
    assert stays[11].diagnosis_codes == ("apache:Sepsis, pulmonary", "10:A419", "10:J9600")
    # The second unit's minutes count from the hospital's admission, behind the first unit's.
    assert stays[12].diagnosis_codes == (
        "apache:Bleeding, upper GI",
        "9:5789",
        "10:A419",
        "9:5849",
        "path:endocrine|glucose metabolism|diabetes mellitus",
    )
    assert stays[14].diagnosis_codes[-1] == "9:V5861"
    assert stays[13].diagnosis_codes == ("10:I480",), "no admission diagnosis"


def test_drugs_by_first_start_without_cancelled_ones(stays):
    assert stays[11].drugs == ("PIPERACILLIN-TAZOBACTAM 4.5 G", "VANCOMYCIN 1 G IV")
    assert stays[12].drugs == ("PANTOPRAZOLE 40 MG", "NOREPINEPHRINE", "MEROPENEM 1 G")
    assert stays[13].drugs == ("METOPROLOL 5 MG",)


def test_rows_in_are_rows_out_and_the_reasons(table):
    counts = table.counts
    for name, rows in counts.rows.items():
        reasons = sum(n for key, n in counts.dropped.items() if key.startswith(f"{name}."))
        assert rows == counts.rows_out[name] + reasons, name
    left_out = {
        "patient.later_unit_stay": 1,
        "diagnosis.unknown_admission": 1,
        "diagnosis.duplicate": 1,
        "medication.drug_type_cancelled": 1,
        "medication.empty_name": 1,
        "medication.unknown_admission": 1,
        "medication.flush": 1,
        "medication.duplicate": 1,
        "measures.outlier_height": 1,
        "measures.outlier_weight": 3,
        "admissions.implausible_age": 1,
    }
    assert {key: n for key, n in counts.dropped.items() if n} == left_out


@pytest.mark.parametrize(
    ("cell", "code"),
    [
        ("518.81, J96.00", "10:J9600"),
        ("038.9, 995.92, R65.20", "10:R6520"),
        ("578.9", "9:5789"),
        ("I48.0", "10:I480"),
        ("V58.61", "9:V5861"),
        ("E878.8", "9:E8788"),
        ("E11.9", "10:E119"),
        ("250.00, E11.9", "10:E119"),
        ("305.1, V15.82", "10:V1582"),
        ("", "path:words"),
        (" ,", "path:words"),
    ],
)
def test_codes_of_one_cell(tmp_path, cell, code):
    tables = eicu_tables()
    tables["diagnosis"] = [
        {
            "patientunitstayid": 104,
            "diagnosisoffset": 1,
            "diagnosisstring": "words",
            "icd9code": cell,
        }
    ]
    found = load_samples(
        DataConfig(path=str(write_eicu(tmp_path / "e", tables))), cache_dir=tmp_path / "cache"
    )
    assert {one.admission: one.diagnosis_codes for one in found.admissions}[13] == (code,)


def test_a_code_that_is_no_icd_has_no_label():
    assert Diagnosis(title="x", code="apache:Sepsis, pulmonary").label == ""


def opened(folder, cache, hospitals, least):
    lines = []
    config = Config(
        data=DataConfig(path=str(folder), validation_fraction=0.0, test_fraction=0.0),
        partition=PartitionConfig(scheme="site", min_patients=least),
        federation=FederationConfig(hospitals=hospitals),
    )
    found = open_hospitals(config, cache_dir=cache, progress=lines.append)
    return [{one.site for one in h.admissions} for h in found.hospitals], lines


def test_sites_are_hospitals_and_small_ones_are_pooled_and_told(tmp_path):
    folder, cache = write_eicu(tmp_path / "e"), tmp_path / "cache"
    sites, lines = opened(folder, cache, 3, 1)
    assert sites == [{"73"}, {"108"}, {"200"}]
    assert not any("pooled" in line for line in lines)
    tables = eicu_tables()
    tables["patient"][5]["hospitalid"] = "9"
    sites, lines = opened(write_eicu(tmp_path / "small", tables), cache, 2, 2)
    assert sites == [{"73"}, {"108", "200", "9"}] or sites == [{"108", "200", "9"}, {"73"}]
    (line,) = [line for line in lines if "pooled" in line]
    assert line.startswith("3 of 4 sites have fewer than partition.min-patients=2 patients")
    assert not {"108", "200"} & set(line.split())


def test_no_site_is_divided(tmp_path):
    folder, cache = write_eicu(tmp_path / "e"), tmp_path / "cache"
    with pytest.raises(UserError, match="federation.hospitals=4.*3 sites.*1 to 3"):
        opened(folder, cache, 4, 1)


def rows(name, **changed):
    def change(tables):
        for row in tables[name]:
            row.update(changed)

    return change


def again(name, **changed):
    return lambda tables: tables[name].append({**tables[name][0], **changed})


BAD_CELLS = {
    "unit id": (again("patient", patientunitstayid="12 a"), "patientunitstayid are no whole"),
    "no id": (again("medication", patientunitstayid=""), "column patientunitstayid are no whole"),
    "offset": (again("diagnosis", diagnosisoffset="soon"), "column diagnosisoffset are no whole"),
    "start": (again("medication", drugstartoffset="8:00"), "drugstartoffset are no whole number"),
    "year": (
        again("patient", patientunitstayid=120, hospitaldischargeyear="999999"),
        "1 cells of column hospitaldischargeyear are no year",
    ),
    "nobody": (again("patient", patientunitstayid=120, uniquepid=" "), "1 rows have no uniquepid"),
    "repeated": (again("patient", age="44"), "repeat a patientunitstayid with other content"),
    "two patients": (
        again("patient", patientunitstayid=120, uniquepid="009-9"),
        "1 hospital stays belong to several patients",
    ),
    "other diagnoses": (rows("diagnosis", patientunitstayid=1), "diagnosis.csv.gz: 15 of 15 rows"),
    "other drugs": (rows("medication", patientunitstayid=1), "medication.csv.gz: "),
    "no ages": (rows("patient", age="old"), "no samples after cleaning"),
    "all cancelled": (rows("medication", drugordercancelled="Yes"), "no samples after cleaning"),
    "no rows": (lambda tables: tables.update(medication=[]), "medication.csv.gz has no rows"),
    "no table": (lambda tables: tables.update(diagnosis=None), "table diagnosis is missing"),
}


def refusal(folder, cache):
    with pytest.raises(UserError) as raised:
        load_samples(DataConfig(path=str(folder)), cache_dir=cache)
    assert not [path for path in cache.rglob("*") if path.is_file()]
    assert "\n" not in str(raised.value)
    assert raised.value.fix
    assert not any(cell in str(raised.value) for cell in ("002-1", "VANCOMYCIN", "12 a"))
    return str(raised.value)


@pytest.mark.parametrize("case", BAD_CELLS)
def test_a_bad_cell_is_one_line(tmp_path, case):
    change, line = BAD_CELLS[case]
    tables = eicu_tables()
    change(tables)
    assert line in refusal(write_eicu(tmp_path / "e", tables), tmp_path / "cache")


BAD_FILES = {
    "empty": (lambda text: "", "is empty"),
    "semicolons": (lambda text: text.replace(",", ";"), "is delimited by semicolons"),
    "column": (lambda text: text.replace("drugname", "drug"), "lacks column drugname"),
    "twice": (lambda text: text.replace("dosage", "drugname"), "several columns named drugname"),
    "wide": (lambda text: text + "1,2,3,4,5,No,B,C,D,E,F,G\n", "more fields than its header"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_one_line(tmp_path, case):
    change, line = BAD_FILES[case]
    path = write_eicu(tmp_path / "e") / "medication.csv.gz"
    path.write_bytes(gzip.compress(change(gzip.decompress(path.read_bytes()).decode()).encode()))
    assert line in refusal(tmp_path / "e", tmp_path / "cache")


def test_a_torn_file_and_one_that_is_no_gz(tmp_path):
    path = write_eicu(tmp_path / "e") / "diagnosis.csv.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "diagnosis.csv.gz is truncated or damaged" in refusal(tmp_path / "e", tmp_path / "c")
    path.write_bytes(gzip.decompress(whole))
    assert "diagnosis.csv.gz is not a gzip file" in refusal(tmp_path / "e", tmp_path / "c")


def test_the_folder_is_taken_for_eicus(tmp_path):
    assert isinstance(source_for(str(write_eicu(tmp_path / "e"))), EICU)


def test_a_diagnosis_is_called_by_its_own_patients_words(tmp_path):
    """Under privacy nobody's prompt may follow from who else is there."""
    tables = eicu_tables()
    told = {"diagnosispriority": "Major", "icd9code": "518.81, J96.00"}
    for minute, words in ((50, "hypoxemia"), (60, "hypoxemia"), (70, "hypercapnia")):
        path = f"pulmonary|respiratory failure|{words}"
        row = {"patientunitstayid": "104", "diagnosisoffset": str(minute), "diagnosisstring": path}
        tables["diagnosis"].append(row | told)
    without = {
        name: [row for row in rows if row["patientunitstayid"] != "104"]
        for name, rows in tables.items()
    }
    lists = []
    for place, content in enumerate((tables, without)):
        folder = write_eicu(tmp_path / f"tables-{place}", content)
        table = load_samples(DataConfig(path=str(folder)), cache_dir=tmp_path / "cache")
        lists.append(
            {one.admission: (one.diagnoses, one.diagnosis_codes) for one in table.admissions}
        )
    named, codes = lists[0].pop(13)
    assert named == ("atrial fibrillation (arrhythmias)", "hypoxemia (respiratory failure)")
    assert len(codes) == len(set(codes))
    assert lists[0] == lists[1]
