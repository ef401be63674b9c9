"""Diagnoses of an admission: ordered titles, joined on code and version together.

The same digits mean different things in ICD-9 and ICD-10, so a join on the code alone is wrong.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import polars as pl

from common.data.mimic import Table, whole_numbers
from common.errors import UserError

_KEY = ["icd_code", "icd_version"]
_LONGEST_ICD9 = 5


@dataclass(frozen=True, kw_only=True)
class DiagnosisLists:
    """One ordered diagnosis list per admission."""

    lists: pl.DataFrame
    """hadm_id, diagnoses: list of indices into ``titles`` and ``codes``."""
    titles: tuple[str, ...]
    codes: tuple[str, ...]
    """``version:code``, parallel to ``titles``."""
    joined: int
    """Rows whose code and version have a title."""
    unmatched: int
    dropped: Mapping[str, int]
    untitled: Mapping[str, int]
    """Rows of the dictionary that were left out, by reason."""


def diagnosis_lists(
    rows: pl.DataFrame,
    table: Table,
    dictionary: pl.DataFrame,
    dictionary_table: Table,
    known: pl.Series,
) -> DiagnosisLists:
    """Join diagnoses with their titles and list them by seq_num.

    Args:
        rows: diagnoses_icd as text.
        table: Its file, for messages.
        dictionary: d_icd_diagnoses as text.
        dictionary_table: Its file, for messages.
        known: Admissions that exist (hadm_id).

    Raises:
        UserError: Ids that cannot be read, or codes that lost their leading zeros.
    """
    titles, untitled = _dictionary(dictionary, dictionary_table)
    coded = whole_numbers(rows, table, ("hadm_id", "seq_num", "icd_version")).with_columns(
        pl.col("icd_code").fill_null("").str.strip_chars()
    )
    joined = coded.join(titles.drop("title"), on=_KEY, how="left", maintain_order="left")
    unmatched = joined.filter(pl.col("diagnosis").is_null())
    _refuse_lost_zeros(unmatched, joined, titles, table)
    matched = joined.filter(pl.col("diagnosis").is_not_null())
    placed = matched.join(known.rename("hadm_id").to_frame().unique(), on="hadm_id", how="semi")
    ordered = (
        placed.select("hadm_id", "seq_num", "diagnosis")
        .sort("hadm_id", "seq_num", "diagnosis")
        .unique(["hadm_id", "diagnosis"], keep="first", maintain_order=True)
    )
    used = titles.join(ordered, on="diagnosis", how="semi", maintain_order="left")
    lists = (
        ordered.join(
            used.select("diagnosis").with_row_index("number"), on="diagnosis", maintain_order="left"
        )
        .group_by("hadm_id", maintain_order=True)
        .agg(pl.col("number").alias("diagnoses"))
    )
    return DiagnosisLists(
        lists=lists,
        titles=tuple(used["title"]),
        codes=tuple(used.select(pl.format("{}:{}", "icd_version", "icd_code")).to_series()),
        joined=matched.height,
        unmatched=unmatched.height,
        dropped={
            "unmatched_code": unmatched.height,
            "unknown_admission": matched.height - placed.height,
            "duplicate": placed.height - ordered.height,
        },
        untitled=untitled,
    )


def _dictionary(frame: pl.DataFrame, table: Table) -> tuple[pl.DataFrame, dict[str, int]]:
    parsed = whole_numbers(frame, table, ("icd_version",)).select(
        pl.col("icd_code").fill_null("").str.strip_chars(),
        "icd_version",
        pl.col("long_title").str.replace_all(r"\s+", " ").str.strip_chars(),
    )
    titled = parsed.filter(pl.col("long_title").fill_null("") != "")
    titles = titled.unique().sort(*_KEY, "long_title")
    dropped = {
        "no_title": parsed.height - titled.height,
        "duplicate": titled.height - titles.height,
    }
    doubled = titles.height - titles.select(_KEY).n_unique()
    if doubled:
        raise UserError(
            f"{table.label}: {doubled} codes have several titles, "
            "as happens when codes lost their leading zeros",
            allowed="one title for each icd_code and icd_version",
            fix="fetch the original file; read icd_code as text",
        )
    return titles.rename({"long_title": "title"}).with_row_index("diagnosis"), dropped


def _refuse_lost_zeros(
    unmatched: pl.DataFrame, joined: pl.DataFrame, titles: pl.DataFrame, table: Table
) -> None:
    """Raise when unmatched codes match after padding, more often than intact zeros do.

    A few such rows among many intact ones are a flaw of single rows, and stay merely unmatched.
    """
    short = unmatched.filter(pl.col("icd_version") == 9).select("hadm_id", "seq_num", *_KEY)
    padded = [
        short.with_columns(("0" * zeros + pl.col("icd_code")).alias("icd_code")).join(
            titles, on=_KEY, how="semi"
        )
        for zeros in range(1, _LONGEST_ICD9)
    ]
    lost = pl.concat(padded).select("hadm_id", "seq_num").n_unique()
    intact = joined.filter(
        pl.col("icd_code").str.starts_with("0") & pl.col("diagnosis").is_not_null()
    ).height
    if lost > intact:
        raise UserError(
            f"{table.label}: {lost} rows match no title because column icd_code lost its "
            "leading zeros",
            allowed="codes as text",
            fix="fetch the original file; read icd_code as text, not as a number",
        )
