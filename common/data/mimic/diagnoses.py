"""Diagnoses of an admission: ordered titles, joined on code and version together.

The same digits mean different things in ICD-9 and ICD-10, so a join on the code alone is wrong.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import polars as pl

from common.data.tables import NULL_OF_NAMES, Table, read
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
    rows: int
    """Rows read."""
    joined: int
    """Rows whose code and version have a title."""
    unmatched: int
    dropped: Mapping[str, int]
    dictionary_rows: int
    """Rows of the dictionary."""
    dictionary_titles: int
    """Rows of the dictionary that are in use."""
    untitled: Mapping[str, int]
    """Rows of the dictionary that were left out, by reason."""


def diagnosis_lists(table: Table, dictionary: Table, known: pl.Series) -> DiagnosisLists:
    """Join diagnoses with their titles and list them by seq_num.

    Args:
        table: diagnoses_icd as found.
        dictionary: d_icd_diagnoses as found.
        known: Admissions that exist (hadm_id).

    Raises:
        UserError: Damaged tables, ids that cannot be read, or codes that lost their leading zeros.
    """
    titles, untitled, dictionary_rows = _dictionary(dictionary)
    coded = _coded(table, numbers=("hadm_id", "seq_num"))
    # Everything about codes is decided on distinct ones: few thousand instead of millions.
    codes = coded.group_by(_KEY).len("rows").join(titles, on=_KEY, how="left").sort(*_KEY)
    unmatched = codes.filter(pl.col("title").is_null())
    _refuse_lost_zeros(unmatched, codes, titles, table)
    used = codes.filter(pl.col("title").is_not_null()).with_row_index("diagnosis")
    joined, lost = int(used["rows"].sum()), int(unmatched["rows"].sum())
    placed = (
        coded.lazy()
        .join(used.lazy().select(*_KEY, "diagnosis"), on=_KEY)
        .select("hadm_id", "seq_num", "diagnosis")
        .join(known.rename("hadm_id").to_frame().unique().lazy(), on="hadm_id", how="semi")
        .collect()
    )
    ordered = placed.sort("hadm_id", "seq_num", "diagnosis").unique(
        ["hadm_id", "diagnosis"], keep="first", maintain_order=True
    )
    lists = ordered.group_by("hadm_id", maintain_order=True).agg(
        pl.col("diagnosis").alias("diagnoses")
    )
    return DiagnosisLists(
        lists=lists,
        titles=tuple(used["title"]),
        codes=tuple(used.select(pl.format("{}:{}", "icd_version", "icd_code")).to_series()),
        rows=coded.height,
        joined=joined,
        unmatched=lost,
        dropped={
            "unmatched_code": lost,
            "unknown_admission": joined - placed.height,
            "duplicate": placed.height - ordered.height,
        },
        dictionary_rows=dictionary_rows,
        dictionary_titles=titles.height,
        untitled=untitled,
    )


def _coded(table: Table, *, numbers: Sequence[str]) -> pl.DataFrame:
    """Read a table with codes, and refuse codes that are floats: what stood there is not known."""
    frame = read(table, numbers=(*numbers, "icd_version")).with_columns(
        pl.col("icd_code").fill_null("").str.strip_chars()
    )
    floats = int(frame["icd_code"].str.ends_with(".0").sum())
    if floats:
        raise UserError(
            f"{table.label}: {floats} cells of column icd_code end in .0, "
            "as happens when a spreadsheet or data frame reads codes as numbers",
            allowed="codes as text, without a point",
            fix="fetch the original file; read icd_code as text",
        )
    return frame


def _dictionary(table: Table) -> tuple[pl.DataFrame, dict[str, int], int]:
    parsed = _coded(table, numbers=()).select(
        *_KEY,
        pl.col("long_title").str.replace_all(r"\s+", " ").str.strip_chars().alias("title"),
    )
    titled = parsed.filter(~pl.col("title").fill_null("").is_in(["", NULL_OF_NAMES]))
    titles = titled.unique()
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
    return titles, dropped, parsed.height


def _refuse_lost_zeros(
    unmatched: pl.DataFrame, codes: pl.DataFrame, titles: pl.DataFrame, table: Table
) -> None:
    """Raise when unmatched codes match after padding, more often than intact zeros do.

    A few such rows among many intact ones are a flaw of single rows, and stay merely unmatched.
    """
    short = unmatched.filter(pl.col("icd_version") == 9).select(*_KEY, "rows")
    padded = [
        short.with_columns(
            ("0" * zeros + pl.col("icd_code")).alias("icd_code"), pl.col("icd_code").alias("short")
        ).join(titles, on=_KEY, how="semi")
        for zeros in range(1, _LONGEST_ICD9)
    ]
    lost = int(pl.concat(padded).unique("short")["rows"].sum())
    intact = codes.filter(pl.col("icd_code").str.starts_with("0") & pl.col("title").is_not_null())
    if lost > int(intact["rows"].sum()):
        raise UserError(
            f"{table.label}: {lost} rows match no title because column icd_code lost its "
            "leading zeros",
            allowed="codes as text",
            fix="fetch the original file; read icd_code as text, not as a number",
        )
