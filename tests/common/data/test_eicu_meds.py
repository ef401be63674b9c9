"""eICU in MEDS form: the samples are those of eICU's tables, but for what the form has lost."""

from dataclasses import replace

import polars as pl
import pytest
from eicu_fixtures import eicu_tables, write_eicu
from eicu_meds_fixtures import eicu_events, write_eicu_meds
from meds_fixtures import write_small

from common.config import DataConfig
from common.data.meds.codes import EICU, MIMIC_IV, read_codes
from common.data.meds.events import extraction_of
from common.data.prepare import load_samples
from common.data.sources import source_for, titles_of
from common.errors import UserError
from common.text.prompts import messages


def load(folder, cache, **settings):
    return load_samples(DataConfig(path=str(folder), **settings), cache_dir=cache)


def by_stay(table):
    return {one.admission: one for one in table.admissions}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The hand-made tables without what the extraction does not read: cancelled orders' mark."""
    place = tmp_path_factory.mktemp("both")
    tables = eicu_tables()
    tables["medication"] = [
        row for row in tables["medication"] if row["drugordercancelled"] == "No"
    ]
    csv = load(write_eicu(place / "csv", tables), place / "cache")
    meds = load(write_eicu_meds(place / "meds", eicu_events(tables)), place / "cache")
    return by_stay(csv), by_stay(meds), meds


def test_the_folder_is_recognised_and_mimics_is_not(tmp_path):
    folder = write_eicu_meds(tmp_path / "eicu")
    assert type(source_for(str(folder))).__name__ == "Meds"
    assert extraction_of(folder) == EICU
    assert extraction_of(write_small(tmp_path / "mimic")) == MIMIC_IV
    assert titles_of(DataConfig(path=str(folder))) == []


def test_the_samples_are_those_of_the_tables_but_for_what_is_lost(both):
    """Lost: whose stay it is, the kind of unit, and APACHE's reason for the admission."""
    csv, meds, _ = both
    assert meds.keys() == csv.keys() == {11, 12, 13, 14, 15, 17, 18}
    for stay, one in meds.items():
        other = csv[stay]
        assert one.patient == stay
        kept = [
            (title, code)
            for title, code in zip(other.diagnoses, other.diagnosis_codes, strict=True)
            if not code.startswith("apache:")
        ]
        assert list(zip(one.diagnoses, one.diagnosis_codes, strict=True)) == kept
        assert (one.drugs, one.sex, one.age, one.site) == (
            *(other.drugs, other.sex, other.age),
            other.site,
        )
        assert one.careunit == "unknown"
        if stay != 18:
            measured = (other.height_cm, other.weight_kg, other.bmi)
            assert (one.height_cm, one.weight_kg, one.bmi) == measured
    # The tables give stay 18 its patient's weight of the year before.
    assert (meds[18].weight_kg, csv[18].weight_kg) == (None, 80.5)


def test_prompts_are_the_tables_prompts(both):
    csv, meds, _ = both
    compared = 0
    for stay, one in meds.items():
        if stay == 18:
            continue
        other = csv[stay]
        bare = [n for n, code in enumerate(other.diagnosis_codes) if not code.startswith("apache")]
        told = replace(
            other,
            diagnoses=tuple(other.diagnoses[n] for n in bare),
            diagnosis_codes=tuple(other.diagnosis_codes[n] for n in bare),
        )
        assert messages(one) == messages(told)
        compared += 1
    assert compared == 6


def test_by_hand(both):
    _, meds, _ = both
    assert (meds[12].sex, meds[12].age, meds[12].site) == ("M", 90, "73")
    assert meds[12].drugs == ("PANTOPRAZOLE 40 MG", "NOREPINEPHRINE", "MEROPENEM 1 G")
    assert meds[12].weight_kg == 68, "of the first unit, not the second"
    assert meds[11].diagnosis_codes == ("10:A419", "10:J9600")
    assert meds[12].diagnosis_codes[-1] == "path:endocrine|glucose metabolism|diabetes mellitus"
    assert meds[13].weight_kg is None, "805 kg"
    assert meds[14].weight_kg is None, "7.21 kg"


def test_rows_in_are_rows_out_and_the_reasons(both):
    counts = both[2].counts
    for name, rows in counts.rows.items():
        reasons = sum(n for key, n in counts.dropped.items() if key.startswith(f"{name}."))
        assert rows == counts.rows_out[name] + reasons, name
    assert counts.rows["events"] == len(eicu_events()) - 2, "a cancelled order starts and stops"
    assert counts.dropped["admissions.duplicate"] == 1, "one stay has two units"
    assert counts.dropped["admissions.implausible_age"] == 1
    assert counts.dropped["drugs.unknown_admission"] == 1
    assert counts.dropped["drugs.flush"] == 1
    assert counts.dropped["drugs.empty_name"] == 1
    assert counts.dropped["diagnoses.unknown_admission"] == 1
    # Stop events, unit stays and the laboratory are not in use.
    stopped = sum(row["code"].startswith("MEDICATION//STOPPED") for row in eicu_events()) - 1
    assert counts.dropped["events.other_code"] == stopped + 9 + 1


def test_the_order_of_rows_changes_nothing(tmp_path):
    one = load(write_eicu_meds(tmp_path / "a"), tmp_path / "cache")
    turned = load(write_eicu_meds(tmp_path / "b", eicu_events()[::-1]), tmp_path / "cache")
    assert turned.admissions == one.admissions


def test_a_file_of_codes_may_name_the_extraction(tmp_path):
    """What it leaves out is eICU's."""
    codes = tmp_path / "codes.toml"
    codes.write_text('extraction = "eicu"\ndrug = "RX//"\n')
    assert read_codes(str(codes)) == EICU.model_copy(update={"drug": "RX//"})
    events = [
        {**row, "code": row["code"].replace("MEDICATION//STARTED//", "RX//")}
        for row in eicu_events()
    ]
    folder = write_eicu_meds(tmp_path / "renamed", events)
    plain = load(write_eicu_meds(tmp_path / "plain"), tmp_path / "cache")
    assert load(folder, tmp_path / "cache", meds_codes=str(codes)).admissions == plain.admissions


def event(start, /, **changed):
    return lambda row: {**row, **changed} if row["code"].startswith(start) else row


BAD_EVENTS = {
    "no time": (event("HOSPITAL_ADMISSION", time=None), "admissions have no time"),
    "no birth": (event("MEDS_BIRTH", code="BORN"), "belong to a subject with a birth"),
    "no drugs": (event("MEDICATION", code="DRUG"), "begins with MEDICATION//STARTED//"),
    "no diagnoses": (event("DIAGNOSIS", code="DX"), "begins with DIAGNOSIS//ICD//9//"),
    "no admission": (event("HOSPITAL_ADMISSION", code="A"), "begins with HOSPITAL_ADMISSION//"),
    "other subjects": (event("MEDICATION", subject_id=777), "drugs: "),
    "other diagnoses": (event("DIAGNOSIS", subject_id=777), "diagnoses: 15 of 15 rows"),
    "no names": (event("MEDICATION//STARTED", code="MEDICATION//STARTED//UNK"), "no samples"),
    "no ages": (event("MEDS_BIRTH", time=None), "no samples after cleaning"),
    "no words": (event("DIAGNOSIS", code="DIAGNOSIS//ICD//9//UNK", diagnosis_string=None), "no sa"),
}


@pytest.mark.parametrize("case", BAD_EVENTS)
def test_a_bad_event_is_one_line(tmp_path, case):
    change, line = BAD_EVENTS[case]
    folder = write_eicu_meds(tmp_path / "meds", [change(row) for row in eicu_events()])
    with pytest.raises(UserError) as raised:
        load(folder, tmp_path / "cache")
    assert line in str(raised.value)
    assert "\n" not in str(raised.value)
    assert raised.value.fix
    assert not any(cell in str(raised.value) for cell in ("VANCOMYCIN", "2014", "Sepsis"))
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


@pytest.mark.parametrize("protocol", ["visits", "first-24h"])
def test_other_protocols_are_refused(tmp_path, protocol):
    folder = write_eicu_meds(tmp_path / "meds")
    line = f"data.protocol={protocol} with eICU as MEDS.*; allowed: admission"
    with pytest.raises(UserError, match=line):
        load(folder, tmp_path / "cache", protocol=protocol)


def test_a_column_of_another_type_counts_as_empty(tmp_path):
    """Priorities as numbers: the order is that of time alone."""
    folder = write_eicu_meds(tmp_path / "meds")
    for path in (folder / "data").rglob("*.parquet"):
        table = pl.read_parquet(path).with_columns(diagnosis_priority=pl.lit(1))
        table.write_parquet(path)
    found = by_stay(load(folder, tmp_path / "cache"))
    assert found[11].diagnosis_codes == ("10:A419", "10:J9600")
