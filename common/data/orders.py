"""Prescriptions: millions of order lines streamed to one drug list per admission.

The table is never held whole: batches are reduced to one row per (admission, spelling) as they
come, and nothing is joined before that. The result does not depend on the batch size, nor on the
order of the rows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import polars as pl

from common.data.mimic import (
    TIME_FORMAT,
    Table,
    bad_times,
    moment,
    reading,
    require_rows,
    scan,
)
from common.data.names import normalise_string

CHUNK_ROWS = 500_000
_COMPACT_ROWS = 2_000_000
_FLUSHED = ("saline", "sodium chloride", "heparin")
_KEYS = ("hadm_id", "drug")
_TOTALS = (pl.col("rows").sum(), pl.col("start").min())


@dataclass(frozen=True, kw_only=True)
class Orders:
    """Order lines of drug_type MAIN, one row per (admission, spelling)."""

    pairs: pl.DataFrame
    """hadm_id (null: no number), drug_id into ``spellings``, rows, start (first; may be null)."""
    spellings: tuple[str, ...]
    """Distinct cells of column drug, sorted; the empty text stands for an empty cell."""
    drug_type: Mapping[str, int]
    """Rows by drug_type, all kinds."""


@dataclass(frozen=True, kw_only=True)
class DrugLists:
    """One drug list per admission."""

    lists: pl.DataFrame
    """hadm_id, drugs: list of indices into ``vocabulary``, by first start."""
    vocabulary: tuple[str, ...]
    counts: Mapping[str, int]
    dropped: Mapping[str, int]
    """Rows left out, by reason; with the list items they add up to the rows read."""


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


def read_orders(
    table: Table,
    *,
    chunk_rows: int = CHUNK_ROWS,
    on_rows: Callable[[int], None] | None = None,
) -> Orders:
    """Stream the prescriptions table.

    Args:
        table: The table as found.
        chunk_rows: Rows per batch; only memory and speed depend on it.
        on_rows: Called with the number of rows read so far.

    Raises:
        UserError: A damaged or empty table, or start times that cannot be read.
    """
    lines = scan(table).select(
        pl.col("hadm_id").str.strip_chars().cast(pl.Int64, strict=False),
        # One process-wide code for each text: rows are then counted and grouped by integers.
        pl.col("drug_type").fill_null("").cast(pl.Categorical),
        pl.col("drug").fill_null("").cast(pl.Categorical),
        pl.col("starttime").str.to_datetime(TIME_FORMAT, strict=False).alias("start"),
        "starttime",
    )
    kinds: dict[str, int] = {}
    parts: list[pl.DataFrame] = []
    rows = lost = loose = 0
    with reading(table):
        for batch in lines.collect_batches(
            chunk_size=chunk_rows, maintain_order=False, engine="streaming"
        ):
            rows += batch.height
            for kind, number in batch["drug_type"].value_counts().iter_rows():
                kinds[kind] = kinds.get(kind, 0) + number
            timed = _timed(batch)
            lost += timed["start"].null_count() - timed["starttime"].null_count()
            parts.append(_one_row_per_pair(timed))
            loose += parts[-1].height
            if loose > max(_COMPACT_ROWS, parts[0].height):
                parts, loose = [_compacted(parts)], 0
            if on_rows is not None:
                on_rows(rows)
    require_rows(table, rows)
    if lost:
        raise bad_times(table, "starttime", lost)
    pairs, spellings = _by_sorted_spelling(_compacted(parts))
    return Orders(pairs=pairs, spellings=spellings, drug_type=kinds)


def drug_lists(orders: Orders, known: pl.Series, *, drop_flushes: bool = True) -> DrugLists:
    """Clean the orders and list each admission's drugs.

    Two spellings that are equal at the string level are one drug, shown in the spelling that
    started first; the list goes by first start, ties and absent times by name.

    Args:
        orders: What ``read_orders`` found.
        known: Admissions that exist (hadm_id).
        drop_flushes: Leave saline and heparin flushes out.
    """
    names = _name_table(orders.spellings)
    main_rows = _rows(orders.pairs)
    named = orders.pairs.join(names, on="drug_id").filter(pl.col("name_id").is_not_null())
    named_rows = _rows(named)
    placed = named.join(known.rename("hadm_id").to_frame().unique(), on="hadm_id", how="semi")
    placed_rows = _rows(placed)
    clean = placed.filter(~pl.col("flush"))
    kept = clean if drop_flushes else placed
    drugs = _one_spelling(kept, names)
    lists = drugs.group_by("hadm_id").agg(
        pl.col("drug_id").sort_by("start", "name_id", nulls_last=True).alias("drugs")
    )
    return DrugLists(
        lists=lists,
        vocabulary=tuple(" ".join(spelling.split()) for spelling in orders.spellings),
        counts={
            "pairs_raw": placed.height,
            "pairs_normalised": placed.select("hadm_id", "name_id").n_unique(),
            "pairs_clean": clean.select("hadm_id", "name_id").n_unique(),
            "names_clean": clean["name_id"].n_unique(),
            "flush_rows": placed_rows - _rows(clean),
        },
        dropped={
            **{
                f"drug_type_{kind.strip().lower() or 'empty'}": number
                for kind, number in sorted(orders.drug_type.items())
                if kind != "MAIN"
            },
            "empty_name": main_rows - named_rows,
            "unknown_admission": named_rows - placed_rows,
            "flush": placed_rows - _rows(kept),
            "duplicate": _rows(kept) - drugs.height,
        },
    )


def _rows(pairs: pl.DataFrame) -> int:
    return int(pairs["rows"].sum())


def _timed(batch: pl.DataFrame) -> pl.DataFrame:
    """Read the rare starts that are a date without a time; most batches have none."""
    if batch["start"].null_count() == batch["starttime"].null_count():
        return batch
    return batch.with_columns(pl.col("start").fill_null(moment("starttime")))


def _one_row_per_pair(batch: pl.DataFrame) -> pl.DataFrame:
    return (
        batch.lazy()
        .filter(pl.col("drug_type") == "MAIN")
        .group_by(_KEYS)
        .agg(pl.len().cast(pl.UInt32).alias("rows"), pl.col("start").min())
        .collect()
    )


def _compacted(parts: Sequence[pl.DataFrame]) -> pl.DataFrame:
    if len(parts) == 1:
        return parts[0]
    return pl.concat(parts).group_by(_KEYS).agg(_TOTALS)


def _by_sorted_spelling(pairs: pl.DataFrame) -> tuple[pl.DataFrame, tuple[str, ...]]:
    """Number spellings by their sorted order, so that ids do not tell how batches came."""
    spellings = sorted(pairs["drug"].unique().cast(pl.String))
    numbers = pl.DataFrame(
        {"drug": spellings, "drug_id": range(len(spellings))},
        schema={"drug": pl.Categorical, "drug_id": pl.UInt32},
    )
    numbered = pairs.join(numbers, on="drug").select("hadm_id", "drug_id", "rows", "start")
    return numbered, tuple(spellings)


def _one_spelling(pairs: pl.DataFrame, names: pl.DataFrame) -> pl.DataFrame:
    """Keep the spelling that started first; only names with several spellings need the sort."""
    several = names.group_by("name_id").len().filter(pl.col("len") > 1)["name_id"]
    varied = pl.col("name_id").is_in(several.implode())
    first = (
        pairs.filter(varied)
        .sort("hadm_id", "name_id", "start", "drug_id", nulls_last=True)
        .unique(["hadm_id", "name_id"], keep="first", maintain_order=True)
    )
    return pl.concat([pairs.filter(~varied), first])


def _name_table(spellings: Sequence[str]) -> pl.DataFrame:
    names = [normalise_string(spelling) for spelling in spellings]
    ranks = {name: rank for rank, name in enumerate(sorted(set(names)))}
    return pl.DataFrame(
        {
            "drug_id": range(len(names)),
            "name_id": [ranks[name] if name else None for name in names],
            "flush": [is_flush(name) for name in names],
        },
        schema={"drug_id": pl.UInt32, "name_id": pl.UInt32, "flush": pl.Boolean},
    )
