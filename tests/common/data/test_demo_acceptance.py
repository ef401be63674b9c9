"""Every number that the MIMIC-IV demo must give, counted beforehand from the files."""

import pytest

from common.config import DataConfig, PartitionConfig
from common.data.partition import assign_hospitals
from common.data.prepare import load_samples
from common.data.skew import drug_skew


@pytest.fixture(scope="module")
def table(mimic_demo, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return load_samples(DataConfig(path=str(mimic_demo)), cache_dir=cache)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("drug_type", {"MAIN": 14_391, "BASE": 3_677, "ADDITIVE": 19}),
        ("pairs_raw", 7_287),
        ("pairs_normalised", 7_279),
        ("flush_rows", 739),
        ("pairs_clean", 6_934),
        ("names_clean", 547),
        ("samples", 250),
        ("patients", 100),
        ("diagnosis_rows_joined", 4_506),
        ("diagnosis_rows_unmatched", 0),
        ("age_differs_from_anchor", 145),
        ("age", {"min": 21, "max": 93}),
        ("age_over_89", 8),
        ("height", 156),
        ("weight", 178),
        ("height_and_weight", 155),
        ("no_height_no_weight", 71),
        ("outliers", {"height": 1, "weight": 0, "bmi": 1}),
        ("bmi_check", {"triples": 371, "within_one": 371}),
    ],
)
def test_number(table, key, expected):
    assert table.counts.as_json()[key] == expected


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("patients", 100),
        ("admissions", 275),
        ("diagnoses_icd", 4_506),
        ("prescriptions", 18_087),
        ("omr", 2_964),
    ],
)
def test_rows_read(table, name, rows):
    assert table.counts.as_json()["rows"][name] == rows


def test_drugs_per_sample(table):
    drugs = table.counts.as_json()["drugs_per_sample"]
    assert drugs["mean"] == pytest.approx(27.74, abs=0.005)
    assert (drugs["min"], drugs["max"]) == (4, 88)
    lengths = [len(one.drugs) for one in table.admissions]
    assert (sum(lengths), min(lengths), max(lengths)) == (6_934, 4, 88)
    assert len({one.patient for one in table.admissions}) == 100


def test_rows_in_are_rows_out_and_the_reasons(table):
    counts = table.counts.as_json()
    for name, rows in counts["rows"].items():
        reasons = sum(n for key, n in counts["dropped"].items() if key.startswith(f"{name}."))
        assert rows == counts["rows_out"][name] + reasons, name


def test_source(table):
    assert table.source == "demo"


def test_four_random_shards_already_stand_apart(table):
    nulls = []
    for seed in range(4):
        hospitals = assign_hospitals(
            table.admissions, PartitionConfig(seed=seed), hospitals=4, data=DataConfig()
        )
        nulls.append(drug_skew([one.admissions for one in hospitals], seed=seed).null)
    assert sum(nulls) / len(nulls) == pytest.approx(0.171, abs=0.004)


@pytest.mark.parametrize(
    "scheme",
    ["iid", "service", "admission-type", "insurance", "anchor-year-group", "careunit", "dirichlet"],
)
def test_every_scheme_deals_all_samples(table, scheme):
    hospitals = assign_hospitals(
        table.admissions, PartitionConfig(scheme=scheme), hospitals=3, data=DataConfig()
    )
    dealt = [one for hospital in hospitals for one in hospital.admissions]
    assert sorted(dealt, key=lambda one: one.admission) == sorted(
        table.admissions, key=lambda one: one.admission
    )
    homes = [{one.patient for one in hospital.admissions} for hospital in hospitals]
    assert sum(map(len, homes)) == 100
