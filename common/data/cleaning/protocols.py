"""What a protocol adds to samples, in columns; the rules are in ``common.data.protocols``."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import polars as pl

from common.data.protocols import FEWEST_VISITS, FIRST_24H, KNOWN_FOR, VISITS
from common.data.samples import ProtocolCounts

_LISTS = {
    "procedures": pl.List(pl.UInt32),
    "ordered": pl.List(pl.UInt32),
    "services": pl.List(pl.String),
    "labs": pl.List(pl.String),
}
"""Columns of samples that ``admission`` does not have."""
_VISIT = ("diagnoses", "procedures", "drugs")
COLUMNS = (*_LISTS, "earlier", *(f"visit_{name}" for name in _VISIT))
"""What such samples have beyond the others."""
_ORDER = ("subject_id", "admittime", "hadm_id")


@dataclass(frozen=True, kw_only=True)
class Extra:
    """What a source read for a protocol beyond what every protocol needs."""

    protocol: str
    absent: tuple[str, ...] = ()
    """Optional tables that are not there."""
    frames: tuple[pl.DataFrame, ...] = ()
    """hadm_id, and one of ``procedures`` (indices into ``titles``), ``services`` or ``labs``."""
    procedures: tuple[str, ...] = ()
    """Titles."""
    counted: Mapping[str, int] = field(default_factory=dict)


def clock(stays: pl.DataFrame) -> pl.DataFrame:
    """Return hadm_id, admitted and known_until: what happens before the latter is known."""
    return stays.select(
        "hadm_id", admitted="admittime", known_until=pl.col("admittime") + KNOWN_FOR
    )


def first_24h(stays: pl.DataFrame, joined: pl.DataFrame) -> pl.DataFrame:
    """Return samples that show what was known 24 hours after admission.

    Earlier stays are those that had begun and ended when this one began: their diagnoses are
    coded. MIMIC-IV has stays that end before they begin: when those ended is not known.

    Args:
        stays: hadm_id, subject_id, admittime, ended (null: not known), diagnoses (null: none).
        joined: Admissions with all columns, in the order of patient and time.
    """
    coded = stays.filter(pl.col("diagnoses").is_not_null())
    past = _past(coded, joined.select("hadm_id", "subject_id", "admittime"))
    # Not even the reference to this stay's own diagnoses goes on from here.
    return _with_visits(joined.with_columns(diagnoses=_empty()), coded, past, ("diagnoses",))


def visits(joined: pl.DataFrame) -> pl.DataFrame:
    """Return the samples of patients with several, which show the samples before them.

    Of two that begin at one time neither is before the other.
    """
    several = joined.filter(pl.len().over("subject_id") >= FEWEST_VISITS)
    before = pl.col("admittime").rank("min").over("subject_id").cast(pl.UInt32) - 1
    past = several.select("hadm_id", earlier=pl.int_ranges(0, before, dtype=pl.UInt32))
    return _with_visits(several, several, past, _VISIT)


def with_extra(joined: pl.DataFrame, extra: Extra) -> pl.DataFrame:
    """Join what a source read for the protocol, and an empty column for what it did not."""
    for frame in extra.frames:
        joined = joined.join(frame, on="hadm_id", how="left")
    return joined.with_columns(
        (
            pl.col(name).fill_null(pl.lit([], kind)) if name in joined.columns else pl.lit([], kind)
        ).alias(name)
        for name, kind in _LISTS.items()
    )


def counts_of(extra: Extra, samples: pl.DataFrame, pairs: Mapping[str, int]) -> ProtocolCounts:
    """Count what a protocol made of the samples.

    Args:
        extra: What was read for it.
        samples: As they go out.
        pairs: Order rows and pairs by part of the stay, where it is divided.
    """
    counted = {**extra.counted, **pairs}
    if extra.protocol == VISITS:
        sizes = samples.group_by("subject_id").len()["len"]
        counted |= {
            "patients": sizes.len(),
            "visits": samples.height,
            "after_the_first": samples.height - sizes.len(),
            "most_visits": int(sizes.max() or 0),  # type: ignore[arg-type]
            "with_procedures": int((samples["procedures"].list.len() > 0).sum()),
        }
    if extra.protocol == FIRST_24H:
        counted |= {
            f"with_{name}": int((samples[name].list.len() > 0).sum())
            for name in ("earlier", "ordered", "services", "labs")
        }
    return ProtocolCounts(name=extra.protocol, absent=extra.absent, counted=counted)


def _empty() -> pl.Expr:
    return pl.lit([], pl.List(pl.UInt32))


def _past(stays: pl.DataFrame, samples: pl.DataFrame) -> pl.DataFrame:
    """Return hadm_id and ``earlier``: places of the patient's stays that had ended before."""
    numbered = stays.sort(*_ORDER).select(
        "subject_id",
        "ended",
        begun="admittime",
        place=pl.int_range(pl.len(), dtype=pl.UInt32).over("subject_id"),
    )
    begun, ended, now = map(pl.col, ("begun", "ended", "admittime"))
    pairs = samples.join(numbered, on="subject_id").filter(
        begun < now, begun <= ended, ended <= now
    )
    return pairs.sort("place").group_by("hadm_id").agg(pl.col("place").alias("earlier"))


def _with_visits(
    samples: pl.DataFrame, stays: pl.DataFrame, past: pl.DataFrame, shown: tuple[str, ...]
) -> pl.DataFrame:
    """Add ``earlier``, and to each patient's first sample the stays that it counts in."""
    listed = stays.sort(*_ORDER).select(
        "subject_id",
        *(
            (pl.col(name).fill_null(_empty()) if name in shown else _empty()).alias(f"visit_{name}")
            for name in _VISIT
        ),
    )
    visited = listed.group_by("subject_id", maintain_order=True).agg(pl.all())
    first = samples.unique("subject_id", keep="first", maintain_order=True)
    first = first.select("hadm_id", "subject_id").join(visited, on="subject_id")
    return (
        samples.join(first.drop("subject_id"), on="hadm_id", how="left")
        .join(past, on="hadm_id", how="left")
        .with_columns(pl.col("earlier").fill_null(_empty()))
        .sort(*_ORDER)
    )
