"""Protocols on tables small enough to count by hand, and on data that cannot serve them."""

import pytest

from common.config import (
    Config,
    DataConfig,
    FederationConfig,
    PartitionConfig,
    PrivacyConfig,
    TextConfig,
)
from common.data.dataset import open_hospitals
from common.data.partition import assign_hospitals
from common.data.prepare import load_samples
from common.errors import UserError
from common.privacy.settings import plan_of

PATIENTS = [
    {"subject_id": 1, "gender": "F", "anchor_age": 60, "anchor_year": 2150,
     "anchor_year_group": "2008 - 2010"},
    {"subject_id": 2, "gender": "M", "anchor_age": 40, "anchor_year": 2150,
     "anchor_year_group": "2008 - 2010"},
]  # fmt: skip
STAYS = [
    (1, 11, "2150-01-01 10:00:00", "2150-01-05 10:00:00"),
    (1, 12, "2150-02-01 10:00:00", "2150-03-01 10:00:00"),
    (1, 13, "2150-02-10 10:00:00", "2150-02-20 10:00:00"),  # begins before 12 has ended
    (2, 21, "2150-01-01 00:00:00", "2150-01-09 00:00:00"),
]
ORDERS = [
    (11, "2150-01-02 09:59:59", "Early"),
    (11, "2150-01-02 10:00:00", "On the hour"),
    (11, "2149-12-31 10:00:00", "Before"),
    (11, "2150-01-03 00:00:00", "EARLY"),
    (11, "2150-01-03 00:00:00", "Late"),
    (12, "2150-02-01 11:00:00", "Early"),
    (12, "2150-02-09 11:00:00", "Late"),
    (13, "2150-02-15 11:00:00", "Late"),
    (13, "", "No time"),
    (21, "2150-01-02 11:00:00", "Late"),
]
LABS = [
    (11, 1, "2150-01-01 12:00:00", "2150-01-01 13:00:00", "140", ""),
    (11, 1, "2150-01-02 09:00:00", "2150-01-02 09:30:00", "128.5", "abnormal"),
    (11, 1, "2150-01-02 09:30:00", "2150-01-02 10:00:00", "999", ""),  # stored on the hour
    (11, 2, "2150-01-02 09:20:00", "", "6.0", ""),  # later, but not flagged
    (11, 3, "2150-01-01 11:00:00", "", "___", ""),
    (11, 9, "2150-01-01 11:00:00", "", "1", ""),
    ("", 1, "2150-01-01 11:00:00", "", "1", ""),
    (99, 1, "2150-01-01 11:00:00", "", "1", ""),
    (12, 1, "2150-02-02 10:00:00", "2150-02-02 10:00:00", "5", ""),
]


def tables(**changed):
    return {
        "patients": PATIENTS,
        "admissions": [
            {"subject_id": subject, "hadm_id": hadm, "admittime": came, "dischtime": went,
             "admission_type": "URGENT", "insurance": "Other"}
            for subject, hadm, came, went in STAYS
        ],
        "diagnoses_icd": [
            {"hadm_id": hadm, "seq_num": 1, "icd_code": "I10", "icd_version": 10}
            for _, hadm, _, _ in STAYS
        ] + [{"hadm_id": 12, "seq_num": 2, "icd_code": "4019", "icd_version": 9}],
        "prescriptions": [
            {"hadm_id": hadm, "starttime": start, "drug_type": "MAIN", "drug": drug}
            for hadm, start, drug in ORDERS
        ],
        "procedures_icd": [
            {"hadm_id": 11, "seq_num": 2, "icd_code": "0040", "icd_version": 9},
            {"hadm_id": 11, "seq_num": 1, "icd_code": "0039", "icd_version": 9},
        ],
        "d_icd_procedures": [
            {"icd_code": "0039", "icd_version": 9, "long_title": "Surgery"},
            {"icd_code": "0040", "icd_version": 9, "long_title": "Stent"},
        ],
        "labevents": [
            {"hadm_id": hadm, "itemid": item, "charttime": drawn, "storetime": stored,
             "value": value, "valuenum": value if value != "___" else "", "valueuom": "mEq/L",
             "flag": flag}
            for hadm, item, drawn, stored, value, flag in LABS
        ],
        "d_labitems": [
            {"itemid": 1, "label": "Sodium", "fluid": "Blood"},
            {"itemid": 2, "label": "pH", "fluid": "Urine"},
            {"itemid": 3, "label": "Colour", "fluid": "Urine"},
        ],
        "services": [
            {"hadm_id": 11, "transfertime": "2150-01-01 10:00:00", "curr_service": "MED"},
            {"hadm_id": 11, "transfertime": "2150-01-02 10:00:00", "curr_service": "SURG"},
            {"hadm_id": 11, "transfertime": "2150-01-01 12:00:00", "curr_service": "OMED"},
        ],
        **changed,
    }  # fmt: skip


@pytest.fixture
def load(write_tables, tmp_path):
    def read(protocol, *, folder=None, **changed):
        folder = folder or write_tables(**tables(**changed))
        data = DataConfig(path=str(folder), protocol=protocol)
        return load_samples(data, cache_dir=tmp_path / "cache")

    return read


def by_stay(table):
    return {one.admission: one for one in table.admissions}


def test_visits_by_hand(load):
    table = load("visits")
    found = by_stay(table)
    assert list(found) == [11, 12, 13]
    assert [len(one.earlier) for one in table.admissions] == [0, 1, 2]
    assert found[11].procedures == ("Surgery", "Stent")
    assert found[12].earlier[0].procedures == ("Surgery", "Stent")
    assert found[12].earlier[0].drugs == ("Before", "Early", "On the hour", "Late")
    assert found[12].earlier[0].drugs == found[11].drugs
    assert found[13].earlier[1].diagnosis_codes == ("10:I10", "9:4019")
    assert table.counts.dropped["admissions.only_visit"] == 1


def test_first_24h_by_hand(load):
    table = load("first-24h")
    found = by_stay(table)
    assert found[11].ordered == ("Before", "Early")
    assert found[11].drugs == ("On the hour", "Late")
    assert found[11].services == ("MED", "OMED")
    assert found[11].labs == ("Sodium: 128.5 mEq/L, abnormal", "pH (Urine): 6 mEq/L")
    assert found[11].earlier == ()
    # A stay that has not ended is not coded yet.
    assert [visit.diagnosis_codes for visit in found[12].earlier] == [("10:I10",)]
    assert [visit.diagnosis_codes for visit in found[13].earlier] == [("10:I10",)]
    assert found[12].labs == ()
    assert found[13].drugs == ("Late",)
    counts = table.counts
    assert counts.protocol.counted["order_rows"] == 10
    assert counts.protocol.counted["order_rows_before_admission"] == 1
    assert counts.dropped["prescriptions.no_start"] == 1
    reasons = {key: n for key, n in counts.dropped.items() if key.startswith("labevents.") and n}
    assert reasons == {
        "labevents.no_admission": 1,
        "labevents.unknown_admission": 1,
        "labevents.after_24_hours": 1,
        "labevents.stored_later": 1,
        "labevents.no_number": 1,
        "labevents.unknown_item": 1,
        "labevents.replaced": 1,
    }


def stays(*changed):
    """Return the admissions with some of them changed."""
    new = {row[1]: row for row in changed}
    rows = [new.get(row[1], row) for row in STAYS]
    return [
        {"subject_id": subject, "hadm_id": hadm, "admittime": came, "dischtime": went}
        for subject, hadm, came, went in rows
    ]


def test_a_stay_that_ends_before_it_begins_shows_nobody_its_diagnoses(load):
    """MIMIC-IV has such: its own discharge diagnoses would be in its prompt, and in an earlier."""
    own = stays((1, 11, "2150-01-01 10:00:00", "2150-01-01 09:00:00"))
    found = by_stay(load("first-24h", admissions=own))
    assert found[11].earlier == found[12].earlier == ()
    later = stays((1, 13, "2150-02-10 10:00:00", "2150-01-20 10:00:00"))
    found = by_stay(load("first-24h", admissions=later))
    assert [visit.diagnosis_codes for visit in found[12].earlier] == [("10:I10",)]


def test_of_two_visits_that_begin_at_once_neither_is_the_earlier(load):
    found = by_stay(load("visits", admissions=stays((1, 13, STAYS[1][2], STAYS[2][3]))))
    assert [len(found[stay].earlier) for stay in (11, 12, 13)] == [0, 1, 1]


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("labevents", "charttime"),
        ("labevents", "storetime"),
        ("prescriptions", "starttime"),
        ("services", "transfertime"),
        ("admissions", "dischtime"),
        ("admissions", "admittime"),
    ],
)
def test_a_date_does_not_tell_what_was_known_at_an_hour(load, name, column):
    rows = tables()[name]
    rows[-1][column] = "2150-01-02"
    with pytest.raises(UserError, match=f"{name}.*1 cells of column {column} are no time"):
        load("first-24h", **{name: rows})
    assert load("visits", **{name: rows}).admissions


def test_a_sample_does_not_need_what_is_coded_at_discharge(load):
    rows = [row for row in tables()["diagnoses_icd"] if row["hadm_id"] != 21]
    assert 21 in by_stay(load("first-24h", diagnoses_icd=rows))
    assert 21 not in by_stay(load("admission", diagnoses_icd=rows))


@pytest.mark.parametrize(
    ("protocol", "gone", "absent"),
    [
        ("visits", ("procedures_icd",), ("procedures_icd",)),
        ("visits", ("procedures_icd", "d_icd_procedures"), ("procedures_icd", "d_icd_procedures")),
        ("first-24h", ("labevents", "d_labitems"), ("labevents", "d_labitems")),
        ("first-24h", ("services",), ("services",)),
    ],
)
def test_an_absent_table_is_told_and_no_error(load, protocol, gone, absent):
    table = load(protocol, **dict.fromkeys(gone))
    assert set(absent) <= set(table.counts.protocol.absent)
    whole = by_stay(load(protocol))
    for one in table.admissions:
        assert one.drugs == whole[one.admission].drugs


def test_protocols_do_not_share_a_cache_entry(load, write_tables):
    # Without optional tables all read the same files.
    absent = dict.fromkeys(("procedures_icd", "d_icd_procedures", "labevents", "d_labitems"))
    folder = write_tables(**tables(**absent))
    digests = {load(name, folder=folder).digest for name in ("admission", "visits", "first-24h")}
    again = {load(name, folder=folder).digest for name in ("admission", "visits", "first-24h")}
    assert len(digests) == 3
    assert digests == again


def test_the_usual_protocol_reads_no_table_of_another(load):
    table = load("admission")
    assert not [name for name in table.file_hashes if "lab" in name or "procedures" in name]
    assert {one.protocol for one in table.admissions} == {"admission"}


def test_patients_with_one_stay_alone_are_one_line(load):
    alone = {
        name: [row for row in tables()[name] if row["hadm_id"] == 21]
        for name in ("admissions", "diagnoses_icd", "prescriptions")
    }
    with pytest.raises(UserError, match="no samples .* one patient with two such") as caught:
        load("visits", **alone, procedures_icd=None, services=None)
    assert "\n" not in str(caught.value)


def test_orders_of_the_first_hours_alone_are_one_line(load):
    with pytest.raises(UserError, match="no samples .* ordered after 24 hours and not") as caught:
        load("first-24h", prescriptions=tables()["prescriptions"][:1])
    assert "\n" not in str(caught.value)


def test_a_table_without_discharges_is_one_line(load, write_tables):
    folder = write_tables(**tables(), suffix=".csv")
    path = folder / "hosp" / "admissions.csv"
    path.write_text(path.read_text().replace("dischtime", "other"))
    with pytest.raises(UserError, match="lacks column dischtime"):
        load("first-24h", folder=folder)
    assert load("visits", folder=folder).admissions


def test_a_laboratory_table_with_torn_times_is_one_line(load):
    rows = tables()["labevents"]
    rows[0]["charttime"] = "yesterday"
    with pytest.raises(UserError, match="labevents.*1 cells of column charttime are no time"):
        load("first-24h", labevents=rows)


@pytest.mark.parametrize("protocol", ["visits", "first-24h"])
def test_eicu_serves_the_usual_protocol_alone(tmp_path, protocol):
    (tmp_path / "patient.csv").write_text("a\n")
    with pytest.raises(UserError, match="eICU's tables, which tell neither") as caught:
        load_samples(DataConfig(path=str(tmp_path), protocol=protocol))
    assert caught.value.allowed == "admission"


def test_the_literatures_split_is_not_overruled_in_silence():
    with pytest.raises(UserError, match="test-fraction=0.4 with .*visits, which fixes"):
        assign_hospitals(
            (),
            PartitionConfig(),
            hospitals=1,
            data=DataConfig(protocol="visits", test_fraction=0.4),
        )


@pytest.mark.parametrize("protocol", ["visits", "first-24h"])
def test_a_template_of_the_users_has_no_place_for_a_past(protocol, tmp_path):
    text = TextConfig(template="Ill with\n{diagnoses}")
    with pytest.raises(UserError, match="text.template with data.protocol=.*has no place"):
        open_hospitals(Config(data=DataConfig(protocol=protocol), text=text), cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("protocol", ["visits", "first-24h"])
def test_one_admission_cannot_be_protected_where_later_prompts_hold_it(protocol):
    config = Config(
        data=DataConfig(protocol=protocol),
        privacy=PrivacyConfig(noise_multiplier=1.0, unit="admission"),
        federation=FederationConfig(local_steps=1),
    )
    with pytest.raises(UserError, match="prompts of the patient's later ones"):
        plan_of(config)
