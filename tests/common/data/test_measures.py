"""Body measures: nothing from the future, nothing implausible, metric units."""

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data.mimic.admissions import prepare_tables
from common.data.prepare import sample_table

NAMES = {"height": "Height (Inches)", "weight": "Weight (Lbs)", "bmi": "BMI (kg/m2)"}


def measure(kind, date, value, seq=1, subject=1):
    return {
        "subject_id": subject,
        "chartdate": date,
        "seq_num": seq,
        "result_name": NAMES.get(kind, kind),
        "result_value": value,
    }


def first_sample(folder):
    prepared = prepare_tables(folder)
    table = sample_table(prepared, source="credentialed", file_hashes={})
    return table.admissions[0], prepared.counts.as_json()


def test_units_and_bmi(write_tables):
    rows = [measure("height", "2152-03-05", "70"), measure("weight", "2152-03-01", "154.5")]
    one, _ = first_sample(write_tables(omr=rows))
    assert one.height_cm == pytest.approx(70 * 2.54, abs=0.05)
    assert one.weight_kg == pytest.approx(154.5 / 2.2046226, abs=0.05)
    assert one.bmi == pytest.approx(70.08 / 1.778**2, abs=0.05)


def test_recorded_bmi_serves_where_it_cannot_be_computed(write_tables):
    rows = [measure("bmi", "2152-03-01", "31.4"), measure("weight", "2152-03-01", "200")]
    one, _ = first_sample(write_tables(omr=rows))
    assert (one.bmi, one.height_cm) == (31.4, None)


def test_the_day_of_admission_counts_and_the_day_after_does_not(write_tables):
    one, _ = first_sample(write_tables(omr=[measure("weight", "2152-03-05", "100")]))
    assert one.weight_kg == 45.4
    one, _ = first_sample(write_tables(omr=[measure("weight", "2152-03-06", "100")]))
    assert one.weight_kg is None


def test_last_of_a_day_and_nobody_elses(write_tables):
    rows = [
        measure("weight", "2152-03-01", "150", seq=2),
        measure("weight", "2152-03-01", "100", seq=1),
        measure("weight", "2152-03-04", "300", subject=2),
    ]
    one, _ = first_sample(write_tables(omr=rows))
    assert one.weight_kg == 68.0


def test_outliers_are_rejected_counted_and_replaced_by_older_values(write_tables):
    rows = [
        measure("height", "2152-03-01", "65"),
        measure("height", "2152-03-04", "5"),
        measure("bmi", "2152-03-04", "4649.4"),
        measure("weight", "2152-03-04", "0"),
        measure("weight", "2152-03-04", "n/a"),
        measure("Blood Pressure", "2152-03-04", "120/80"),
        measure("height", "2152-03-04", "66", subject=9),
    ]
    one, counts = first_sample(write_tables(omr=rows))
    assert one.height_cm == 165.1
    assert counts["outliers"] == {"height": 1, "weight": 1, "bmi": 1}
    reasons = {key[4:]: n for key, n in counts["dropped"].items() if key.startswith("omr.")}
    assert reasons == {
        "other_result": 1,
        "unknown_patient": 1,
        "no_number": 1,
        "outlier_height": 1,
        "outlier_weight": 1,
        "outlier_bmi": 1,
    }


day = st.integers(1, 9).map(lambda n: f"2152-03-{n:02d}")


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(day, st.integers(1, 3), st.integers(100, 400)), min_size=1, max_size=10))
def test_latest_on_or_before_by_a_loop(write_tables, entries):
    rows = [measure("weight", date, str(pounds), seq) for date, seq, pounds in entries]
    one, _ = first_sample(write_tables(omr=rows))
    past = [entry for entry in entries if entry[0] <= "2152-03-05"]
    expected = round(max(past)[2] * 0.45359237, 1) if past else None
    assert one.weight_kg == expected


def test_frames_are_typed(write_tables):
    frame = prepare_tables(write_tables()).frame
    assert frame.schema["height_cm"] == pl.Float64
    assert frame.schema["drugs"] == pl.List(pl.UInt32)
