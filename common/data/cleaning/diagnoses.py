"""Diagnoses of an admission: ordered titles, joined on code and version together.

The same digits mean different things in ICD-9 and ICD-10, so a join on the code alone is wrong.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import polars as pl

KEY = ("icd_code", "icd_version")


@dataclass(frozen=True, kw_only=True)
class DiagnosisLists:
    """One ordered diagnosis list per admission."""

    lists: pl.DataFrame
    """hadm_id, diagnoses: list of indices into ``titles`` and ``codes``."""
    titles: tuple[str, ...]
    codes: tuple[str, ...]
    """``version:code``, parallel to ``titles``."""
    rows: int
    """Rows read."""
    joined: int
    """Rows whose code and version have a title."""
    unmatched: int
    dropped: Mapping[str, int]


def match_titles(coded: pl.DataFrame, titles: pl.DataFrame) -> pl.DataFrame:
    """Return the distinct codes of ``coded`` with their rows and titles (null: there is none).

    Everything about codes is decided on distinct ones: few thousand instead of millions.

    Args:
        coded: icd_code, icd_version.
        titles: icd_code, icd_version, title; each code and version once.
    """
    return coded.group_by(KEY).len("rows").join(titles, on=KEY, how="left").sort(*KEY)


def diagnosis_lists(coded: pl.DataFrame, codes: pl.DataFrame, known: pl.Series) -> DiagnosisLists:
    """List the diagnoses of each admission by seq_num, each code once.

    Args:
        coded: hadm_id, seq_num, icd_code, icd_version; where rows have titles of their own, title.
        codes: From ``match_titles``, or the distinct codes and titles of ``coded`` with their rows.
        known: Admissions that exist (hadm_id).
    """
    key = [name for name in (*KEY, "title") if name in coded.columns]
    used = codes.filter(pl.col("title").is_not_null()).with_row_index("diagnosis")
    used = used.with_columns(code=pl.col("diagnosis").first().over(KEY))
    joined = int(used["rows"].sum())
    unmatched = coded.height - joined
    placed = (
        coded.lazy()
        .join(used.lazy().select(*key, "diagnosis", "code"), on=key)
        .select("hadm_id", "seq_num", "diagnosis", "code")
        .join(known.rename("hadm_id").to_frame().unique().lazy(), on="hadm_id", how="semi")
        .collect()
    )
    ordered = placed.sort("hadm_id", "seq_num", "diagnosis").unique(
        ["hadm_id", "code"], keep="first", maintain_order=True
    )
    return DiagnosisLists(
        lists=ordered.group_by("hadm_id", maintain_order=True).agg(
            pl.col("diagnosis").alias("diagnoses")
        ),
        titles=tuple(used["title"]),
        codes=tuple(used.select(pl.format("{}:{}", "icd_version", "icd_code")).to_series()),
        rows=coded.height,
        joined=joined,
        unmatched=unmatched,
        dropped={
            "unmatched_code": unmatched,
            "unknown_admission": joined - placed.height,
            "duplicate": placed.height - ordered.height,
        },
    )
