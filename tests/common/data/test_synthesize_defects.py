"""Every cleaning rule against the planted defects, without the demo.

Two programs meet here: plain loops over the rows count what was planted and what must come out,
and the cleaning counts what it finds in the tables.
"""

import csv
import datetime
import gzip
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from common.config import DataConfig
from common.data.prepare import load_samples
from common.data.samples import SampleTable
from common.data.synthetic.catalogue import DRUGS, FLUSHES
from common.data.synthetic.write import HEADERS, write_tables

MAIN_KINDS = ("MAIN", "BASE", "ADDITIVE")
SPELLINGS = {*DRUGS, *(drug.name for drug in FLUSHES)}
LIMITS = {
    "height": ("Height (Inches)", 36, 96),
    "weight": ("Weight (Lbs)", 40, 1200),
    "bmi": ("BMI (kg/m2)", 8, 200),
}
DAYS_BEFORE = datetime.timedelta(days=60)


def table(folder: Path, name: str) -> list[dict[str, str]]:
    with gzip.open(folder / f"{name}.csv.gz", "rt", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def folded(name: str) -> str:
    return " ".join(name.casefold().split())


class Counted:
    """What stands in the tables, and what a correct cleaning must make of it, row by row."""

    def __init__(self, folder: Path) -> None:
        names = [name.split("/")[1] for name in HEADERS]
        self.tables = {n: table(folder, name) for n, name in zip(names, HEADERS, strict=True)}
        self.stays = {row["hadm_id"]: row for row in self.tables["admissions"]}
        self.lines: dict[str, list[str]] = defaultdict(list)
        for row in self.tables["prescriptions"]:
            if row["drug_type"] == "MAIN" and row["hadm_id"] in self.stays:
                self.lines[row["hadm_id"]].append(row["drug"])
        self.drugs = {
            stay: {folded(name) for name in lines if "Flush" not in name}
            for stay, lines in self.lines.items()
        }
        self.coded = {row["hadm_id"] for row in self.tables["diagnoses_icd"]}
        self.samples = [stay for stay in self.stays if stay in self.coded and self.drugs.get(stay)]
        self.days: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        self.outliers = Counter(dict.fromkeys(LIMITS, 0))
        for row in self.tables["omr"]:
            for kind, (name, low, high) in LIMITS.items():
                if row["result_name"] == name and low <= float(row["result_value"]) <= high:
                    self.days[row["subject_id"]][kind].append(row["chartdate"])
                elif row["result_name"] == name:
                    self.outliers[kind] += 1

    def planted(self) -> dict[str, int]:
        """Count each defect."""
        coded, ordered = self.tables["diagnoses_icd"], self.tables["prescriptions"]
        versions = Counter(row["icd_code"] for row in self.tables["d_icd_diagnoses"])
        main = [row for row in ordered if row["drug_type"] == "MAIN"]
        return {
            **{f"{kind}_outliers": number for kind, number in self.outliers.items()},
            "clashing_code_rows": sum(versions[row["icd_code"]] > 1 for row in coded),
            "duplicate_diagnosis_rows": len(coded) - len({tuple(row.values()) for row in coded}),
            "duplicate_prescription_rows": len(main) - len({tuple(r.values()) for r in main}),
            "leading_zero_rows": sum(row["icd_code"].startswith("0") for row in coded),
            "measures_after_admission": sum(
                self.is_late(subject, day)
                for subject, kinds in self.days.items()
                for day in {day for days in kinds.values() for day in days}
            ),
            "orphan_rows": sum(row["hadm_id"] not in self.stays for row in main),
            "patients_above_89": sum(r["anchor_age"] == "91" for r in self.tables["patients"]),
            "spelling_variant_rows": sum(row["drug"] not in SPELLINGS for row in main),
            "stays_with_only_flushes": sum(not drugs for drugs in self.drugs.values()),
            "stays_without_diagnoses": len(self.stays.keys() - self.coded),
            "stays_without_orders": len(self.stays.keys() - self.lines.keys()),
        }

    def is_late(self, subject: str, day: str) -> bool:
        """Tell whether no admission of the patient follows a measure within sixty days."""
        measured = datetime.date.fromisoformat(day)
        admitted = [
            datetime.date.fromisoformat(row["admittime"][:10])
            for row in self.stays.values()
            if row["subject_id"] == subject
        ]
        return not any(measured <= one <= measured + DAYS_BEFORE for one in admitted)

    def known(self, stay: str, kind: str) -> bool:
        """Tell whether a measure was taken on or before the day of admission."""
        row = self.stays[stay]
        return any(d <= row["admittime"][:10] for d in self.days[row["subject_id"]][kind])

    def expected(self) -> dict[str, Any]:
        """Return the counts of ``fedrx data describe``."""
        anchors = {row["subject_id"]: row for row in self.tables["patients"]}
        ages = {
            stay: int(anchors[row["subject_id"]]["anchor_age"])
            + int(row["admittime"][:4])
            - int(anchors[row["subject_id"]]["anchor_year"])
            for stay, row in self.stays.items()
        }
        kinds = Counter(row["drug_type"] for row in self.tables["prescriptions"])
        lengths = [len(self.drugs[stay]) for stay in self.samples]
        tall = {stay for stay in self.samples if self.known(stay, "height")}
        heavy = {stay for stay in self.samples if self.known(stay, "weight")}
        return {
            "drug_type": {kind: kinds[kind] for kind in MAIN_KINDS},
            "pairs_raw": sum(len(set(lines)) for lines in self.lines.values()),
            "pairs_normalised": sum(len(set(map(folded, x))) for x in self.lines.values()),
            "pairs_clean": sum(map(len, self.drugs.values())),
            "names_clean": len(set().union(*self.drugs.values())),
            "flush_rows": sum("Flush" in name for x in self.lines.values() for name in x),
            "samples": len(self.samples),
            "patients": len({self.stays[stay]["subject_id"] for stay in self.samples}),
            "drugs_per_sample": {
                "mean": sum(lengths) / len(lengths),
                "min": min(lengths),
                "max": max(lengths),
            },
            "diagnosis_rows_joined": len(self.tables["diagnoses_icd"]),
            "diagnosis_rows_unmatched": 0,
            "age_differs_from_anchor": sum(
                age != int(anchors[self.stays[stay]["subject_id"]]["anchor_age"])
                for stay, age in ages.items()
            ),
            "age_over_89": sum(age > 89 for age in ages.values()),
            "height": len(tall),
            "weight": len(heavy),
            "height_and_weight": len(tall & heavy),
            "no_height_no_weight": len(set(self.samples) - tall - heavy),
            "outliers": dict(self.outliers),
        }


Source = tuple[Path, Counted, SampleTable]


@pytest.fixture(scope="module", params=[0, 1, 2])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("tables")
    write_tables(folder, patients=240, seed=request.param)
    cache = tmp_path_factory.mktemp("cache")
    return folder, Counted(folder), load_samples(DataConfig(path=str(folder)), cache_dir=cache)


def test_every_defect_is_planted(source: Source) -> None:
    planted = source[1].planted()
    assert [defect for defect, number in planted.items() if number < 1] == []


def test_the_smallest_source_has_the_single_defects(tmp_path: Path) -> None:
    write_tables(tmp_path, patients=10, seed=0)
    planted = Counted(tmp_path).planted()
    single = ("bmi_outliers", "height_outliers", "weight_outliers", "orphan_rows")
    assert all(planted[defect] >= 1 for defect in (*single, "patients_above_89"))


def test_cleaning_finds_what_was_written(source: Source) -> None:
    _, counted, found = source
    counts, expected = found.counts.as_json(), counted.expected()
    rows = {name: len(rows) for name, rows in counted.tables.items() if name != "icustays"}
    assert counts["rows"] == rows
    lengths = expected.pop("drugs_per_sample")
    assert counts["drugs_per_sample"] == pytest.approx(lengths, abs=1e-9)
    assert {name: counts[name] for name in expected} == expected
    assert found.source == "synthetic"


def test_dropped_rows_are_the_planted_ones(source: Source) -> None:
    _, counted, found = source
    planted, dropped = counted.planted(), found.counts.dropped
    assert dropped["diagnoses_icd.duplicate"] == planted["duplicate_diagnosis_rows"]
    assert dropped["prescriptions.unknown_admission"] == planted["orphan_rows"]
    assert dropped["prescriptions.flush"] == counted.expected()["flush_rows"]
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
    folder, counted, found = source
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
    surplus = naive - found.counts.as_json()["diagnosis_rows_joined"]
    assert surplus == counted.planted()["clashing_code_rows"]


def test_leading_zeros_survive(source: Source) -> None:
    folder, counted, found = source
    zeros = [row for row in table(folder, "hosp/diagnoses_icd") if row["icd_code"].startswith("0")]
    assert len(zeros) == counted.planted()["leading_zero_rows"]
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
