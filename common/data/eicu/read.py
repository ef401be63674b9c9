"""eICU's unit stays to one row per hospital stay, by the common rules.

Times are minutes from a unit's admission and become minutes from the hospital's; between stays
only the year is known, and stays of one year come in the order of their numbers. A cell of
icd9code may hold an ICD-9 and an ICD-10 code: the ICD-10 one counts, with eICU's own words as the
title. A diagnosis without a code counts by its words.
"""

import hashlib
from pathlib import Path

import polars as pl

from common.data.cleaning.assemble import Book, assemble, items, plausible_age, refuse_orphans
from common.data.cleaning.diagnoses import KEY, DiagnosisLists, diagnosis_lists
from common.data.cleaning.measures import (
    CM_PER_INCH,
    KG_PER_POUND,
    PLAUSIBLE,
    Measures,
    clean_measures,
)
from common.data.cleaning.orders import DrugLists, Orders, drug_lists, one_row_per_pair
from common.data.eicu.tables import find_tables
from common.data.samples import Prepared, Progress
from common.data.tables import Table, read, scan, spelled_nulls, stream, whole_numbers
from common.errors import UserError

HIDDEN_OLD_AGE = 90
"""What "> 89" counts as."""
POSSIBLE_YEARS = (1900, 2100)
SEXES = {"Female": "F", "Male": "M"}
PRIORITIES = {"Primary": 1, "Major": 2, "Other": 3}
LIKELY_BMI = (10.0, 100.0)
"""kg/m2; a weight that makes another BMI with a plausible height has a slipped decimal."""
PATH, APACHE = "path", "apache"
"""Versions of diagnoses without an ICD code: eICU's path of words, and APACHE's admission."""
_CHUNK_ROWS = 500_000
_ICD9 = r"^(\d.*|V\d.*|E\d{3}.*)$"


def prepare_tables(folder: Path, *, drop_flushes: bool, progress: Progress) -> Prepared:
    """Read, clean and join the tables of an eICU folder.

    Args:
        folder: Holds patient.csv.gz, diagnosis.csv.gz and medication.csv.gz.
        drop_flushes: Leave saline and heparin flushes out of the drug lists.
        progress: Called with one line for each step.

    Raises:
        UserError: Any table that cannot be used as it is.
    """
    tables = find_tables(folder)
    book = Book()
    progress("reading unit stays")
    units = _units(tables["patient"], book)
    stays = _stays(units, book)
    known = stays["hadm_id"]
    clock = units.select("patientunitstayid", "hadm_id", "hospitaladmitoffset")
    progress("reading diagnoses")
    diagnoses = _diagnoses(tables["diagnosis"], stays, clock, book)
    progress("reading medication")
    drugs = _drugs(tables["medication"], clock, known, book, drop_flushes)
    measures = measures_of(stays, book)
    progress("joining one row per hospital stay")
    return assemble(
        stays,
        book,
        diagnoses=diagnoses,
        drugs=drugs,
        measures=measures,
        folder=folder,
        null_spelled=spelled_nulls(tables),
    )


def _units(table: Table, book: Book) -> pl.DataFrame:
    """Return the unit stays, each once, with hadm_id and subject_id."""
    frame = read(
        table,
        numbers=(
            *("patientunitstayid", "patienthealthsystemstayid"),
            *("hospitaladmitoffset", "hospitaldischargeyear"),
        ),
        attributes=("gender", "apacheadmissiondx", "hospitalid", "unittype"),
    )
    years = frame["hospitaldischargeyear"]
    if strange := int((~years.is_between(*POSSIBLE_YEARS)).sum()):
        raise UserError(
            f"{table.label}: {strange} cells of column hospitaldischargeyear are no year",
            allowed=f"{POSSIBLE_YEARS[0]} to {POSSIBLE_YEARS[1]}",
            fix="use the table as PhysioNet ships it",
        )
    nameless = frame["uniquepid"].fill_null("").str.strip_chars().eq("").sum()
    if nameless:
        raise UserError(
            f"{table.label}: {nameless} rows have no uniquepid",
            allowed="a patient for each unit stay",
            fix="use the table as PhysioNet ships it",
        )
    distinct = frame.unique(maintain_order=True)
    doubled = distinct.height - distinct["patientunitstayid"].n_unique()
    if doubled:
        raise UserError(
            f"{table.label}: {doubled} rows repeat a patientunitstayid with other content",
            allowed="one row for each unit stay",
            fix="remove the duplicate stays, or fetch the file again",
        )
    owners = distinct.group_by("patienthealthsystemstayid").agg(pl.col("uniquepid").n_unique())
    if shared := int((owners["uniquepid"] > 1).sum()):
        raise UserError(
            f"{table.label}: {shared} hospital stays belong to several patients",
            allowed="one uniquepid for each patienthealthsystemstayid",
            fix="fetch the file again",
        )
    book.rows["patient"] = frame.height
    book.drop("patient", {"duplicate": frame.height - distinct.height})
    numbers = {name: _number(name) for name in distinct["uniquepid"].unique()}
    return distinct.with_columns(
        pl.col("uniquepid").replace_strict(numbers, return_dtype=pl.Int64).alias("subject_id"),
        pl.col("patienthealthsystemstayid").alias("hadm_id"),
    )


def _number(name: str) -> int:
    """Return a patient's local key: it depends on the name alone, as splits must."""
    return int.from_bytes(hashlib.sha256(name.strip().encode()).digest()[:8], "big") >> 1


def _stays(units: pl.DataFrame, book: Book) -> pl.DataFrame:
    """Return one row per hospital stay: what its first unit stay says."""
    begun = units.sort("hospitaladmitoffset", "patientunitstayid", descending=[True, False])
    first = begun.unique("hadm_id", keep="first", maintain_order=True)
    book.drop("patient", {"later_unit_stay": units.height - first.height})
    book.out["patient"] = first.height
    book.rows["admissions"] = first.height
    age = pl.col("age").str.strip_chars()
    years = pl.when(age.str.contains(r"^>\s*89$")).then(HIDDEN_OLD_AGE)
    ordered = first.sort("subject_id", "hospitaldischargeyear", "hadm_id")
    day = pl.int_range(pl.len()).over("subject_id", "hospitaldischargeyear")
    return ordered.with_columns(
        admittime=pl.datetime("hospitaldischargeyear", 1, 1) + pl.duration(days=day),
        age=plausible_age(
            years.otherwise(age.str.replace(r"\.0*$", "").cast(pl.Int64, strict=False))
        ),
        gender=pl.col("gender").str.strip_chars().replace_strict(SEXES, default=None),
        careunit=pl.col("unittype"),
        site=pl.col("hospitalid").str.strip_chars(),
    )


def _diagnoses(
    table: Table, stays: pl.DataFrame, clock: pl.DataFrame, book: Book
) -> DiagnosisLists:
    frame = read(table, numbers=("patientunitstayid", "diagnosisoffset"), attributes=("icd9code",))
    rows = frame.join(clock, on="patientunitstayid", how="left").with_columns(
        words=pl.col("diagnosisstring").str.replace_all(r"\s+", " ").str.strip_chars(),
        rank=pl.col("diagnosispriority").str.strip_chars().replace_strict(PRIORITIES, default=4),
        since=pl.col("diagnosisoffset") - pl.col("hospitaladmitoffset"),
    )
    reasons = stays.select(
        "hadm_id",
        rank=pl.lit(0),
        since=pl.lit(0, pl.Int64),
        words=pl.col("apacheadmissiondx").str.replace_all(r"\s+", " ").str.strip_chars(),
        icd_version=pl.lit(APACHE),
        icd_code=pl.col("apacheadmissiondx").str.strip_chars(),
    ).filter(pl.col("words").fill_null("") != "")
    lists = list_diagnoses(rows, reasons, stays["hadm_id"])
    refuse_orphans(table.label, lists.dropped["unknown_admission"], frame.height, "a unit stay")
    book.add(
        "diagnosis", frame.height + reasons.height, lists.dropped, items(lists.lists["diagnoses"])
    )
    return lists


def list_diagnoses(
    rows: pl.DataFrame, reasons: pl.DataFrame | None, known: pl.Series
) -> DiagnosisLists:
    """Return each stay's diagnoses by priority and time, with their own words as titles.

    Args:
        rows: hadm_id, rank (of the priority), since (minutes), words, icd9code (a cell, which may
            hold codes of both versions).
        reasons: hadm_id, rank, since, words, icd_version, icd_code: other diagnoses.
        known: hadm_id of the stays.
    """
    written = rows.select("hadm_id", "rank", "since", "words", *_code())
    parts = [written] if reasons is None else [reasons, written]
    coded = pl.concat(parts, how="vertical_relaxed").sort(
        "rank", "since", maintain_order=True, nulls_last=True
    )
    coded = coded.with_columns(seq_num=pl.int_range(pl.len()))
    # A row's own words: those that most patients have would change with each of them.
    titled = coded.with_columns(title=pl.when(pl.col("words") != "").then(_title()))
    key = (*KEY, "title")
    return diagnosis_lists(titled, titled.group_by(key).len("rows").sort(key), known)


def _code() -> tuple[pl.Expr, pl.Expr]:
    """Return version and code of a diagnosis: ICD-10 before ICD-9, else eICU's words."""
    parts = (
        pl.col("icd9code")
        .fill_null("")
        .str.split(",")
        .list.eval(pl.element().str.strip_chars().str.to_uppercase())
    )
    nine = parts.list.eval(pl.element().filter(pl.element().str.contains(_ICD9))).list.first()
    second = parts.list.get(1, null_on_oob=True)
    ten = parts.list.eval(
        pl.element().filter(
            pl.element().str.contains(r"^[A-Z]\d") & ~pl.element().str.contains(_ICD9)
        )
    ).list.first()
    # In second place, behind an ICD-9 code, E and V begin ICD-10 codes too.
    behind = pl.when(second.str.contains(r"^[EV]\d")).then(second)
    ten = pl.coalesce(ten, behind)
    version = (
        pl.when(ten.is_not_null())
        .then(pl.lit("10"))
        .when(nine.is_not_null())
        .then(pl.lit("9"))
        .otherwise(pl.lit(PATH))
    )
    code = pl.coalesce(ten, nine).str.replace_all(".", "", literal=True)
    return version.alias("icd_version"), pl.coalesce(code, "words").alias("icd_code")


def _title() -> pl.Expr:
    """Return the last words of a path, with those above them: ``shock (cardiovascular)``."""
    parts = pl.col("words").str.split("|").list.eval(pl.element().str.strip_chars())
    last, above = parts.list.get(-1), parts.list.get(-2, null_on_oob=True)
    return pl.when(above.is_null()).then(last).otherwise(pl.format("{} ({})", last, above))


def _drugs(
    table: Table, clock: pl.DataFrame, known: pl.Series, book: Book, drop_flushes: bool
) -> DrugLists:
    frame = pl.concat(stream(table, scan(table), chunk_rows=_CHUNK_ROWS))
    cancelled = pl.col("drugordercancelled").fill_null("").str.strip_chars().str.to_lowercase()
    lines = frame.with_columns(
        whole_numbers(table, frame["patientunitstayid"], required=True),
        whole_numbers(table, frame["drugstartoffset"]),
        cancelled=cancelled == "yes",
        drug=pl.col("drugname").fill_null("").cast(pl.Categorical),
    ).join(clock, on="patientunitstayid", how="left")
    lines = lines.with_columns(start=pl.col("drugstartoffset") - pl.col("hospitaladmitoffset"))
    kept = lines.filter(~pl.col("cancelled"))
    kinds = {"MAIN": kept.height, "CANCELLED": lines.height - kept.height}
    orders = Orders(pairs=one_row_per_pair(kept), drug_type=kinds, rows=lines.height)
    lists = drug_lists(orders, known, drop_flushes=drop_flushes)
    book.drug_type = kinds
    refuse_orphans(table.label, lists.dropped["unknown_admission"], kept.height, "a unit stay")
    book.add("medication", lines.height, lists.dropped, items(lists.lists["drugs"]))
    return lists


def measures_of(stays: pl.DataFrame, book: Book) -> Measures:
    """Take height and weight at the first unit's admission; a slipped decimal is rejected.

    Args:
        stays: subject_id, admittime, admissionheight (cm) and admissionweight (kg), as text.
        book: Where the reasons are counted.
    """
    height, weight = (
        pl.col(name).str.strip_chars().cast(pl.Float64, strict=False)
        for name in ("admissionheight", "admissionweight")
    )
    bmi = weight / (height / 100) ** 2
    likely = bmi.is_between(*LIKELY_BMI) | ~(height / CM_PER_INCH).is_between(*PLAUSIBLE["height"])
    slipped = (~likely).fill_null(False)
    common = ("subject_id", pl.col("admittime").cast(pl.Date).alias("date"))
    heights = stays.select(
        *common, kind=pl.lit("height"), value=height / CM_PER_INCH, written="admissionheight"
    )
    weights = stays.select(
        *common,
        kind=pl.lit("weight"),
        value=pl.when(slipped).then(-1.0).otherwise(weight / KG_PER_POUND),
        written="admissionweight",
    )
    cells = pl.concat([heights, weights]).filter(pl.col("written").fill_null("") != "")
    found = cells.drop("written").with_columns(seq_num=pl.lit(0, pl.Int64))
    measures = clean_measures(found, stays["subject_id"].unique())
    book.add("measures", measures.read, measures.dropped, measures.rows.height)
    return measures
