"""Drug lists: against a plain loop over the rows, whatever the chunk size and row order."""

import random

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data.cleaning.orders import Orders, drug_lists, is_flush
from common.data.mimic.orders import read_orders
from common.data.mimic.tables import find_tables
from common.data.names import normalise_string

SPELLINGS = (
    "Aspirin", "aspirin ", "ASPIRIN", "Sodium Chloride 0.9%  Flush", "Heparin Flush (10 units/ml)",
    "Insulin", "insulin", "", "   ", "Heparin", "D5W", "Ünïcode\u00a0Drug", "ünïcode drug",
)  # fmt: skip
STARTS = ("", "2150-01-01 00:00:00", "2150-01-02 10:00:00", "2150-01-02", "2149-12-31 23:59:59")
KNOWN = (11, 21, 31)
KINDS = ("MAIN", "MAIN", "MAIN ", " main", "BASE", "BASE ", "base", "ADDITIVE", "New", "")


def by_hand(rows, *, drop_flushes):
    """The same rules, row by row: ({hadm_id: [names by first start]}, {reason: rows})."""
    reasons = {}
    first = {}

    def drop(reason):
        reasons[reason] = reasons.get(reason, 0) + 1

    for row in rows:
        name = " ".join(row["drug"].split()).casefold()
        flush = "flush" in name and ("heparin" in name or "sodium chloride" in name)
        kind = row["drug_type"].strip().lower()
        if kind != "main":
            drop(f"drug_type_{kind or 'empty'}")
        elif not name:
            drop("empty_name")
        elif row["hadm_id"] not in KNOWN:
            drop("unknown_admission")
        elif flush and drop_flushes:
            drop("flush")
        else:
            start = row["starttime"] or "9999"
            entry = (f"{start} 00:00:00"[:19], row["drug"])
            key = (row["hadm_id"], name)
            if key in first:
                drop("duplicate")
            first[key] = min(first.get(key, entry), entry)
    lists = {}
    for (admission, name), (start, spelling) in first.items():
        lists.setdefault(admission, []).append((start, name, " ".join(spelling.split())))
    return {key: [drug for *_, drug in sorted(found)] for key, found in lists.items()}, reasons


def by_code(folder, *, chunk_rows=1000, drop_flushes=True):
    orders = read_orders(find_tables(folder)["prescriptions"], chunk_rows=chunk_rows)
    found = drug_lists(orders, pl.Series(KNOWN), drop_flushes=drop_flushes)
    lists = {
        admission: [found.vocabulary[drug] for drug in drugs]
        for admission, drugs in found.lists.iter_rows()
    }
    return lists, {reason: n for reason, n in found.dropped.items() if n}, dict(found.counts)


order_rows = st.lists(
    st.fixed_dictionaries(
        {
            "hadm_id": st.sampled_from([*KNOWN, 999, ""]),
            "starttime": st.sampled_from(STARTS),
            "drug_type": st.sampled_from(KINDS),
            "drug": st.sampled_from(SPELLINGS),
        }
    ),
    min_size=1,
    max_size=30,
)


@pytest.mark.slow
@settings(max_examples=80, deadline=None)
@given(rows=order_rows, drop_flushes=st.booleans(), chunk_rows=st.sampled_from([1, 7, 1000]))
def test_equals_a_loop_over_the_rows(write_tables, rows, drop_flushes, chunk_rows):
    folder = write_tables(prescriptions=rows)
    lists, reasons, counts = by_code(folder, chunk_rows=chunk_rows, drop_flushes=drop_flushes)
    expected, expected_reasons = by_hand(rows, drop_flushes=drop_flushes)
    assert lists == expected
    assert reasons == expected_reasons
    assert len(rows) == sum(map(len, lists.values())) + sum(reasons.values())
    placed = {
        (row["hadm_id"], row["drug"])
        for row in rows
        if row["drug_type"].strip().upper() == "MAIN"
        and row["hadm_id"] in KNOWN
        and row["drug"].strip()
    }
    assert counts["pairs_raw"] == len(placed)
    assert counts["pairs_normalised"] == len({(h, normalise_string(d)) for h, d in placed})


def test_kinds_that_differ_in_blanks_and_case_are_one(write_tables):
    rows = [{"hadm_id": 11, "drug_type": kind, "drug": f"Drug {kind}"} for kind in KINDS]
    orders = read_orders(find_tables(write_tables(prescriptions=rows))["prescriptions"])
    assert orders.rows == len(rows)
    assert orders.drug_type == {"MAIN": 4, "BASE": 3, "ADDITIVE": 1, "NEW": 1, "": 1}


def test_kinds_that_only_share_a_reason_are_summed():
    kelvin = "\N{KELVIN SIGN}IT"
    pairs = pl.DataFrame(
        schema={
            "hadm_id": pl.Int64,
            "drug": pl.Categorical,
            "rows": pl.UInt32,
            "start": pl.Datetime,
        }
    )
    orders = Orders(pairs=pairs, drug_type={"KIT": 2, kelvin: 3}, rows=5)
    assert drug_lists(orders, pl.Series(KNOWN)).dropped["drug_type_kit"] == 5


@pytest.fixture(scope="module")
def many_rows():
    draw = random.Random(7)
    return [
        {
            "hadm_id": draw.choice([*KNOWN, 999]),
            "starttime": draw.choice(STARTS[1:3]),
            "drug_type": draw.choice(["MAIN", "BASE"]),
            "drug": f"{draw.choice(SPELLINGS[:3])}{draw.randrange(40) or ''}",
        }
        for _ in range(2500)
    ]


@pytest.mark.slow
def test_chunk_size_and_row_order_change_nothing(write_tables, many_rows):
    folder = write_tables(prescriptions=many_rows)
    whole = by_code(folder, chunk_rows=len(many_rows))
    assert whole[:2] == by_hand(many_rows, drop_flushes=True)
    for chunk_rows in (1, 1000):
        assert by_code(folder, chunk_rows=chunk_rows) == whole
    shuffled = random.Random(1).sample(many_rows, len(many_rows))
    assert by_code(write_tables(prescriptions=shuffled), chunk_rows=1000) == whole


def test_buckets_give_the_same(write_tables, many_rows, monkeypatch):
    folder = write_tables(prescriptions=many_rows)
    whole = by_code(folder, chunk_rows=len(many_rows))
    monkeypatch.setattr("common.data.cleaning.orders._BUCKET_ROWS", 50)
    lists, reasons, counts = by_code(folder, chunk_rows=20)
    assert (lists, reasons, counts) == whole


@pytest.mark.slow
def test_batches_have_the_size_asked_for(write_tables, many_rows):
    seen = []
    table = find_tables(write_tables(prescriptions=many_rows))["prescriptions"]
    read_orders(table, chunk_rows=1, on_rows=seen.append)
    assert seen == list(range(1, len(many_rows) + 1))


def test_flushes_are_lines_for_catheters_only():
    assert is_flush("heparin flush (1000 units/ml)")
    assert is_flush("saline flush")
    assert not is_flush("heparin dwell (1000 units/ml)")
    assert not is_flush("sodium chloride 0.9%")
    assert not is_flush("flushing lotion")
