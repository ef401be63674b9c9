"""From events to samples: linked to admissions, cleaned by the common rules, and counted.

Shards are read one after the other: MEDS keeps a subject's events in one shard.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import polars as pl

from common.data.cleaning.assemble import (
    SITE,
    Book,
    assemble,
    first_values,
    items,
    plausible_age,
    refuse_orphans,
)
from common.data.cleaning.diagnoses import DiagnosisLists, diagnosis_lists, match_titles
from common.data.cleaning.measures import CM_PER_INCH, KG_PER_POUND, Measures, clean_measures
from common.data.cleaning.orders import DrugLists, Orders, divided, drug_lists, one_row_per_pair
from common.data.cleaning.protocols import Extra, clock
from common.data.meds.codes import Codes
from common.data.meds.events import find_shards, read_shards, read_titles, split_code
from common.data.protocols import ADMISSION, FIRST_24H, VISITS
from common.data.samples import Prepared, Progress
from common.errors import UserError

UNITS = {"in": 1.0, "cm": 1 / CM_PER_INCH, "lb": 1.0, "kg": 1 / KG_PER_POUND, "kg/m2": 1.0}
"""Factor to the units of the cleaning rules."""
NO_NAME = "UNK"
"""How MEDS extractions write a part that was NULL."""
_NOT_READ = {
    VISITS: ("procedures_icd", "d_icd_procedures"),
    FIRST_24H: ("services", "labevents", "d_labitems"),
}
"""What a protocol shows of MIMIC-IV's tables and events are not read for."""
_ATTRIBUTES = ("careunit", "insurance", "service")
_FIX = "check the codes (data.meds-codes) and the extraction"


def prepare_events(
    folder: Path,
    codes: Codes,
    *,
    drop_flushes: bool,
    progress: Progress,
    protocol: str = ADMISSION,
) -> Prepared:
    """Read, clean and join the events of a MEDS data set.

    Args:
        folder: Holds ``data/`` and ``metadata/``.
        codes: What the codes mean.
        drop_flushes: Leave saline and heparin flushes out of the drug lists.
        progress: Called with one line for each step.
        protocol: ``data.protocol``; procedures, services and results are not read.

    Raises:
        UserError: Shards that cannot be used as they are, or without an event of a needed kind.
    """
    find_shards(folder)
    titles = read_titles(folder, codes)
    rows, found = Counter[str](), defaultdict[str, list[pl.DataFrame]](list)
    for label, kinds, total in read_shards(folder, codes, progress):
        rows.update({"events": total, **{kind: group.height for kind, group in kinds.items()}})
        before = sum(map(len, found["admission"]))
        for kind, part in _of_shard(kinds, label, codes, before, protocol == FIRST_24H):
            found[kind].append(part)
    absent = _NOT_READ.get(protocol, ())
    extra = Extra(protocol=protocol, absent=absent) if absent else None
    whole = {kind: pl.concat(parts) for kind, parts in found.items()}
    return _join(whole, rows, titles, folder, codes, drop_flushes, extra)


def _of_shard(
    kinds: Mapping[str, pl.DataFrame], label: str, codes: Codes, before: int, divide: bool
) -> Iterator[tuple[str, pl.DataFrame]]:
    """Yield a shard's events by kind, with their admissions; ``before`` came in earlier shards."""
    stays = _stays(kinds["admission"], kinds["discharge"], label, codes).with_columns(
        # An admission without a number gets one of its own, below zero.
        hadm_id=pl.coalesce("admission", -1 - pl.int_range(pl.len()) - before)
    )
    yield "admission", stays
    yield from ((kind, kinds[kind]) for kind in ("birth", "sex", "measure"))
    yield "diagnosis", _placed(kinds["diagnosis"], stays)
    drugs = _placed(kinds["drug"], stays).select(
        "hadm_id",
        _part(codes.drug, 0).replace(NO_NAME, "").fill_null("").cast(pl.Categorical).alias("drug"),
        pl.col("time").alias("start"),
    )
    yield "drug", one_row_per_pair(divided(drugs, clock(stays) if divide else None))
    for kind in _ATTRIBUTES:
        value = _part(codes.prefixes[kind], 0).replace(NO_NAME, None)
        named = _placed(kinds[kind], stays).with_columns(value.alias(kind))
        yield kind, named.sort("hadm_id", "time", kind, nulls_last=True).select("hadm_id", kind)


def _stays(
    admissions: pl.DataFrame, discharges: pl.DataFrame, label: str, codes: Codes
) -> pl.DataFrame:
    """Return one row per admission with its end: that of the same number, or else the next one."""
    timeless = admissions["time"].null_count()
    if timeless:
        raise UserError(f"{label}: {timeless} admissions have no time", fix=_FIX)
    distinct = admissions.unique(
        ["subject_id", "time", "code", "admission"], keep="first", maintain_order=True
    )
    numbered = distinct["admission"].drop_nulls()
    doubled = len(numbered) - numbered.n_unique()
    if doubled:
        raise UserError(
            f"{label}: {doubled} events repeat an admission with other content",
            allowed="one admission event for each admission",
            fix=_FIX,
        )
    named = discharges.drop_nulls("admission").group_by("admission").agg(pl.col("time").max())
    nameless = discharges.filter(pl.col("admission").is_null()).select("subject_id", "time")
    following = nameless.drop_nulls().with_columns(end=pl.col("time")).sort("time")
    stays = (
        distinct.select(
            "subject_id",
            "admission",
            pl.col("time").alias("admittime"),
            _part(codes.admission, 0).replace(NO_NAME, None).alias("admission_type"),
            SITE,
        )
        .join(named.rename({"time": "named"}), on="admission", how="left")
        .sort("admittime")
        .join_asof(
            following,
            left_on="admittime",
            right_on="time",
            by="subject_id",
            strategy="forward",
            check_sortedness=False,
        )
    )
    return stays.with_columns(end=pl.coalesce("named", "end")).drop("named", "time", strict=False)


def _placed(events: pl.DataFrame, stays: pl.DataFrame) -> pl.DataFrame:
    """Give each event its admission: the one it names, or the one that its time lies in."""
    around = stays.select("subject_id", "admittime", "end", around="hadm_id").sort("admittime")
    timed = events.sort("time", maintain_order=True).join_asof(
        around,
        left_on="time",
        right_on="admittime",
        by="subject_id",
        strategy="backward",
        check_sortedness=False,
    )
    inside = pl.when(pl.col("end").is_null() | (pl.col("time") <= pl.col("end"))).then("around")
    return timed.with_columns(hadm_id=pl.coalesce("admission", inside)).sort("row")


def _join(
    kinds: Mapping[str, pl.DataFrame],
    rows: Mapping[str, int],
    titles: pl.DataFrame,
    folder: Path,
    codes: Codes,
    drop_flushes: bool,
    extra: Extra | None,
) -> Prepared:
    book = Book()
    count_events(rows, codes, folder, book)
    stays = _known_stays(kinds, rows["admission"], codes, book)
    known = stays["hadm_id"]
    diagnoses = _diagnoses(kinds["diagnosis"], titles, known, book, codes)
    measures = _measures(kinds["measure"], kinds["birth"], codes, book)
    drugs = list_drugs(kinds["drug"], rows["drug"], known, book, drop_flushes)
    for kind in _ATTRIBUTES:
        named = kinds[kind].drop_nulls(kind)
        values = first_values(kind, kinds[kind].height, named, known, book)
        stays = stays.join(values, on="hadm_id", how="left")
    if not stays[SITE].drop_nulls().len():
        stays = stays.drop(SITE)
    return assemble(
        stays,
        book,
        diagnoses=diagnoses,
        drugs=drugs,
        measures=measures,
        folder=folder,
        null_spelled={},
        extra=extra,
    )


def list_drugs(
    pairs: pl.DataFrame, rows: int, known: pl.Series, book: Book, drop_flushes: bool
) -> DrugLists:
    """List each admission's drugs, from orders reduced shard by shard, and count their rows."""
    book.drug_type = {"MAIN": rows}
    reduced = Orders(pairs=pairs, drug_type=book.drug_type, rows=rows)
    drugs = drug_lists(reduced, known, drop_flushes=drop_flushes)
    refuse_orphans("drugs", drugs.dropped["unknown_admission"], rows, "an admission")
    book.add("drugs", rows, drugs.dropped, drugs.listed)
    return drugs


def count_events(rows: Mapping[str, int], codes: Codes, folder: Path, book: Book) -> None:
    """Count events in use and others.

    Args:
        rows: Events by kind, and ``events``: all of them.
        codes: What the codes mean.
        folder: Of the data set.
        book: Where they are counted.

    Raises:
        UserError: Without an event of a needed kind.
    """
    for kind in ("admission", "diagnosis", "drug"):
        if not rows[kind]:
            raise UserError(
                f"{folder} holds no event whose code begins with {codes.prefixes[kind]}",
                allowed="admissions, diagnoses and drugs under the codes of MIMIC-IV's or eICU's "
                "extraction",
                fix="set data.meds-codes to a file with the codes of this data set",
            )
    used = sum(number for kind, number in rows.items() if kind != "events")
    book.add("events", rows["events"], {"other_code": rows["events"] - used}, used)


def _known_stays(
    kinds: Mapping[str, pl.DataFrame], rows: int, codes: Codes, book: Book
) -> pl.DataFrame:
    """Return the admissions of patients with a birth; a patient's first birth and sex count."""
    births = _one_each(kinds["birth"], "births", book).drop_nulls("time")
    sexes = _one_each(kinds["sex"], "sexes", book)
    stays = kinds["admission"]
    repeated = len(stays) - stays["hadm_id"].n_unique()
    if repeated:
        raise UserError(
            f"{repeated} admissions of different shards have one number",
            allowed="one admission event for each admission",
            fix=_FIX,
        )
    found = stays.join(births.select("subject_id", birth="time"), on="subject_id").join(
        sexes.select("subject_id", gender=_part(codes.sex, 0)),
        on="subject_id",
        how="left",
    )
    book.rows["admissions"] = rows
    orphans = stays.height - found.height
    refuse_orphans("admissions", orphans, stays.height, "a patient with a birth")
    book.drop("admissions", {"duplicate": rows - stays.height, "unknown_patient": orphans})
    came, born = pl.col("admittime").dt, pl.col("birth").dt
    years = came.year().cast(pl.Int64) - born.year()
    birthday = pl.col("birth").dt.offset_by(pl.format("{}y", years))
    age = years - (pl.col("admittime") < birthday).cast(pl.Int64)
    return found.with_columns(age=plausible_age(age), ended=pl.col("end"))


def _diagnoses(
    events: pl.DataFrame, titles: pl.DataFrame, known: pl.Series, book: Book, codes: Codes
) -> DiagnosisLists:
    coded = events.select(
        "hadm_id",
        pl.coalesce("sequence", "row").alias("seq_num"),
        _part(codes.diagnosis, 0).alias("icd_version"),
        _part(codes.diagnosis, 1).alias("icd_code"),
    )
    lists = diagnosis_lists(coded, match_titles(coded, titles), known)
    refuse_orphans("diagnoses", lists.dropped["unknown_admission"], lists.rows, "an admission")
    book.add("diagnoses", lists.rows, lists.dropped, items(lists.lists["diagnoses"]))
    return lists


def _measures(events: pl.DataFrame, births: pl.DataFrame, codes: Codes, book: Book) -> Measures:
    timed = events.drop_nulls("time")
    kinds = {code: one.kind for code, one in codes.measures.items()}
    factors = {code: UNITS[one.unit] for code, one in codes.measures.items()}
    found = timed.select(
        "subject_id",
        pl.coalesce("sequence", "row").alias("seq_num"),
        pl.col("time").cast(pl.Date).alias("date"),
        pl.col("code").replace_strict(kinds, default=None, return_dtype=pl.String).alias("kind"),
        value=pl.col("text").str.strip_chars().cast(pl.Float64, strict=False)
        * pl.col("code").replace_strict(factors, default=None, return_dtype=pl.Float64),
    )
    measures = clean_measures(found, births["subject_id"].unique())
    book.add(
        "measures",
        events.height,
        {"no_time": events.height - timed.height, **measures.dropped},
        measures.rows.height,
    )
    return measures


def _one_each(events: pl.DataFrame, table: str, book: Book) -> pl.DataFrame:
    first = events.sort("subject_id", "time", "code", nulls_last=True).unique(
        "subject_id", keep="first", maintain_order=True
    )
    book.add(table, events.height, {"duplicate": events.height - first.height}, first.height)
    return first


def _part(prefix: str, place: int) -> pl.Expr:
    """Return one part of ``code`` after its beginning; null where there is none."""
    return split_code(prefix).list.get(place, null_on_oob=True)
