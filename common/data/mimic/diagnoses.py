"""Codes of diagnoses and procedures with their dictionaries, as text: leading zeros stay."""

from collections.abc import Sequence

import polars as pl

from common.data.cleaning.assemble import Book, items, refuse_orphans
from common.data.cleaning.diagnoses import KEY, DiagnosisLists, diagnosis_lists, match_titles
from common.data.tables import NULL_OF_NAMES, Table, read
from common.errors import UserError

_LONGEST_ICD9 = 5
_MOST_UNMATCHED = 0.5


def read_diagnoses(table: Table, dictionary: Table, known: pl.Series, book: Book) -> DiagnosisLists:
    """Join diagnoses, or procedures, with their titles and list them by seq_num.

    Args:
        table: diagnoses_icd as found, or procedures_icd.
        dictionary: d_icd_diagnoses as found, or d_icd_procedures.
        known: Admissions that exist (hadm_id).
        book: Rows of both are counted here.

    Raises:
        UserError: Damaged tables, ids that cannot be read, or codes that lost their leading zeros.
    """
    titles, untitled = _dictionary(dictionary)
    coded = _coded(table, numbers=("hadm_id", "seq_num"))
    codes = match_titles(coded, titles)
    _refuse_lost_zeros(codes, titles, table)
    lists = diagnosis_lists(coded, codes, known)
    refuse_orphans(table.label, lists.dropped["unknown_admission"], lists.rows, "an admission")
    if lists.unmatched > _MOST_UNMATCHED * lists.rows:
        raise UserError(
            f"{table.label}: {lists.unmatched} of {lists.rows} rows match no title in "
            f"{dictionary.label}",
            fix="use both tables from the same version",
        )
    book.add(table.name, lists.rows, lists.dropped, items(lists.lists["diagnoses"]))
    entries = titles.height + sum(untitled.values())
    book.add(dictionary.name, entries, untitled, titles.height)
    return lists


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


def _dictionary(table: Table) -> tuple[pl.DataFrame, dict[str, int]]:
    parsed = _coded(table, numbers=()).select(
        *KEY,
        pl.col("long_title").str.replace_all(r"\s+", " ").str.strip_chars().alias("title"),
    )
    titled = parsed.filter(~pl.col("title").fill_null("").is_in(["", NULL_OF_NAMES]))
    titles = titled.unique()
    untitled = {
        "no_title": parsed.height - titled.height,
        "duplicate": titled.height - titles.height,
    }
    doubled = titles.height - titles.select(KEY).n_unique()
    if doubled:
        raise UserError(
            f"{table.label}: {doubled} codes have several titles, "
            "as happens when codes lost their leading zeros",
            allowed="one title for each icd_code and icd_version",
            fix="fetch the original file; read icd_code as text",
        )
    return titles, untitled


def _refuse_lost_zeros(codes: pl.DataFrame, titles: pl.DataFrame, table: Table) -> None:
    """Raise when unmatched codes match after padding, more often than intact zeros do.

    A few such rows among many intact ones are a flaw of single rows, and stay merely unmatched.
    """
    unmatched = codes.filter(pl.col("title").is_null())
    short = unmatched.filter(pl.col("icd_version") == 9).select(*KEY, "rows")
    padded = [
        short.with_columns(
            ("0" * zeros + pl.col("icd_code")).alias("icd_code"), pl.col("icd_code").alias("short")
        ).join(titles, on=KEY, how="semi")
        for zeros in range(1, _LONGEST_ICD9)
    ]
    shortened = int(pl.concat(padded).unique("short")["rows"].sum())
    intact = codes.filter(pl.col("icd_code").str.starts_with("0") & pl.col("title").is_not_null())
    if shortened > int(intact["rows"].sum()):
        raise UserError(
            f"{table.label}: {shortened} rows match no title because column icd_code lost its "
            "leading zeros",
            allowed="codes as text",
            fix="fetch the original file; read icd_code as text, not as a number",
        )
