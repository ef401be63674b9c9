"""Every cleaning rule against the planted defects, without the demo.

Two programs meet here: the generator counts what it plants while it writes, and the cleaning
counts what it finds in the tables.
"""

import csv
import gzip
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from common.config import DataConfig
from common.data.prepare import load_samples
from common.data.samples import SampleTable
from common.data.synthetic.write import SyntheticManifest, write_tables

PLANTED = (
    "bmi_outliers",
    "clashing_code_rows",
    "duplicate_diagnosis_rows",
    "duplicate_prescription_rows",
    "height_outliers",
    "leading_zero_rows",
    "measures_after_admission",
    "orphan_rows",
    "patients_above_89",
    "spelling_variant_rows",
    "stays_with_only_flushes",
    "stays_without_diagnoses",
    "stays_without_orders",
    "weight_outliers",
)

Source = tuple[Path, SyntheticManifest, SampleTable]


@pytest.fixture(scope="module", params=[0, 1, 2])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("tables")
    manifest = write_tables(folder, patients=240, seed=request.param)
    cache = tmp_path_factory.mktemp("cache")
    return folder, manifest, load_samples(DataConfig(path=str(folder)), cache_dir=cache)


def table(folder: Path, name: str) -> list[dict[str, str]]:
    with gzip.open(folder / f"{name}.csv.gz", "rt", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_every_defect_is_planted(source: Source) -> None:
    manifest = source[1]
    assert tuple(manifest.planted) == PLANTED
    assert [defect for defect, number in manifest.planted.items() if number < 1] == []


def test_the_smallest_source_has_the_single_defects(tmp_path: Path) -> None:
    planted = write_tables(tmp_path, patients=10, seed=0).planted
    single = ("bmi_outliers", "height_outliers", "weight_outliers", "orphan_rows")
    assert all(planted[defect] >= 1 for defect in (*single, "patients_above_89"))


def test_cleaning_finds_what_was_written(source: Source) -> None:
    _, manifest, found = source
    expected = dict(manifest.expected)
    rows = expected.pop("rows")
    lengths = expected.pop("drugs_per_sample")
    assert {name: rows[name] for name in found.counts["rows"]} == dict(found.counts["rows"])
    assert dict(found.counts["drugs_per_sample"]) == pytest.approx(lengths, abs=1e-4)
    assert {name: found.counts[name] for name in expected} == expected
    assert found.source == manifest.source == "synthetic"


def test_dropped_rows_are_the_planted_ones(source: Source) -> None:
    _, manifest, found = source
    planted, dropped = manifest.planted, found.counts["dropped"]
    assert dropped["diagnoses_icd.duplicate"] == planted["duplicate_diagnosis_rows"]
    assert dropped["prescriptions.unknown_admission"] == planted["orphan_rows"]
    assert dropped["prescriptions.flush"] == manifest.expected["flush_rows"]
    assert dropped["omr.outlier_height"] == planted["height_outliers"]
    without_list = planted["stays_without_orders"] + planted["stays_with_only_flushes"]
    without_samples = dropped["admissions.no_drugs"] + dropped["admissions.no_diagnoses"]
    assert without_samples == without_list + planted["stays_without_diagnoses"]


def test_no_defect_reaches_a_sample(source: Source) -> None:
    _, _, found = source
    for one in found.admissions:
        folded = [" ".join(drug.casefold().split()) for drug in one.drugs]
        assert len(set(folded)) == len(folded)
        assert not any("flush" in drug or drug in ("bag", "sw") for drug in folded)
        assert len(set(one.diagnosis_codes)) == len(one.diagnosis_codes)
        assert one.height_cm is None or 120 < one.height_cm < 220
        assert one.weight_kg is None or 25 < one.weight_kg < 250
        assert one.bmi is None or 10 < one.bmi < 80
    assert any(one.age > 89 for one in found.admissions)


def test_titles_of_clashing_codes_are_told_apart_by_version(source: Source) -> None:
    folder, manifest, found = source
    titles = defaultdict(set)
    for one in found.admissions:
        for code, title in zip(one.diagnosis_codes, one.diagnoses, strict=True):
            titles[code].add(title)
    assert all(len(seen) == 1 for seen in titles.values())
    clashing = [code for code in titles if code.split(":")[1] in ("V420", "V707")]
    assert clashing
    # A join on the code alone would make as many rows too many as there are clashing rows.
    meanings = Counter(row["icd_code"] for row in table(folder, "hosp/d_icd_diagnoses"))
    naive = sum(meanings[row["icd_code"]] for row in table(folder, "hosp/diagnoses_icd"))
    surplus = naive - found.counts["diagnosis_rows_joined"]
    assert surplus == manifest.planted["clashing_code_rows"]


def test_leading_zeros_survive(source: Source) -> None:
    folder, manifest, found = source
    zeros = [row for row in table(folder, "hosp/diagnoses_icd") if row["icd_code"].startswith("0")]
    assert len(zeros) == manifest.planted["leading_zero_rows"]
    kept = {one.admission: one.diagnosis_codes for one in found.admissions}
    for row in zeros:
        stay = int(row["hadm_id"])
        assert stay not in kept or f"9:{row['icd_code']}" in kept[stay]


def test_no_measure_comes_from_the_future(source: Source) -> None:
    folder, _, found = source
    admitted = {int(r["hadm_id"]): r["admittime"][:10] for r in table(folder, "hosp/admissions")}
    days = defaultdict(list)
    for row in table(folder, "hosp/omr"):
        if row["result_name"] == "Height (Inches)" and row["result_value"] != "5":
            days[int(row["subject_id"])].append(row["chartdate"])
    late = 0
    for one in found.admissions:
        day = admitted[one.admission]
        known = any(measured <= day for measured in days[one.patient])
        assert known == (one.height_cm is not None)
        late += bool(days[one.patient]) and not known
    assert late > 0


def test_drugs_come_in_the_order_of_their_first_start(source: Source) -> None:
    folder, _, found = source
    starts: dict[tuple[int, str], str] = {}
    for row in table(folder, "hosp/prescriptions"):
        key = (int(row["hadm_id"]), " ".join(row["drug"].casefold().split()))
        if row["drug_type"] == "MAIN":
            starts[key] = min(starts.get(key, "9"), row["starttime"])
    for one in found.admissions:
        order = [starts[one.admission, " ".join(drug.casefold().split())] for drug in one.drugs]
        assert order == sorted(order)
