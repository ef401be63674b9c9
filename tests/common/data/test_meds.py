"""MEDS: the demo written as MEDS gives the csv tables' samples; small data sets written by hand."""

import pytest
from meds_fixtures import TITLES, small_events, when, write_meds, write_small

from common.config import DataConfig
from common.data.meds.codes import MIMIC_IV, Codes, read_codes
from common.data.prepare import load_samples
from common.data.sources import source_for, titles_of
from common.errors import UserError
from common.text.prompts import messages, render_answer

NOT_IN_MEDS = ("service", "anchor_year_group")
"""Attributes that no event of the extraction carries."""


def load(folder, cache, **settings):
    return load_samples(DataConfig(path=str(folder), **settings), cache_dir=cache)


def fields(one):
    return {
        name: getattr(one, name)
        for name in one.__slots__
        if name not in NOT_IN_MEDS and not name.startswith("_")
    }


@pytest.fixture(scope="module")
def tables(mimic_demo, tmp_path_factory):
    found = load(mimic_demo, tmp_path_factory.mktemp("cache"))
    return {one.admission: one for one in found.admissions}


def balanced(counts):
    for name, rows in counts.rows.items():
        reasons = sum(n for key, n in counts.dropped.items() if key.startswith(f"{name}."))
        assert rows == counts.rows_out[name] + reasons, name


def test_the_demo_as_meds_gives_the_samples_and_prompts_of_its_tables(mimic_demo, tables, tmp_path):
    found = load(write_meds(mimic_demo, tmp_path / "meds"), tmp_path / "cache")
    events = {one.admission: one for one in found.admissions}
    assert events.keys() == tables.keys()
    different = [stay for stay in tables if fields(events[stay]) != fields(tables[stay])]
    assert different == []
    for stay, one in events.items():
        assert messages(one) == messages(tables[stay])
        assert render_answer(one.drugs) == render_answer(tables[stay].drugs)
        assert (one.service, one.anchor_year_group) == ("unknown", "unknown")
    assert found.source == "credentialed"
    balanced(found.counts)
    kept = found.counts.rows_out
    assert (kept["diagnoses"], kept["drugs"], kept["measures"]) == (4506, 6934, 2090)


def test_the_released_extractions_form_differs_only_in_what_it_has_lost(
    mimic_demo, tables, tmp_path
):
    """No seq_num: diagnoses in another order. pharmacy's names, by time: other drugs."""
    found = load(write_meds(mimic_demo, tmp_path / "meds", whole=False), tmp_path / "cache")
    events = {one.admission: one for one in found.admissions}
    shared = events.keys() & tables.keys()
    assert len(shared) == 250
    lost = {"diagnoses", "diagnosis_codes", "drugs"}
    of_one_day = 0
    for stay in shared:
        one, other = fields(events[stay]), fields(tables[stay])
        assert sorted(one["diagnoses"]) == sorted(other["diagnoses"])
        unlike = {name for name in one if one[name] != other[name]} - lost
        # Measures that were taken twice on a day: which came last is lost too.
        assert unlike <= {"height_cm", "weight_kg", "bmi"}
        of_one_day += bool(unlike)
    assert of_one_day == 3
    common = [len(set(events[s].drugs) & set(tables[s].drugs)) for s in shared]
    either = [len(set(events[s].drugs) | set(tables[s].drugs)) for s in shared]
    assert sum(common) / sum(either) == pytest.approx(0.9, abs=0.01)
    balanced(found.counts)


def test_small_events_by_hand(tmp_path):
    found = load(write_small(tmp_path / "meds"), tmp_path / "cache")
    first, second, third = found.admissions
    assert (first.patient, first.admission, first.sex, first.age) == (1, 11, "F", 69)
    assert first.drugs == ("Insulin", "Furosemide")
    assert first.diagnoses == ("Heart failure, unspecified",)
    assert (first.height_cm, first.admission_type) == (162.6, "URGENT")
    # On the day of the birthday one year more; the hour of birth is midnight.
    assert (second.admission, second.age, second.drugs) == (12, 70, ("Lisinopril",))
    assert (third.patient, third.age, third.drugs) == (2, 100, ("Heparin",))
    assert third.diagnosis_codes == ("10:I509",)
    assert found.counts.dropped["events.other_code"] == 1
    assert found.counts.dropped["drugs.unknown_admission"] == 1, "ordered between two stays"
    balanced(found.counts)


def test_a_patients_admissions_without_numbers_are_told_apart_by_time(tmp_path):
    events = [{**row, "hadm_id": None} for row in small_events()]
    found = load(write_small(tmp_path / "meds", events), tmp_path / "cache")
    assert len({one.admission for one in found.admissions}) == 3
    assert [one.drugs for one in found.admissions] == [
        ("Insulin", "Furosemide"),
        ("Lisinopril",),
        ("Heparin",),
    ]


def test_events_without_a_time_are_counted_or_placed_by_their_number(tmp_path):
    untimed = ("MEDICATION//START//Insulin", "MEDICATION//START//Heparin", "Height")
    events = [
        {**row, "time": None} if row["code"].startswith(untimed) else row for row in small_events()
    ]
    found = load(write_small(tmp_path / "meds", events), tmp_path / "cache")
    assert [one.drugs for one in found.admissions] == [
        ("Furosemide",),
        ("Lisinopril",),
        ("Heparin",),
    ]
    assert found.counts.dropped["drugs.unknown_admission"] == 2
    assert found.counts.dropped["measures.no_time"] == 1
    balanced(found.counts)


def test_extra_orders_shards_and_chunks_change_nothing(tmp_path):
    one = load(write_small(tmp_path / "a"), tmp_path / "cache")
    turned = load(write_small(tmp_path / "b", small_events()[::-1]), tmp_path / "cache")
    assert turned.admissions == one.admissions


def test_sites_are_read_from_their_column(tmp_path):
    found = load(write_small(tmp_path / "meds", hospital_id="north"), tmp_path / "cache")
    assert {one.site for one in found.admissions} == {"north"}
    without = load(write_small(tmp_path / "other"), tmp_path / "cache")
    assert {one.site for one in without.admissions} == {"unknown"}
    assert all("north" not in str(messages(one)) for one in found.admissions)


def test_codes_of_another_extraction_are_told_by_a_file(tmp_path):
    new = {"HOSPITAL_ADMISSION": "VISIT", "DIAGNOSIS//ICD": "DX", "MEDICATION//START": "RX"}
    codes = tmp_path / "codes.toml"
    codes.write_text(
        'admission = "VISIT//"\ndiagnosis = "DX//"\ndrug = "RX//"\n'
        '[measures."HEIGHT_CM"]\nkind = "height"\nunit = "cm"\n'
    )

    def renamed(code):
        code = code.replace("Height (Inches)", "HEIGHT_CM")
        for old, name in new.items():
            code = code.replace(old, name)
        return code

    events = [{**row, "code": renamed(row["code"])} for row in small_events()]
    events[7]["text_value"] = "162.6"
    folder = write_small(tmp_path / "m", events, {renamed(c): t for c, t in TITLES.items()})
    config = DataConfig(path=str(folder), meds_codes=str(codes))
    found = load_samples(config, cache_dir=tmp_path / "cache")
    plain = load(write_small(tmp_path / "plain"), tmp_path / "cache")
    assert found.admissions == plain.admissions
    assert {one.code for one in titles_of(config)} == {"10:I509", "9:4019"}
    with pytest.raises(UserError, match="VISIT|HOSPITAL_ADMISSION|describes no code"):
        load(folder, tmp_path / "cache")


def test_the_shipped_codes_are_the_defaults():
    assert read_codes("") is MIMIC_IV
    assert Codes() == MIMIC_IV


def test_a_wrong_key_of_a_file_of_codes_names_the_right_ones(tmp_path):
    codes = tmp_path / "codes.toml"
    codes.write_text('admissions = "ADMIT//"\n')
    with pytest.raises(UserError, match="allowed: birth, sex, admission, .*; fix: mend the file"):
        read_codes(str(codes))


def shard(folder, number=0):
    return folder / "data" / f"{number}.parquet"


def without(folder, path):
    (folder / path).unlink()


def cut(folder, path):
    whole = (folder / path).read_bytes()
    (folder / path).write_bytes(whole[: len(whole) // 2])


def rewritten(folder, number, change):
    import polars as pl

    change(pl.read_parquet(shard(folder, number))).write_parquet(shard(folder, number))


BAD_FILES = {
    "no codes": (lambda f: without(f, "metadata/codes.parquet"), "metadata/codes.parquet is miss"),
    "no shard": (lambda f: [p.unlink() for p in f.glob("data/*")], "holds no parquet file"),
    "text": (lambda f: shard(f).write_text("subject_id,time"), "data/0.parquet is no parquet"),
    "torn": (lambda f: cut(f, "data/1.parquet"), "data/1.parquet is no parquet"),
    "torn codes": (lambda f: cut(f, "metadata/codes.parquet"), "codes.parquet is no parquet"),
    "column": (lambda f: rewritten(f, 0, lambda t: t.drop("code")), "lacks column code"),
    "text ids": (
        lambda f: rewritten(f, 0, lambda t: t.cast({"subject_id": str})),
        "column subject_id is String",
    ),
    "times of day": (
        lambda f: rewritten(f, 1, lambda t: t.with_columns(time=t["time"].dt.time())),
        "column time is Time",
    ),
    "lists of codes": (
        lambda f: rewritten(f, 1, lambda t: t.with_columns(code=t["code"].reshape((-1, 1)))),
        "column code is ",
    ),
    "text times": (lambda f: rewritten(f, 1, lambda t: t.cast({"time": str})), "time is String"),
    "text values": (
        lambda f: rewritten(f, 1, lambda t: t.with_columns(numeric_value=t["code"])),
        "column numeric_value is String",
    ),
    "no subject": (
        lambda f: rewritten(f, 0, lambda t: t.with_columns(subject_id=t["subject_id"].set(
            t["code"] == "GENDER//F", None))),
        "1 events have no subject_id",
    ),
    "two shards": (
        lambda f: rewritten(f, 1, lambda t: t.with_columns(subject_id=1)),
        "holds subjects of another shard",
    ),
}  # fmt: skip


def refusal(folder, cache, **settings):
    with pytest.raises(UserError) as raised:
        load(folder, cache, **settings)
    error = raised.value
    assert not [path for path in cache.rglob("*") if path.is_file()]
    assert "\n" not in str(error)
    assert error.fix
    assert not any(name in str(error) for name in ("Furosemide", "2020-03"))
    return str(error)


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_one_line(tmp_path, case):
    damage, line = BAD_FILES[case]
    folder = write_small(tmp_path / "meds")
    damage(folder)
    assert line in refusal(folder, tmp_path / "cache")


def test_the_folder_of_the_shards_is_not_the_data_set(tmp_path):
    folder = write_small(tmp_path / "meds")
    assert "no data/" in refusal(folder / "data", tmp_path / "cache")
    assert type(source_for(str(folder))).__name__ == "Meds"


def event(start, /, **changed):
    return lambda row: {**row, **changed} if row["code"].startswith(start) else row


BAD_EVENTS = {
    "no time": (event("HOSPITAL_ADMISSION//URGENT", time=None), "1 admissions have no time"),
    "one number": (event("HOSPITAL_ADMISSION", hadm_id=11), "repeat an admission"),
    "no birth": (event("MEDS_BIRTH", code="BORN"), "belong to a patient with a birth"),
    "other codes": (event("MEDICATION", code="DRUG"), "no event whose code begins with MEDICATION"),
    "no drugs in a stay": (event("MEDICATION", time=when("1999-01-01"), hadm_id=None), "drugs: "),
    "strange numbers": (event("DIAGNOSIS", hadm_id=7), "diagnoses: 3 of 3 rows belong to an"),
}


@pytest.mark.parametrize("case", BAD_EVENTS)
def test_a_bad_event_is_one_line(tmp_path, case):
    change, line = BAD_EVENTS[case]
    folder = write_small(tmp_path / "meds", [change(row) for row in small_events()])
    assert line in refusal(folder, tmp_path / "cache")


def test_diagnoses_without_titles_are_one_line(tmp_path):
    folder = write_small(tmp_path / "meds", titles=dict.fromkeys(TITLES))
    assert "describes no code that begins with DIAGNOSIS//ICD//" in refusal(
        folder, tmp_path / "cache"
    )


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (None, "cannot be read as toml"),
        ("admission = [", "cannot be read as toml"),
        ('drugs = "RX//"', "Extra inputs"),
        ('drug = ""', "drug is empty"),
        ('[measures.X]\nkind = "height"\nunit = "furlong"', "measures.X.unit"),
    ],
)
def test_a_bad_file_of_codes_is_one_line(tmp_path, content, line):
    codes = tmp_path / "codes.toml"
    if content is not None:
        codes.write_text(content)
    folder = write_small(tmp_path / "meds")
    assert line in refusal(folder, tmp_path / "cache", meds_codes=str(codes))


def test_changed_codes_read_anew(tmp_path):
    """The cache must not serve samples that another reading of the codes has made."""
    codes = tmp_path / "codes.toml"
    codes.write_text('drug = "MEDICATION//START//"')
    folder = write_small(tmp_path / "meds")
    one = load(folder, tmp_path / "cache", meds_codes=str(codes))
    codes.write_text('drug = "MEDICATION//"')
    other = load(folder, tmp_path / "cache", meds_codes=str(codes))
    assert one.admissions[0].drugs == ("Insulin", "Furosemide")
    assert other.admissions[0].drugs == ("START",)
