"""From cleaned parts to one row per admission, with every dropped row counted under its reason."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from common.data.cleaning.diagnoses import DiagnosisLists
from common.data.cleaning.measures import KINDS, Measures, measures_at_admission
from common.data.cleaning.orders import DrugLists
from common.data.cleaning.protocols import (
    COLUMNS,
    Extra,
    counts_of,
    first_24h,
    visits,
    with_extra,
)
from common.data.protocols import ADMISSION, FIRST_24H, VISITS
from common.data.samples import (
    UNKNOWN,
    Counts,
    Lengths,
    Outliers,
    Prepared,
    Range,
)
from common.errors import UserError

OLDEST_SHOWN_AGE = 89
PLAUSIBLE_AGE = (0, 120)
"""Inclusive limits; outside is a typing error, and the admission is dropped and counted."""
ATTRIBUTES = ("service", "admission_type", "insurance", "anchor_year_group", "careunit")
SITE = "site"
"""Only in samples of a source that names sites."""
_MOST_ORPHANS = 0.5
_NEEDED = {"implausible_age": "age", "no_diagnoses": "diagnoses", "no_drugs": "drugs"}
"""Reason to leave an admission out: what it lacks then."""
_FEWEST = {
    ADMISSION: "at least one admission with a plausible age, diagnoses and MAIN drugs",
    VISITS: "at least one patient with two such admissions",
    FIRST_24H: "at least one admission with a drug that is ordered after 24 hours and not before",
}


@dataclass
class Book:
    """Rows in, rows out and reasons, by table; each is counted by itself, none by subtraction."""

    rows: dict[str, int] = field(default_factory=dict)
    """Read."""
    out: dict[str, int] = field(default_factory=dict)
    """In use: rows, or items of lists."""
    dropped: dict[str, dict[str, int]] = field(default_factory=dict)
    drug_type: dict[str, int] = field(default_factory=dict)

    def add(self, table: str, rows: int, dropped: Mapping[str, int], out: int) -> None:
        """Count a table: rows read, left out by reason, and rows or items that are in use."""
        self.rows[table], self.out[table] = rows, out
        self.drop(table, dropped)

    def drop(self, table: str, reasons: Mapping[str, int]) -> None:
        """Count rows that were left out, each reason once."""
        self.dropped.setdefault(table, {}).update(reasons)


def refuse_orphans(label: str, orphans: int, rows: int, parent: str) -> None:
    """A few orphans are counted and dropped; more than half means that tables do not belong.

    Raises:
        UserError: More than half of the rows have no parent.
    """
    if orphans > _MOST_ORPHANS * rows:
        raise UserError(
            f"{label}: {orphans} of {rows} rows belong to {parent} that is in no table",
            fix="use all tables from the same version of the data",
        )


def first_values(
    table: str, rows: int, named: pl.DataFrame, known: pl.Series, book: Book
) -> pl.DataFrame:
    """Return the first value of each admission that exists, and count the other rows.

    Args:
        table: Where they are counted.
        rows: Read, values that are none included.
        named: hadm_id and a value, in the order of time.
        known: Admissions that exist (hadm_id).
        book: Counts them.
    """
    placed = named.filter(pl.col("hadm_id").is_in(known.implode()))
    first = placed.unique("hadm_id", keep="first", maintain_order=True)
    unused = {
        "not_in_use": rows - named.height,
        "unknown_admission": named.height - placed.height,
        "later": placed.height - first.height,
    }
    book.add(table, rows, unused, first.height)
    return first


def plausible_age(age: pl.Expr) -> pl.Expr:
    """Return the age, null where it cannot be one."""
    return pl.when(age.is_between(*PLAUSIBLE_AGE)).then(age)


def assemble(
    stays: pl.DataFrame,
    book: Book,
    *,
    diagnoses: DiagnosisLists,
    drugs: DrugLists,
    measures: Measures,
    folder: Path,
    null_spelled: Mapping[str, int],
    extra: Extra | None = None,
) -> Prepared:
    """Join the parts; an admission that lacks an age, diagnoses or drugs is dropped and counted.

    Args:
        stays: hadm_id, subject_id, admittime, gender, age (null: implausible); and what the
            source has of ``anchor_age``, ``ATTRIBUTES`` and ``SITE``.
        book: What was counted so far.
        diagnoses: Of the admissions.
        drugs: Of the admissions.
        measures: Of the patients.
        folder: Named where nothing is left.
        null_spelled: Cells that spelled NULL, by ``table.column``.
        extra: What another protocol than ``admission`` needs; ``first-24h`` also needs ``ended``
            in ``stays``, when each was over.

    Raises:
        UserError: No sample is left.
    """
    samples = (
        stays.join(diagnoses.lists, on="hadm_id", how="left")
        .join(drugs.lists, on="hadm_id", how="left")
        .join(measures_at_admission(stays, measures), on="hadm_id", how="left")
        .sort("subject_id", "admittime", "hadm_id")
    )
    complete = _as_asked(samples, stays, diagnoses, book, extra)
    book.out["admissions"] = complete.height
    if complete.is_empty():
        raise UserError(
            f"no samples after cleaning in {folder}",
            allowed=_FEWEST[extra.protocol if extra else ADMISSION],
            fix="check that the tables come from one version of the data",
        )
    frame = _sample_columns(complete)
    lengths = frame["drugs"].list.len()
    tall, heavy = frame["height_cm"].is_not_null(), frame["weight_kg"].is_not_null()
    age = stays["age"]
    counts = Counts(
        rows=book.rows,
        rows_out=book.out,
        drug_type=dict.fromkeys(("MAIN", "BASE", "ADDITIVE"), 0) | book.drug_type,
        **drugs.counts,
        samples=frame.height,
        patients=frame["patient"].n_unique(),
        drugs_per_sample=Lengths(mean=int(lengths.sum()) / frame.height, **_range(lengths)),
        diagnosis_rows_joined=diagnoses.joined,
        diagnosis_rows_unmatched=diagnoses.unmatched,
        age_differs_from_anchor=int((age != stays["anchor_age"]).sum())
        if "anchor_age" in stays.columns
        else 0,
        age_over_89=int((age > OLDEST_SHOWN_AGE).sum()),
        age=Range(**_range(age)),
        height=int(tall.sum()),
        weight=int(heavy.sum()),
        height_and_weight=int((tall & heavy).sum()),
        no_height_no_weight=int((~tall & ~heavy).sum()),
        outliers=Outliers(**{kind: measures.dropped[f"outlier_{kind}"] for kind in KINDS}),
        bmi_check=measures.bmi_check,
        dropped={
            f"{table}.{reason}": number
            for table, reasons in book.dropped.items()
            for reason, number in reasons.items()
        },
        null_spelled=dict(null_spelled),
        protocol=counts_of(extra, complete, drugs.divided or {}) if extra else None,
    )
    return Prepared(
        frame=frame,
        drugs=drugs.vocabulary,
        titles=diagnoses.titles,
        codes=diagnoses.codes,
        counts=counts,
        procedures=extra.procedures if extra else (),
    )


def items(lists: pl.Series) -> int:
    """Return how many items all lists hold."""
    return int(lists.list.len().sum())


def _as_asked(
    samples: pl.DataFrame,
    stays: pl.DataFrame,
    diagnoses: DiagnosisLists,
    book: Book,
    extra: Extra | None,
) -> pl.DataFrame:
    """Return the admissions that pose what the protocol asks, with all that it shows."""
    if extra is None:
        return _complete(samples, book, _NEEDED)
    samples = with_extra(samples, extra)
    if extra.protocol == FIRST_24H:
        # What was coded at discharge must not decide which admissions there are.
        complete = _complete(samples, book, {"implausible_age": "age", "no_later_drugs": "drugs"})
        return first_24h(stays.join(diagnoses.lists, on="hadm_id", how="left"), complete)
    complete = _complete(samples, book, _NEEDED)
    several = visits(complete)
    book.drop("admissions", {"only_visit": complete.height - several.height})
    return several


def _complete(samples: pl.DataFrame, book: Book, needed: Mapping[str, str]) -> pl.DataFrame:
    """Keep the admissions that lack nothing; the first thing that is missing is the reason."""
    for reason, column in needed.items():
        kept = samples.filter(pl.col(column).is_not_null())
        book.drop("admissions", {reason: samples.height - kept.height})
        samples = kept
    return samples


def _sample_columns(complete: pl.DataFrame) -> pl.DataFrame:
    there = complete.columns
    return complete.select(
        pl.col("subject_id").alias("patient"),
        pl.col("hadm_id").alias("admission"),
        *("age", "height_cm", "weight_kg", "bmi", "diagnoses", "drugs"),
        pl.col("gender").fill_null(UNKNOWN).alias("sex"),
        *(
            pl.col(name).fill_null(UNKNOWN) if name in there else pl.lit(UNKNOWN).alias(name)
            for name in (*ATTRIBUTES, SITE)
            if name in there or name != SITE
        ),
        *(name for name in COLUMNS if name in there),
    )


def _range(numbers: pl.Series) -> dict[str, int]:
    low, high = numbers.min(), numbers.max()
    assert isinstance(low, int)
    assert isinstance(high, int)
    return {"min": low, "max": high}
