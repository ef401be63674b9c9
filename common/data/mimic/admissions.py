"""MIMIC-IV's tables to samples: each is read, cleaned and counted, then all are joined."""

from collections.abc import Mapping
from pathlib import Path

import polars as pl

from common.data.cleaning.assemble import (
    PLAUSIBLE_AGE,
    Book,
    assemble,
    first_values,
    plausible_age,
    refuse_orphans,
)
from common.data.cleaning.measures import Measures, clean_measures
from common.data.cleaning.orders import DrugLists, drug_lists
from common.data.cleaning.protocols import clock
from common.data.mimic.diagnoses import read_diagnoses
from common.data.mimic.extra import read_extra
from common.data.mimic.orders import read_orders
from common.data.mimic.tables import find_tables
from common.data.protocols import ADMISSION, FIRST_24H
from common.data.samples import Prepared, Progress
from common.data.tables import Table, read, spelled_nulls, times, whole_numbers
from common.errors import UserError

_CAREUNIT_EVENT = "admit"
_RESULTS = {"Height (Inches)": "height", "Weight (Lbs)": "weight", "BMI (kg/m2)": "bmi"}
"""omr's result_name: measure."""


def prepare_tables(
    folder: Path,
    *,
    drop_flushes: bool = True,
    progress: Progress | None = None,
    protocol: str = ADMISSION,
) -> Prepared:
    """Read, clean and join the tables of a MIMIC-IV folder.

    Args:
        folder: The version's folder, which holds ``hosp/``.
        drop_flushes: Leave saline and heparin flushes out of the drug lists.
        progress: Called with one line for each step.
        protocol: ``data.protocol``.

    Raises:
        UserError: Any table that cannot be used as it is.
    """
    say = progress or (lambda _: None)
    tables = find_tables(folder, protocol)
    book = Book()
    say("reading patients and admissions")
    patients = _patients(tables["patients"], book)
    stays = _stays(tables["admissions"], patients, book)
    known = stays["hadm_id"]
    say("reading diagnoses")
    diagnoses = read_diagnoses(tables["diagnoses_icd"], tables["d_icd_diagnoses"], known, book)
    say("reading body measures")
    measures = _measures(tables["omr"], patients, book)
    say("streaming prescriptions")
    times_of = clock(stays) if protocol == FIRST_24H else None
    drugs = _drugs(tables["prescriptions"], known, book, drop_flushes, say, times_of)
    services = _attribute(tables, "services", "transfertime", "curr_service", known, book)
    careunits = _attribute(tables, "transfers", "intime", "careunit", known, book)
    extra = read_extra(protocol, tables, stays, book, say)
    say("joining one row per admission")
    return assemble(
        stays.join(services.rename({"curr_service": "service"}), on="hadm_id", how="left").join(
            careunits, on="hadm_id", how="left"
        ),
        book,
        diagnoses=diagnoses,
        drugs=drugs,
        measures=measures,
        folder=folder,
        null_spelled=spelled_nulls(tables),
        extra=extra,
    )


def _patients(table: Table, book: Book) -> pl.DataFrame:
    frame = read(
        table,
        numbers=("subject_id", "anchor_age", "anchor_year"),
        attributes=("gender", "anchor_year_group"),
    )
    doubled = frame.height - frame["subject_id"].n_unique()
    if doubled:
        raise UserError(
            f"{table.label}: {doubled} rows repeat a subject_id",
            allowed="one row for each patient",
            fix="remove the duplicate patients, or fetch the file again",
        )
    book.add("patients", frame.height, {}, frame.height)
    return frame


def _stays(table: Table, patients: pl.DataFrame, book: Book) -> pl.DataFrame:
    frame = read(
        table, numbers=("subject_id", "hadm_id"), attributes=("admission_type", "insurance")
    )
    frame = times(frame, table, "admittime", required=True)
    if "dischtime" in frame.columns:
        frame = times(frame, table, "dischtime", required=False).rename({"dischtime": "ended"})
    book.rows["admissions"] = frame.height
    distinct = frame.unique()
    doubled = distinct.height - distinct["hadm_id"].n_unique()
    if doubled:
        raise UserError(
            f"{table.label}: {doubled} rows repeat a hadm_id with other content",
            allowed="one row for each admission",
            fix="remove the duplicate admissions, or fetch the file again",
        )
    stays = distinct.join(patients, on="subject_id").with_columns(age=_age())
    orphans = distinct.height - stays.height
    refuse_orphans(table.label, orphans, distinct.height, "a patient")
    duplicate = frame.height - distinct.height
    book.drop("admissions", {"duplicate": duplicate, "unknown_patient": orphans})
    return stays


def _age() -> pl.Expr:
    """Age at admission; null where it, or the age that it is counted from, is implausible."""
    anchor = pl.col("anchor_age")
    age = plausible_age(anchor + pl.col("admittime").dt.year() - pl.col("anchor_year"))
    return pl.when(anchor.is_between(*PLAUSIBLE_AGE)).then(age)


def _measures(table: Table, patients: pl.DataFrame, book: Book) -> Measures:
    frame = read(table, numbers=("subject_id", "seq_num"))
    found = times(frame, table, "chartdate", required=True).select(
        "subject_id",
        "seq_num",
        pl.col("chartdate").cast(pl.Date).alias("date"),
        pl.col("result_name").replace_strict(_RESULTS, default=None).alias("kind"),
        pl.col("result_value").str.strip_chars().cast(pl.Float64, strict=False).alias("value"),
    )
    measures = clean_measures(found, patients["subject_id"])
    book.add("omr", measures.read, measures.dropped, measures.rows.height)
    return measures


def _drugs(
    table: Table,
    known: pl.Series,
    book: Book,
    drop_flushes: bool,
    say: Progress,
    times_of: pl.DataFrame | None,
) -> DrugLists:
    orders = read_orders(
        table,
        on_rows=lambda rows: say(f"streaming prescriptions: {rows:,} rows"),
        clock=times_of,
    )
    lists = drug_lists(orders, known, drop_flushes=drop_flushes)
    book.drug_type = dict(orders.drug_type)
    main = orders.drug_type.get("MAIN", 0)
    if not main:
        raise UserError(
            f"{table.label} has no rows of drug_type MAIN",
            allowed="MAIN, BASE, ADDITIVE in column drug_type",
            fix="use the table as PhysioNet ships it",
        )
    refuse_orphans(table.label, lists.dropped["unknown_admission"], main, "an admission")
    book.add("prescriptions", orders.rows, lists.dropped, lists.listed)
    return lists


def _attribute(
    tables: Mapping[str, Table], name: str, time: str, value: str, known: pl.Series, book: Book
) -> pl.DataFrame:
    """First value of an admission in time; an empty frame when the table is absent."""
    if name not in tables:
        return pl.DataFrame(schema={"hadm_id": pl.Int64, value: pl.String})
    table = tables[name]
    rows = read(table, attributes=(value,))
    named = rows.drop_nulls(value)
    if "eventtype" in rows.columns:
        named = named.filter(pl.col("eventtype") == _CAREUNIT_EVENT)
    timed = times(named, table, time, required=False).with_columns(
        whole_numbers(table, named["hadm_id"])
    )
    ordered = timed.sort("hadm_id", time, value, nulls_last=True).select("hadm_id", value)
    return first_values(name, rows.height, ordered, known, book)
