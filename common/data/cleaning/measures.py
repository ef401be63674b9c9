"""Height, weight and BMI of an admission, without knowledge from after its day.

Measures know no admission: each takes the latest plausible value on or before its own date.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import polars as pl

from common.data.samples import BmiCheck

KINDS = {"height": "height_cm", "weight": "weight_kg", "bmi": "bmi"}
"""Measure: field of the sample."""
PLAUSIBLE = {"height": (36.0, 96.0), "weight": (40.0, 1200.0), "bmi": (8.0, 200.0)}
"""Inclusive limits in inches, pounds and kg/m2; outside is a typing error, and counted."""
CM_PER_INCH = 2.54
KG_PER_POUND = 0.45359237
BMI_FACTOR = 703.07
"""BMI = lb * 703.07 / in^2."""


@dataclass(frozen=True, kw_only=True)
class Measures:
    """Plausible body measures."""

    rows: pl.DataFrame
    """subject_id, date, seq_num, kind, value."""
    read: int
    """Rows of the table."""
    dropped: Mapping[str, int]
    bmi_check: BmiCheck
    """Of patient-days with height, weight and BMI (the last of each day), outliers included."""


def clean_measures(found: pl.DataFrame, patients: pl.Series) -> Measures:
    """Keep plausible numbers of known patients; count the rest.

    Args:
        found: subject_id, date, seq_num, kind (null: another result), value (null: no number).
        patients: Known subject_ids.
    """
    sorted_out = found.with_columns(
        pl.when(pl.col("kind").is_null())
        .then(pl.lit("other_result"))
        .when(~pl.col("subject_id").is_in(patients.implode()))
        .then(pl.lit("unknown_patient"))
        .when(pl.col("value").is_null() | pl.col("value").is_nan())
        .then(pl.lit("no_number"))
        .when(~_plausible())
        .then(pl.lit("outlier_") + pl.col("kind"))
        .alias("reason")
    )
    reasons = dict(sorted_out["reason"].drop_nulls().value_counts().iter_rows())
    columns = ("subject_id", "date", "seq_num", "kind", "value")
    rows = sorted_out.filter(pl.col("reason").is_null()).select(columns)
    # With the outliers: a wrong height makes a wrong BMI, and the formula holds all the same.
    triples = _same_day_triples(sorted_out.drop_nulls(["kind", "value"]).select(columns))
    error = triples["weight"] * BMI_FACTOR / triples["height"] ** 2 - triples["bmi"]
    order = ("other_result", "unknown_patient", "no_number", *(f"outlier_{k}" for k in KINDS))
    return Measures(
        rows=rows,
        read=found.height,
        dropped={reason: reasons.get(reason, 0) for reason in order},
        bmi_check=BmiCheck(triples=triples.height, within_one=int((error.abs() <= 1).sum())),
    )


def measures_at_admission(admissions: pl.DataFrame, measures: Measures) -> pl.DataFrame:
    """Give each admission its latest measures, in metric units.

    BMI follows from height and weight where both are known, and is the latest recorded otherwise.

    Args:
        admissions: hadm_id, subject_id, admittime.
        measures: From ``clean_measures``.

    Returns:
        hadm_id, height_cm, weight_kg, bmi (null where never measured before).
    """
    result = admissions.select("hadm_id", "subject_id", pl.col("admittime").cast(pl.Date))
    for kind, column in KINDS.items():
        latest = (
            measures.rows.filter(pl.col("kind") == kind)
            .sort("subject_id", "date", "seq_num", "value")
            .unique(["subject_id", "date"], keep="last", maintain_order=True)
            .select("subject_id", "date", pl.col("value").alias(column))
            .sort("date")
        )
        result = result.sort("admittime").join_asof(
            latest,
            left_on="admittime",
            right_on="date",
            by="subject_id",
            strategy="backward",
            check_sortedness=False,
        )
        result = result.drop("date", strict=False)
    both = pl.col("weight_kg") * BMI_FACTOR / pl.col("height_cm") ** 2
    return result.select(
        "hadm_id",
        (pl.col("height_cm") * CM_PER_INCH).round(1),
        (pl.col("weight_kg") * KG_PER_POUND).round(1),
        pl.coalesce(both, "bmi").round(1).alias("bmi"),
    )


def _plausible() -> pl.Expr:
    verdict = pl.lit(False)
    for kind, (low, high) in PLAUSIBLE.items():
        verdict |= (pl.col("kind") == kind) & pl.col("value").is_between(low, high)
    return verdict


def _same_day_triples(rows: pl.DataFrame) -> pl.DataFrame:
    last = rows.sort("seq_num", "value").unique(
        ["subject_id", "date", "kind"], keep="last", maintain_order=True
    )
    days = last.pivot("kind", on_columns=list(KINDS), index=["subject_id", "date"], values="value")
    return days.drop_nulls(list(KINDS))
