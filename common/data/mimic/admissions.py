"""From tables to one row per admission, with every dropped row counted under its reason."""

from collections.abc import Mapping
from pathlib import Path

import polars as pl

from common.data.mimic.diagnoses import DiagnosisLists, diagnosis_lists
from common.data.mimic.measures import Measures, clean_measures, measures_at_admission
from common.data.mimic.orders import CHUNK_ROWS, DrugLists, drug_lists, read_orders
from common.data.mimic.tables import find_tables
from common.data.samples import (
    UNKNOWN,
    BmiCheck,
    Counts,
    Lengths,
    Outliers,
    Prepared,
    Progress,
    Range,
)
from common.data.tables import Table, read, times, whole_numbers
from common.errors import UserError

OLDEST_SHOWN_AGE = 89
PLAUSIBLE_AGE = (0, 120)
"""Inclusive limits; outside is a typing error, and the admission is dropped and counted."""
_CAREUNIT_EVENT = "admit"
_MOST_ORPHANS = 0.5


def prepare_tables(
    folder: Path,
    *,
    drop_flushes: bool = True,
    chunk_rows: int = CHUNK_ROWS,
    progress: Progress | None = None,
) -> Prepared:
    """Read, clean and join the tables of a MIMIC-IV folder.

    Args:
        folder: The version's folder, which holds ``hosp/``.
        drop_flushes: Leave saline and heparin flushes out of the drug lists.
        chunk_rows: Rows of prescriptions per batch; the result does not depend on it.
        progress: Called with one line for each step.

    Raises:
        UserError: Any table that cannot be used as it is.
    """
    say = progress or (lambda _: None)
    tables = find_tables(folder)
    book = _Book()
    say("reading patients and admissions")
    patients = _patients(tables["patients"], book)
    stays = _stays(tables["admissions"], patients, book)
    known = stays["hadm_id"]
    say("reading diagnoses")
    diagnoses = _diagnoses(tables, known, book)
    say("reading body measures")
    measures = _measures(tables["omr"], patients, book)
    say("streaming prescriptions")
    drugs = _drugs(tables["prescriptions"], known, book, drop_flushes, chunk_rows, say)
    services = _attribute(tables, "services", "transfertime", "curr_service", known, book)
    careunits = _attribute(tables, "transfers", "intime", "careunit", known, book)
    say("joining one row per admission")
    samples = (
        stays.join(diagnoses.lists, on="hadm_id", how="left")
        .join(drugs.lists, on="hadm_id", how="left")
        .join(measures_at_admission(stays, measures), on="hadm_id", how="left")
        .join(services, on="hadm_id", how="left")
        .join(careunits, on="hadm_id", how="left")
        .sort("subject_id", "admittime", "hadm_id")
    )
    complete = _complete(samples, book)
    book.out["admissions"] = complete.height
    if complete.is_empty():
        raise UserError(
            f"no samples after cleaning in {folder}",
            allowed="at least one admission with a plausible age, diagnoses and MAIN drugs",
            fix="check that the tables come from one version of MIMIC-IV",
        )
    frame = _sample_columns(complete)
    return Prepared(
        frame=frame,
        drugs=drugs.vocabulary,
        titles=diagnoses.titles,
        codes=diagnoses.codes,
        counts=_counts(book, tables, drugs, diagnoses, measures, stays, frame),
    )


class _Book:
    """Rows in, rows out and reasons, by table; each is counted by itself, none by subtraction."""

    def __init__(self) -> None:
        self.rows: dict[str, int] = {}
        self.out: dict[str, int] = {}
        self.dropped: dict[str, dict[str, int]] = {}
        self.drug_type: dict[str, int] = {}

    def drop(self, table: str, **reasons: int) -> None:
        entries = self.dropped.setdefault(table, {})
        for reason, number in reasons.items():
            entries[reason] = entries.get(reason, 0) + number

    def flat(self) -> dict[str, int]:
        return {
            f"{table}.{reason}": number
            for table, reasons in self.dropped.items()
            for reason, number in reasons.items()
        }


def _patients(table: Table, book: _Book) -> pl.DataFrame:
    frame = read(
        table,
        numbers=("subject_id", "anchor_age", "anchor_year"),
        attributes=("gender", "anchor_year_group"),
    )
    book.rows["patients"] = frame.height
    doubled = frame.height - frame["subject_id"].n_unique()
    if doubled:
        raise UserError(
            f"{table.label}: {doubled} rows repeat a subject_id",
            allowed="one row for each patient",
            fix="remove the duplicate patients, or fetch the file again",
        )
    book.out["patients"] = frame.height
    return frame


def _stays(table: Table, patients: pl.DataFrame, book: _Book) -> pl.DataFrame:
    frame = read(
        table, numbers=("subject_id", "hadm_id"), attributes=("admission_type", "insurance")
    )
    frame = times(frame, table, "admittime", required=True)
    book.rows["admissions"] = frame.height
    distinct = frame.unique()
    doubled = distinct.height - distinct["hadm_id"].n_unique()
    if doubled:
        raise UserError(
            f"{table.label}: {doubled} rows repeat a hadm_id with other content",
            allowed="one row for each admission",
            fix="remove the duplicate admissions, or fetch the file again",
        )
    stays = distinct.join(patients, on="subject_id").with_columns(_age())
    _refuse_orphans(table, distinct.height - stays.height, distinct.height, "a patient")
    book.drop(
        "admissions",
        duplicate=frame.height - distinct.height,
        unknown_patient=distinct.height - stays.height,
    )
    return stays


def _age() -> pl.Expr:
    """Age at admission; null where it, or the age that it is counted from, is implausible."""
    anchor = pl.col("anchor_age")
    age = anchor + pl.col("admittime").dt.year() - pl.col("anchor_year")
    plausible = anchor.is_between(*PLAUSIBLE_AGE) & age.is_between(*PLAUSIBLE_AGE)
    return pl.when(plausible).then(age).alias("age")


def _diagnoses(tables: Mapping[str, Table], known: pl.Series, book: _Book) -> DiagnosisLists:
    table, dictionary = tables["diagnoses_icd"], tables["d_icd_diagnoses"]
    lists = diagnosis_lists(table, dictionary, known)
    rows = lists.rows
    book.rows["diagnoses_icd"], book.rows["d_icd_diagnoses"] = rows, lists.dictionary_rows
    book.drop("diagnoses_icd", **lists.dropped)
    _refuse_orphans(table, lists.dropped["unknown_admission"], rows, "an admission")
    if lists.unmatched > _MOST_ORPHANS * rows:
        raise UserError(
            f"{table.label}: {lists.unmatched} of {rows} rows match no title in {dictionary.label}",
            fix="use both tables from the same version",
        )
    book.out["diagnoses_icd"] = _items(lists.lists["diagnoses"])
    book.drop("d_icd_diagnoses", **lists.untitled)
    book.out["d_icd_diagnoses"] = lists.dictionary_titles
    return lists


def _measures(table: Table, patients: pl.DataFrame, book: _Book) -> Measures:
    measures = clean_measures(table, patients["subject_id"])
    book.rows["omr"] = measures.read
    book.drop("omr", **measures.dropped)
    book.out["omr"] = measures.rows.height
    return measures


def _drugs(
    table: Table,
    known: pl.Series,
    book: _Book,
    drop_flushes: bool,
    chunk_rows: int,
    say: Progress,
) -> DrugLists:
    orders = read_orders(
        table,
        chunk_rows=chunk_rows,
        on_rows=lambda rows: say(f"streaming prescriptions: {rows:,} rows"),
    )
    lists = drug_lists(orders, known, drop_flushes=drop_flushes)
    book.drug_type = dict(orders.drug_type)
    book.rows["prescriptions"] = orders.rows
    book.drop("prescriptions", **lists.dropped)
    main = orders.drug_type.get("MAIN", 0)
    if not main:
        raise UserError(
            f"{table.label} has no rows of drug_type MAIN",
            allowed="MAIN, BASE, ADDITIVE in column drug_type",
            fix="use the table as PhysioNet ships it",
        )
    _refuse_orphans(table, lists.dropped["unknown_admission"], main, "an admission")
    book.out["prescriptions"] = _items(lists.lists["drugs"])
    return lists


def _items(lists: pl.Series) -> int:
    return int(lists.list.len().sum())


def _refuse_orphans(table: Table, orphans: int, rows: int, parent: str) -> None:
    """A few orphans are counted and dropped; more than half means that tables do not belong."""
    if orphans > _MOST_ORPHANS * rows:
        raise UserError(
            f"{table.label}: {orphans} of {rows} rows belong to {parent} that is in no table",
            fix="use all tables from the same version of MIMIC-IV",
        )


def _attribute(
    tables: Mapping[str, Table], name: str, time: str, value: str, known: pl.Series, book: _Book
) -> pl.DataFrame:
    """First value of an admission in time; an empty frame when the table is absent."""
    if name not in tables:
        return pl.DataFrame(schema={"hadm_id": pl.Int64, value: pl.String})
    table = tables[name]
    rows = read(table, attributes=(value,))
    book.rows[name] = rows.height
    told = rows.drop_nulls(value)
    if "eventtype" in rows.columns:
        told = told.filter(pl.col("eventtype") == _CAREUNIT_EVENT)
    placed = (
        times(told, table, time, required=False)
        .with_columns(whole_numbers(table, told["hadm_id"]))
        .join(known.to_frame(), on="hadm_id", how="semi")
    )
    first = placed.sort("hadm_id", time, value, nulls_last=True).unique("hadm_id", keep="first")
    book.drop(
        name,
        not_in_use=rows.height - told.height,
        unknown_admission=told.height - placed.height,
        later=placed.height - first.height,
    )
    book.out[name] = first.height
    return first.select("hadm_id", value)


def _complete(samples: pl.DataFrame, book: _Book) -> pl.DataFrame:
    """Keep the admissions that lack nothing; the first thing that is missing is the reason."""
    for reason, column in (
        ("implausible_age", "age"),
        ("no_diagnoses", "diagnoses"),
        ("no_drugs", "drugs"),
    ):
        kept = samples.filter(pl.col(column).is_not_null())
        book.drop("admissions", **{reason: samples.height - kept.height})
        samples = kept
    return samples


def _sample_columns(complete: pl.DataFrame) -> pl.DataFrame:
    attributes = {
        "sex": "gender",
        "service": "curr_service",
        "admission_type": "admission_type",
        "insurance": "insurance",
        "anchor_year_group": "anchor_year_group",
        "careunit": "careunit",
    }
    return complete.select(
        pl.col("subject_id").alias("patient"),
        pl.col("hadm_id").alias("admission"),
        "age",
        "height_cm",
        "weight_kg",
        "bmi",
        "diagnoses",
        "drugs",
        *(pl.col(old).fill_null(UNKNOWN).alias(new) for new, old in attributes.items()),
    )


def _counts(
    book: _Book,
    tables: Mapping[str, Table],
    drugs: DrugLists,
    diagnoses: DiagnosisLists,
    measures: Measures,
    stays: pl.DataFrame,
    frame: pl.DataFrame,
) -> Counts:
    lengths = frame["drugs"].list.len()
    tall, heavy = frame["height_cm"].is_not_null(), frame["weight_kg"].is_not_null()
    return Counts(
        rows=book.rows,
        rows_out=book.out,
        drug_type=dict.fromkeys(("MAIN", "BASE", "ADDITIVE"), 0) | book.drug_type,
        **drugs.counts,
        samples=frame.height,
        patients=frame["patient"].n_unique(),
        drugs_per_sample=Lengths(mean=int(lengths.sum()) / frame.height, **_range(lengths)),
        diagnosis_rows_joined=diagnoses.joined,
        diagnosis_rows_unmatched=diagnoses.unmatched,
        age_differs_from_anchor=int((stays["age"] != stays["anchor_age"]).sum()),
        age_over_89=int((stays["age"] > OLDEST_SHOWN_AGE).sum()),
        age=Range(**_range(stays["age"])),
        height=int(tall.sum()),
        weight=int(heavy.sum()),
        height_and_weight=int((tall & heavy).sum()),
        no_height_no_weight=int((~tall & ~heavy).sum()),
        outliers=Outliers(**measures.outliers),
        bmi_check=BmiCheck(
            triples=measures.bmi_triples, within_one=measures.bmi_triples_within_one
        ),
        dropped=book.flat(),
        null_spelled={
            f"{table.name}.{column}": cells
            for table in tables.values()
            for column, cells in sorted(table.nulls.items())
            if cells
        },
    )


def _range(numbers: pl.Series) -> dict[str, int]:
    low, high = numbers.min(), numbers.max()
    assert isinstance(low, int)
    assert isinstance(high, int)
    return {"min": low, "max": high}
