"""Prescriptions, streamed: batches are reduced as they come, and the table is never held whole."""

from collections import Counter
from collections.abc import Callable

import polars as pl

from common.data.cleaning.orders import Orders, divided, one_row_per_pair
from common.data.tables import (
    MORE_FIELDS,
    NULLS,
    TIME_FORMAT,
    Table,
    bad_numbers,
    bad_times,
    mend_numbers,
    mend_times,
    scan,
    stream,
    whole_number,
)

CHUNK_ROWS = 500_000
_NULL_KINDS = frozenset(spelling.upper() for spelling in NULLS)


def read_orders(
    table: Table,
    *,
    chunk_rows: int = CHUNK_ROWS,
    on_rows: Callable[[int], None] | None = None,
    clock: pl.DataFrame | None = None,
) -> Orders:
    """Stream the prescriptions table.

    Args:
        table: The table as found.
        chunk_rows: Rows per batch; only memory and speed depend on it.
        on_rows: Called with the number of rows read so far.
        clock: Of the admissions, where their stays are divided.

    Raises:
        UserError: A damaged or empty table, one with a row longer than its header, or admission
            numbers or start times that cannot be read.
    """
    lines = scan(table).select(
        "hadm_id",
        whole_number("hadm_id").alias("number"),
        # One process-wide code for each text: rows are then counted and grouped by integers.
        pl.col("drug_type").fill_null("").str.strip_chars().str.to_uppercase().cast(pl.Categorical),
        pl.col("drug").fill_null("").cast(pl.Categorical),
        pl.col("starttime").str.to_datetime(TIME_FORMAT, strict=False).alias("start"),
        "starttime",
        MORE_FIELDS,
    )
    kinds: Counter[str] = Counter()
    parts: list[pl.DataFrame] = []
    rows = timeless = unnumbered = 0
    for batch in stream(table, lines, chunk_rows=chunk_rows):
        rows += batch.height
        for kind, number in batch["drug_type"].value_counts().iter_rows():
            spelled = kind in _NULL_KINDS
            table.nulls["drug_type"] += number * spelled
            kinds["" if spelled else kind] += number
        stays, bad = mend_numbers(table, batch["hadm_id"], batch["number"])
        unnumbered += bad
        starts, bad = mend_times(table, batch["starttime"], batch["start"])
        timeless += bad
        main = batch.with_columns(hadm_id=stays, start=starts)
        wanted = main.filter(pl.col("drug_type") == "MAIN")
        parts.append(one_row_per_pair(divided(wanted, clock)))
        if on_rows is not None:
            on_rows(rows)
    if unnumbered:
        raise bad_numbers(table, "hadm_id", unnumbered)
    if timeless:
        raise bad_times(table, "starttime", timeless)
    return Orders(pairs=pl.concat(parts), drug_type=kinds, rows=rows)
