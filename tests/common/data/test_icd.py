"""Search in titles: ranks, codes, free text; the public titles against MIMIC-IV's own table."""

import pytest

from common.config import DataConfig
from common.data.icd import Diagnosis, DiagnosisIndex, public_diagnoses
from common.data.mimic.source import MimicIV


def index(frequency=None):
    known = [
        ("10:I10", "Essential (primary) hypertension"),
        ("9:4019", "Unspecified essential hypertension"),
        ("10:I110", "Hypertensive heart disease with heart failure"),
        ("10:I509", "Heart failure, unspecified"),
        ("10:E119", "Type 2 diabetes mellitus without complications"),
    ]
    rows = [Diagnosis(code=code, title=title) for code, title in known]
    return DiagnosisIndex(rows, frequency=frequency or {}, origin="test")


def codes(found):
    return [diagnosis.code for diagnosis in found]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("heart fail", ["10:I110", "10:I509"]),
        ("FAILURE heart", ["10:I110", "10:I509"]),
        ("essential", ["10:I10", "9:4019"]),
        ("i10", ["10:I10"]),
        ("I11", ["10:I110"]),
        ("e11.9", ["10:E119"]),
        ("401.9", ["9:4019"]),
        ("2 diabetes", ["10:E119"]),
        ("art fail", []),
        ("", []),
        ("  ,.", []),
        ("(((", []),
    ],
)
def test_search(query, expected):
    assert codes(index().search(query)) == expected


def test_common_diagnoses_come_first_and_the_limit_holds():
    frequent = index({"10:I509": 7, "10:I110": 2})
    assert codes(frequent.search("heart")) == ["10:I509", "10:I110"]
    assert codes(frequent.search("heart", limit=1)) == ["10:I509"]


@pytest.mark.parametrize(
    ("text", "code", "title"),
    [
        ("e11.9", "10:E119", "Type 2 diabetes mellitus without complications"),
        ("9:4019", "9:4019", "Unspecified essential hypertension"),
        (" heart  failure, UNSPECIFIED", "10:I509", "Heart failure, unspecified"),
        (" lives  alone ", "", "lives alone"),
    ],
)
def test_what_a_person_writes(text, code, title):
    assert index().read(text) == Diagnosis(code=code, title=title)


@pytest.mark.slow
def test_the_public_titles_are_those_of_the_demos_dictionary(mimic_demo):
    """Editions differ by a few per cent of the codes; the titles of shared codes, by spellings."""
    official = {one.code: one.title for one in MimicIV().titles(mimic_demo, DataConfig())}
    public = public_diagnoses()
    shared = [one for one in public if one.code in official]
    assert len({one.code for one in public}) == len(public) > 70_000
    assert len(shared) > 0.95 * len(public)
    assert sum(official[one.code] == one.title for one in shared) > 0.98 * len(shared)
    assert len(official) == 109_775
