"""``first-24h``: whatever happens after hour 24 of a stay, its prompt stays as it is, to the byte.

The stay in question is a patient's second of three; everything that can be known of it, of the
third and of somebody else after the hour is drawn anew for each example.
"""

from datetime import datetime, timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.data.mimic.admissions import prepare_tables
from common.data.prepare import sample_table
from common.data.protocols import known_items
from common.text.prompts import messages

CAME = datetime(2150, 2, 1, 10)
HOUR_24 = CAME + timedelta(hours=24)
STAY, BEFORE, NEXT, OTHER = 12, 11, 13, 21
TITLES = {("I10", 10): "Hypertension", ("4019", 9): "Old hypertension", ("J18", 10): "Pneumonia"}
DRUGS = ["Heparin", "HEPARIN", " Aspirin", "Insulin", "Senna", "Heparin Flush"]

seconds = st.integers(0, 10**7).map(lambda number: timedelta(seconds=number))
later = seconds.map(lambda after: HOUR_24 + after)
codes = st.lists(st.sampled_from(sorted(TITLES)), min_size=1, max_size=3, unique=True)
orders = st.lists(st.tuples(later, st.sampled_from(DRUGS)), max_size=6)
values = st.floats(-1e6, 1e6).map(lambda value: f"{value:.3g}")
results = st.lists(
    st.tuples(
        st.integers(1, 3),
        later.flatmap(lambda stored: st.tuples(st.sampled_from([stored, CAME]), st.just(stored))),
        values,
        st.sampled_from(["", "abnormal"]),
    ),
    max_size=6,
)
futures = st.fixed_dictionaries(
    {
        "ended": later,
        "codes": codes,
        "orders": orders,
        "results": results,
        "services": st.lists(st.tuples(later, st.sampled_from(["MED", "SURG"])), max_size=3),
        "next_came": later,
        "next_codes": codes,
        "next_orders": orders,
        "weight": st.integers(60, 400),
        "other_codes": codes,
        "other_orders": orders,
        "turn": st.booleans(),
    }
)
PLAIN = {
    "ended": HOUR_24,
    "codes": [("I10", 10)],
    "orders": [],
    "results": [],
    "services": [],
    "next_came": HOUR_24,
    "next_codes": [("I10", 10)],
    "next_orders": [],
    "weight": 100,
    "other_codes": [("I10", 10)],
    "other_orders": [],
    "turn": False,
}


def diagnoses(stay, found):
    return [
        {"hadm_id": stay, "seq_num": number, "icd_code": code, "icd_version": version}
        for number, (code, version) in enumerate(found, 1)
    ]


def prescribed(stay, found):
    return [
        {"hadm_id": stay, "starttime": start, "drug_type": "MAIN", "drug": drug}
        for start, drug in found
    ]


def tables(future, early_drug="Heparin"):
    patient = {"gender": "F", "anchor_age": 60, "anchor_year": 2150}
    stays = [
        (1, BEFORE, datetime(2150, 1, 1), datetime(2150, 1, 9)),
        (1, STAY, CAME, future["ended"]),
        (1, NEXT, future["next_came"], future["next_came"] + timedelta(days=3)),
        (2, OTHER, HOUR_24, HOUR_24 + timedelta(days=3)),
    ]
    found = {
        "patients": [{"subject_id": 1, **patient}, {"subject_id": 2, **patient}],
        "admissions": [
            {"subject_id": subject, "hadm_id": stay, "admittime": came, "dischtime": went,
             "admission_type": "URGENT"}
            for subject, stay, came, went in stays
        ],
        "d_icd_diagnoses": [
            {"icd_code": code, "icd_version": version, "long_title": title}
            for (code, version), title in TITLES.items()
        ],
        "diagnoses_icd": [
            *diagnoses(BEFORE, [("J18", 10)]),
            *diagnoses(STAY, future["codes"]),
            *diagnoses(NEXT, future["next_codes"]),
            *diagnoses(OTHER, future["other_codes"]),
        ],
        "prescriptions": [
            *prescribed(STAY, [(CAME, early_drug), (HOUR_24 - timedelta(seconds=1), "Senna")]),
            *prescribed(STAY, [(HOUR_24, "What comes"), *future["orders"]]),
            *prescribed(NEXT, future["next_orders"]),
            *prescribed(OTHER, future["other_orders"]),
        ],
        "labevents": [
            {"hadm_id": STAY, "itemid": item, "charttime": drawn, "storetime": stored,
             "valuenum": value, "valueuom": "mg/dL", "flag": flag}
            for item, (drawn, stored), value, flag in [
                (1, (CAME, CAME), "4.5", "abnormal"),
                (2, (CAME, HOUR_24 - timedelta(seconds=1)), "7", ""),
                *future["results"],
            ]
        ],
        "d_labitems": [
            {"itemid": item, "label": label, "fluid": "Blood"}
            for item, label in ((1, "Potassium"), (2, "Lactate"), (3, "Glucose"))
        ],
        "services": [
            {"hadm_id": STAY, "transfertime": time, "curr_service": service}
            for time, service in [(CAME, "MED"), *future["services"]]
        ],
        "transfers": [
            {"hadm_id": STAY, "eventtype": "admit", "careunit": "Ward", "intime": CAME},
        ],
        "omr": [
            {"subject_id": 1, "chartdate": day, "seq_num": 1, "result_name": "Weight (Lbs)",
             "result_value": weight}
            for day, weight in (("2150-01-15", 150), ("2150-02-02", future["weight"]))
        ],
    }  # fmt: skip
    return {name: rows[::-1] if future["turn"] else rows for name, rows in found.items()}


@pytest.fixture
def asked(write_tables):
    """Return prompt and features of the stay, and what is to be listed."""

    def read(future, **early):
        folder = write_tables(**tables(future, **early), suffix=".csv")
        table = sample_table(
            prepare_tables(folder, protocol="first-24h"), source="synthetic", file_hashes={}
        )
        (one,) = (one for one in table.admissions if one.admission == STAY)
        return messages(one), list(known_items(one)), one.drugs

    return read


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(future=futures)
def test_nothing_after_hour_24_is_in_the_prompt(asked, future):
    prompt, features, _ = asked(PLAIN)
    assert asked(future)[:2] == (prompt, features)


def test_what_is_known_at_the_hour_is_in_the_prompt(asked):
    (_, user), _, drugs = asked(PLAIN)
    assert user["content"] == (
        "Sex: F\nAge: 60\nHeight: unknown\nWeight: 68 kg\nBMI: unknown\n"
        "Last visit:\nDiagnoses:\n- Pneumonia\n"
        "This visit:\nAdmission type: URGENT\nServices:\n- MED\n"
        "Laboratory results of the first 24 hours:\n"
        "- Potassium: 4.5 mg/dL, abnormal\n- Lactate: 7 mg/dL\n"
        "Drugs ordered in the first 24 hours:\n- Heparin\n- Senna"
    )
    assert drugs == ("What comes",)


def test_a_change_before_the_hour_is_seen(asked):
    assert asked(PLAIN, early_drug="Insulin")[0] != asked(PLAIN)[0]
