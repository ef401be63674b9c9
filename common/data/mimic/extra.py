"""MIMIC-IV's tables of the protocols: procedures, services in time, laboratory results."""

from collections import Counter
from collections.abc import Mapping

import polars as pl

from common.data.cleaning.assemble import Book, refuse_orphans
from common.data.cleaning.labs import COLUMNS, lab_lines, last_results
from common.data.cleaning.protocols import Extra, clock
from common.data.mimic.diagnoses import read_diagnoses
from common.data.mimic.tables import PAIRED
from common.data.protocols import ADMISSION, FIRST_24H, VISITS
from common.data.samples import Progress
from common.data.tables import (
    TIME_FORMAT,
    Table,
    bad_numbers,
    bad_times,
    mend_numbers,
    mend_times,
    read,
    scan,
    stream,
    times,
    whole_number,
    whole_numbers,
)

_CHUNK_ROWS = 500_000
_FLAG = "abnormal"
_USUAL_FLUID = "Blood"


def read_extra(
    protocol: str, tables: Mapping[str, Table], stays: pl.DataFrame, book: Book, say: Progress
) -> Extra | None:
    """Read what ``data.protocol`` shows beyond diagnoses and orders; None for ``admission``.

    Args:
        protocol: ``data.protocol``.
        tables: As found; those of a protocol are optional.
        stays: hadm_id and admittime of the admissions.
        book: Rows are counted here.
        say: Called with one line for each step.

    Raises:
        UserError: Tables that cannot be used as they are.
    """
    if protocol == ADMISSION:
        return None
    absent = tuple(name for name in PAIRED[protocol] if name not in tables)
    if absent:
        say(f"without {' and '.join(PAIRED[protocol])}: data.protocol={protocol} goes on")
    if protocol == VISITS:
        return _procedures(tables, stays["hadm_id"], book, absent)
    return _first_day(tables, stays, book, absent, say)


def _procedures(
    tables: Mapping[str, Table], known: pl.Series, book: Book, absent: tuple[str, ...]
) -> Extra:
    if absent:
        return Extra(protocol=VISITS, absent=absent)
    found = read_diagnoses(tables["procedures_icd"], tables["d_icd_procedures"], known, book)
    lists = found.lists.rename({"diagnoses": "procedures"})
    return Extra(
        protocol=VISITS,
        frames=(lists,),
        procedures=found.titles,
        counted={"admissions_with_procedures": lists.height},
    )


def _first_day(
    tables: Mapping[str, Table],
    stays: pl.DataFrame,
    book: Book,
    absent: tuple[str, ...],
    say: Progress,
) -> Extra:
    known = clock(stays)
    frames: list[pl.DataFrame] = []
    counted: dict[str, int] = {}
    if "services" in tables:
        frames.append(_services(tables["services"], known))
    else:
        absent = ("services", *absent)
    if "labevents" in tables:
        say("streaming laboratory results")
        results, counted = _results(tables["labevents"], tables["d_labitems"], known, book)
        frames.append(lab_lines(results))
    return Extra(protocol=FIRST_24H, absent=absent, frames=tuple(frames), counted=counted)


def _services(table: Table, known: pl.DataFrame) -> pl.DataFrame:
    """Return the services of each stay's first hours, each once, in the order of time."""
    rows = read(table, attributes=("curr_service",)).drop_nulls("curr_service")
    timed = times(rows, table, "transfertime", required=False)
    timed = timed.with_columns(whole_numbers(table, rows["hadm_id"]))
    early = timed.join(known, on="hadm_id").filter(pl.col("transfertime") < pl.col("known_until"))
    ordered = early.sort("hadm_id", "transfertime", "curr_service")
    return ordered.group_by("hadm_id", maintain_order=True).agg(
        pl.col("curr_service").unique(maintain_order=True).alias("services")
    )


def _results(
    table: Table, dictionary: Table, known: pl.DataFrame, book: Book
) -> tuple[pl.DataFrame, dict[str, int]]:
    """Stream labevents and keep each admission's last results that were known in time.

    A result is known once it is stored; where no time of that stands, once it was drawn.
    """
    names = _names(dictionary, book)
    lines = scan(table).with_columns(
        whole_number("hadm_id").alias("stay"),
        whole_number("itemid").alias("item"),
        *(
            pl.col(name).str.to_datetime(TIME_FORMAT, strict=False).alias(alias)
            for name, alias in (("charttime", "time"), ("storetime", "stored"))
        ),
        pl.col("valuenum").str.strip_chars().cast(pl.Float64, strict=False).alias("value"),
    )
    tally: Counter[str] = Counter()
    parts = [pl.DataFrame(schema=COLUMNS)]
    for batch in stream(table, lines, chunk_rows=_CHUNK_ROWS):
        found = _known(_checked(batch, table), known, names, tally)
        parts.append(last_results(found))
        tally["rows"] += batch.height
        tally["found"] += found.height
    last = last_results(pl.concat(parts))
    tally["replaced"] = tally["found"] - last.height
    reasons = (
        *("no_admission", "unknown_admission", "no_time", "after_24_hours", "stored_later"),
        *("no_number", "unknown_item", "replaced"),
    )
    dropped = {reason: tally[reason] for reason in reasons}
    refuse_orphans(table.label, dropped["unknown_admission"], tally["rows"], "an admission")
    book.add(table.name, tally["rows"], dropped, last.height)
    counted = ("lab_rows", "lab_rows_of_admissions", "lab_rows_before_admission", "lab_rows_early")
    tally["lab_rows"] = tally["rows"]
    return last, {key: tally[key] for key in counted}


def _checked(batch: pl.DataFrame, table: Table) -> pl.DataFrame:
    """Look again at numbers and times that were not read; refuse what is none."""
    for text, parsed, mend, error in (
        ("hadm_id", "stay", mend_numbers, bad_numbers),
        ("itemid", "item", mend_numbers, bad_numbers),
        ("charttime", "time", mend_times, bad_times),
        ("storetime", "stored", mend_times, bad_times),
    ):
        values, bad = mend(table, batch[text], batch[parsed])
        if bad:
            raise error(table, text, bad)
        batch = batch.with_columns(values.alias(parsed))
    return batch


def _known(
    batch: pl.DataFrame, known: pl.DataFrame, names: pl.DataFrame, tally: Counter[str]
) -> pl.DataFrame:
    """Return the results that were known in time, and count the others under one reason each."""

    def kept(frame: pl.DataFrame, reason: str, condition: pl.Expr) -> pl.DataFrame:
        found = frame.filter(condition.fill_null(False))
        tally[reason] += frame.height - found.height
        return found

    placed = kept(batch, "no_admission", pl.col("stay").is_not_null())
    placed = placed.join(known.rename({"hadm_id": "stay"}), on="stay", how="left")
    placed = kept(placed, "unknown_admission", pl.col("admitted").is_not_null())
    tally["lab_rows_of_admissions"] += placed.height
    timed = kept(placed, "no_time", pl.col("time").is_not_null())
    early = kept(timed, "after_24_hours", pl.col("time") < pl.col("known_until"))
    before = int((early["time"] < early["admitted"]).sum())
    tally["lab_rows_before_admission"] += before
    tally["lab_rows_early"] += early.height - before
    stored = pl.col("stored").is_null() | (pl.col("stored") < pl.col("known_until"))
    ready = kept(early, "stored_later", stored)
    numbers = kept(ready, "no_number", pl.col("value").is_finite())
    named = numbers.join(names, on="item", how="left")
    named = kept(named, "unknown_item", pl.col("name").is_not_null())
    unit = pl.col("valueuom").str.strip_chars().replace("", None)
    return named.select(
        pl.col("stay").alias("hadm_id"),
        "name",
        "time",
        "value",
        unit.alias("unit"),
        (pl.col("flag").fill_null("").str.strip_chars() == _FLAG).alias("flagged"),
    )


def _names(table: Table, book: Book) -> pl.DataFrame:
    """Return item and name: the label, and the fluid where it is not blood."""
    frame = read(table, numbers=("itemid",), attributes=("label", "fluid"))
    clean = frame.select(
        pl.col("itemid").alias("item"),
        *(
            pl.col(name).str.replace_all(r"\s+", " ").str.strip_chars()
            for name in ("label", "fluid")
        ),
    )
    named = clean.filter(pl.col("label").fill_null("") != "").unique("item", keep="first")
    book.add(table.name, frame.height, {"no_label": frame.height - named.height}, named.height)
    fluid = pl.col("fluid").fill_null(_USUAL_FLUID)
    name = (
        pl.when(fluid == _USUAL_FLUID).then("label").otherwise(pl.format("{} ({})", "label", fluid))
    )
    return named.select("item", name.alias("name"))
