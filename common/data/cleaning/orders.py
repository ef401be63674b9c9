"""From order lines, reduced to one row per (admission, spelling), to one drug list per admission.

The result depends neither on the batches in which the lines came, nor on their order.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import polars as pl

from common.data.names import normalise_string
from common.data.tables import NULL_OF_NAMES

_BUCKET_ROWS = 1_000_000
_DIVIDED = (
    *("order_rows", "order_rows_early", "order_rows_before_admission", "order_rows_later"),
    *("pairs_early", "pairs_later", "admissions_later"),
)
_KEYS = ("hadm_id", "drug")
EARLY, BEFORE, LATER = "early_rows", "before_rows", "later_rows"
"""Rows that start in the first part of their stay or before, before it, and in its later part."""
_PARTS = (EARLY, BEFORE, LATER)


@dataclass(frozen=True, kw_only=True)
class Orders:
    """Order lines of drug_type MAIN, reduced batch by batch."""

    pairs: pl.DataFrame
    """hadm_id (null: no number), drug (as spelled; empty for an empty cell), rows, start (first;
    may be null): one row for each batch, admission and spelling. Rows of each part too, where the
    protocol divides stays (``divided``)."""
    drug_type: Mapping[str, int]
    """Rows by drug_type, all kinds, in capitals and without outer blanks."""
    rows: int
    """Rows read."""


@dataclass(frozen=True, kw_only=True)
class DrugLists:
    """One drug list per admission."""

    lists: pl.DataFrame
    """hadm_id, drugs: list of indices into ``vocabulary``, by first start; null: none. Of a stay
    that is divided, ``drugs`` start in its later part, and ``ordered`` in its first."""
    vocabulary: tuple[str, ...]
    counts: Mapping[str, int]
    dropped: Mapping[str, int]
    """Rows left out, by reason; with the list items they add up to the rows read."""
    divided: Mapping[str, int] | None = None
    """Rows and pairs by part of the stay, where it is divided."""

    @property
    def listed(self) -> int:
        """Items of all lists."""
        lists = self.lists.select(pl.col(pl.List).list.len().sum())
        return int(lists.sum_horizontal()[0])


def divided(lines: pl.DataFrame, clock: pl.DataFrame | None) -> pl.DataFrame:
    """Mark which order lines (hadm_id, start) lie in the first part of their stay.

    Args:
        lines: As a source has read them.
        clock: hadm_id, admitted, known_until (in the terms of ``start``); None divides nothing.
    """
    if clock is None:
        return lines
    placed = lines.join(clock, on="hadm_id", how="left")
    return placed.with_columns(
        (pl.col("start") < pl.col("known_until")).fill_null(False).alias(EARLY),
        (pl.col("start") < pl.col("admitted")).fill_null(False).alias(BEFORE),
        (pl.col("start") >= pl.col("known_until")).fill_null(False).alias(LATER),
    )


def is_flush(name: str) -> bool:
    """Tell whether a string-level name is a catheter flush, which is no therapy.

    >>> is_flush("sodium chloride 0.9% flush"), is_flush("heparin flush (10 units/ml)")
    (True, True)
    >>> is_flush("heparin")
    False
    """
    return "flush" in name and any(
        kind in name for kind in ("saline", "sodium chloride", "heparin")
    )


def drug_lists(orders: Orders, known: pl.Series, *, drop_flushes: bool = True) -> DrugLists:
    """Clean the orders and list each admission's drugs.

    Two spellings that are equal at the string level are one drug, shown in the spelling that
    started first; the list goes by first start, ties and absent times by name.

    Args:
        orders: What a source has read.
        known: Admissions that exist (hadm_id).
        drop_flushes: Leave saline and heparin flushes out.
    """
    spellings = sorted(orders.pairs["drug"].unique().cast(pl.String))
    names = _name_table(spellings)
    stays = known.rename("hadm_id").to_frame().unique()
    tally: Counter[str] = Counter()
    parts = [column for column in _PARTS if column in orders.pairs.columns]
    lists, found = [], []
    # An admission is in one bucket, so buckets can be cleaned one after the other, in less memory.
    buckets = 1 + orders.pairs.height // _BUCKET_ROWS
    for bucket in range(buckets):
        merged = (
            orders.pairs.lazy()
            .filter((pl.col("hadm_id").fill_null(0) % buckets).abs() == bucket)
            .group_by(_KEYS)
            .agg(pl.col("rows", *parts).sum(), pl.col("start").min())
            .collect()
        )
        drugs = _clean(merged.join(names, on="drug"), stays, drop_flushes, tally)
        found.append(drugs.filter(~pl.col("flush"))["name_id"].unique())
        lists.append(_listed(drugs, tally) if parts else _by_start(drugs, "drugs"))
    return DrugLists(
        lists=pl.concat(lists),
        vocabulary=tuple(" ".join(spelling.split()) for spelling in spellings),
        counts={
            **{key: tally[key] for key in ("pairs_raw", "pairs_normalised", "pairs_clean")},
            "names_clean": pl.concat(found).n_unique(),
            "flush_rows": tally["flush_rows"],
        },
        dropped={
            **_other_kinds(orders.drug_type),
            **{
                reason: tally[reason]
                for reason in ("empty_name", "unknown_admission", "flush", "duplicate")
            },
            **({"no_start": tally["no_start"]} if parts else {}),
        },
        divided={key: tally[key] for key in _DIVIDED} if parts else None,
    )


def _by_start(drugs: pl.DataFrame, name: str) -> pl.DataFrame:
    return drugs.group_by("hadm_id").agg(
        pl.col("drug_id").sort_by("start", "name_id", nulls_last=True).alias(name)
    )


def _listed(drugs: pl.DataFrame, tally: Counter[str]) -> pl.DataFrame:
    """List what starts early and what starts later and not before; without a start, neither."""
    timed = drugs.filter(pl.col("start").is_not_null())
    early, later = timed.filter(pl.col(EARLY) > 0), timed.filter(pl.col(EARLY) == 0)
    tally.update(
        no_start=drugs.height - timed.height,
        pairs_early=early.height,
        pairs_later=later.height,
        admissions_later=later["hadm_id"].n_unique(),
    )
    return _by_start(later, "drugs").join(
        _by_start(early, "ordered"), on="hadm_id", how="full", coalesce=True
    )


def _other_kinds(drug_type: Mapping[str, int]) -> dict[str, int]:
    """Return the rows that are not MAIN by reason; kinds that share a reason are summed."""
    reasons: Counter[str] = Counter()
    for kind, number in sorted(drug_type.items()):
        if kind != "MAIN":
            reasons[f"drug_type_{kind.lower() or 'empty'}"] += number
    return dict(reasons)


def _clean(
    pairs: pl.DataFrame, stays: pl.DataFrame, drop_flushes: bool, tally: Counter[str]
) -> pl.DataFrame:
    """Return one row per (admission, name) that stays, and count rows and pairs on the way."""
    named = pairs.filter(pl.col("name_id").is_not_null())
    placed = named.join(stays, on="hadm_id", how="semi")
    distinct = _one_spelling(placed)
    therapy = distinct.filter(~pl.col("flush"))
    flush_rows = _rows(placed.filter(pl.col("flush")))
    if EARLY in pairs.columns:
        counted = placed.filter(~pl.col("flush")) if drop_flushes else placed
        tally.update(
            order_rows=_rows(counted),
            order_rows_early=int(counted[EARLY].sum()),
            order_rows_before_admission=int(counted[BEFORE].sum()),
            order_rows_later=int(counted[LATER].sum()),
        )
    dropped_rows, drugs = (flush_rows, therapy) if drop_flushes else (0, distinct)
    tally.update(
        pairs_raw=placed.height,
        pairs_normalised=distinct.height,
        pairs_clean=therapy.height,
        flush_rows=flush_rows,
        empty_name=_rows(pairs) - _rows(named),
        unknown_admission=_rows(named) - _rows(placed),
        flush=dropped_rows,
        duplicate=_rows(placed) - dropped_rows - drugs.height,
    )
    return drugs


def _rows(pairs: pl.DataFrame) -> int:
    return int(pairs["rows"].sum())


def one_row_per_pair(lines: pl.DataFrame) -> pl.DataFrame:
    """Reduce order lines (hadm_id, drug, start; see ``divided``) to ``Orders.pairs``."""
    parts = [pl.col(name).sum() for name in _PARTS if name in lines.columns]
    return (
        lines.lazy()
        .group_by(_KEYS)
        .agg(pl.len().cast(pl.UInt32).alias("rows"), pl.col("start").min(), *parts)
        .collect()
    )


def _one_spelling(pairs: pl.DataFrame) -> pl.DataFrame:
    """Keep the spelling that started first; only names with several spellings need the sort."""
    first = (
        pairs.filter(pl.col("varied"))
        .sort("hadm_id", "name_id", "start", "drug_id", nulls_last=True)
        .unique(["hadm_id", "name_id"], keep="first", maintain_order=True)
    )
    return pl.concat([pairs.filter(~pl.col("varied")), first])


def _name_table(spellings: Sequence[str]) -> pl.DataFrame:
    """Number spellings and string-level names by their sorted order, not by how they came."""
    names = ["" if s.strip() == NULL_OF_NAMES else normalise_string(s) for s in spellings]
    ranks = {name: rank for rank, name in enumerate(sorted(set(names)))}
    uses = Counter(names)
    ids = [ranks[name] if name else None for name in names]
    return pl.DataFrame(
        {
            "drug": pl.Series(spellings, dtype=pl.Categorical),
            "drug_id": pl.Series(range(len(names)), dtype=pl.UInt32),
            "name_id": pl.Series(ids, dtype=pl.UInt32),
            "varied": pl.Series([uses[name] > 1 for name in names], dtype=pl.Boolean),
            "flush": pl.Series([is_flush(name) for name in names], dtype=pl.Boolean),
        }
    )
