"""Events of eICU's MEDS extraction to samples, by the rules of eICU's tables.

There a subject is one hospital stay (patienthealthsystemstayid): whose stays are one patient's is
lost. Every event of a subject belongs to the stay, which begins with its first admission.
"""

from collections import Counter, defaultdict
from pathlib import Path

import polars as pl

from common.data.cleaning.assemble import SITE, Book, assemble, items, plausible_age, refuse_orphans
from common.data.cleaning.diagnoses import DiagnosisLists
from common.data.cleaning.measures import CM_PER_INCH, KG_PER_POUND
from common.data.cleaning.orders import one_row_per_pair
from common.data.eicu.read import PRIORITIES, SEXES, list_diagnoses, measures_of
from common.data.meds.codes import Codes
from common.data.meds.events import read_shards
from common.data.meds.read import NO_NAME, count_events, list_drugs
from common.data.samples import Prepared, Progress
from common.errors import UserError

BORN_LATE_YEARS = 0.5
"""The extraction sets a birth this much later than the age says, counted from the first unit."""
METRIC = {"cm": 1.0, "in": CM_PER_INCH, "kg": 1.0, "lb": KG_PER_POUND}
"""Factor to cm and kg."""
_KINDS = ("admission", "discharge", "birth", "sex", "diagnosis", "drug", "measure")
_DAYS_PER_YEAR = 365.25


def prepare_stays(
    folder: Path, codes: Codes, *, drop_flushes: bool, progress: Progress
) -> Prepared:
    """Read, clean and join the events of eICU as MEDS.

    Args:
        folder: Holds ``data/`` and ``metadata/``.
        codes: What the codes mean.
        drop_flushes: Leave saline and heparin flushes out of the drug lists.
        progress: Called with one line for each step.

    Raises:
        UserError: Shards that cannot be used as they are, or without an event of a needed kind.
    """
    rows, found = Counter[str](), defaultdict[str, list[pl.DataFrame]](list)
    for label, groups, total in read_shards(folder, codes, progress):
        rows.update({"events": total, **{kind: groups[kind].height for kind in _KINDS}})
        for kind in _KINDS:
            group = groups[kind]
            found[kind].append(_orders(group, codes) if kind == "drug" else group)
        if timeless := found["admission"][-1]["time"].null_count():
            raise UserError(
                f"{label}: {timeless} admissions have no time", fix="check the extraction"
            )
    book = Book()
    count_events(rows, codes, folder, book)
    kinds = {kind: pl.concat(parts) for kind, parts in found.items()}
    stays = _stays(kinds, codes, book)
    diagnoses = _diagnoses(kinds["diagnosis"], stays, codes, book)
    drugs = list_drugs(kinds["drug"], rows["drug"], stays["hadm_id"], book, drop_flushes)
    measures = measures_of(stays, book)
    return assemble(
        stays.drop(SITE) if stays[SITE].null_count() == stays.height else stays,
        book,
        diagnoses=diagnoses,
        drugs=drugs,
        measures=measures,
        folder=folder,
        null_spelled={},
    )


def _stays(kinds: dict[str, pl.DataFrame], codes: Codes, book: Book) -> pl.DataFrame:
    """Return one row per stay; a first birth, sex and measure count, as of the first unit."""
    first = _first(kinds["admission"])
    births = _first(kinds["birth"]).select("subject_id", birth="time")
    sexes = _first(kinds["sex"]).select("subject_id", sex=_content(codes.sex))
    book.rows["admissions"] = kinds["admission"].height
    book.drop("admissions", {"duplicate": kinds["admission"].height - first.height})
    refuse_orphans(
        "admissions",
        first.join(births, on="subject_id", how="anti").height,
        first.height,
        "a subject with a birth",
    )
    stays = (
        first.select("subject_id", "site", hadm_id="subject_id", admittime="time")
        .join(births, on="subject_id", how="left")
        .join(sexes, on="subject_id", how="left")
    )
    for kind in ("height", "weight"):
        factors = {
            code: METRIC[one.unit] for code, one in codes.measures.items() if one.kind == kind
        }
        own = _first(kinds["measure"].filter(pl.col("code").is_in(list(factors))))
        number = pl.col("text").str.strip_chars().cast(pl.Float64, strict=False)
        factor = pl.col("code").replace_strict(factors, default=None, return_dtype=pl.Float64)
        value = (number * factor).cast(pl.String).alias(f"admission{kind}")
        stays = stays.join(own.select("subject_id", value), on="subject_id", how="left")
    days = (pl.col("admittime") - pl.col("birth")).dt.total_minutes() / (24 * 60)
    age = (days / _DAYS_PER_YEAR + BORN_LATE_YEARS).round().cast(pl.Int64)
    return stays.with_columns(
        age=plausible_age(age),
        gender=pl.col("sex").str.strip_chars().replace_strict(SEXES, default=None),
    )


def _diagnoses(
    events: pl.DataFrame, stays: pl.DataFrame, codes: Codes, book: Book
) -> DiagnosisLists:
    begun = stays.select("subject_id", "hadm_id", "admittime")
    rows = events.join(begun, on="subject_id", how="left", maintain_order="left").select(
        "hadm_id",
        rank=pl.col("priority").str.strip_chars().replace_strict(PRIORITIES, default=4),
        since=(pl.col("time") - pl.col("admittime")).dt.total_minutes(),
        words=pl.col("words").str.replace_all(r"\s+", " ").str.strip_chars(),
        icd9code=_content(codes.diagnosis),
    )
    lists = list_diagnoses(rows, None, stays["hadm_id"])
    refuse_orphans("diagnoses", lists.dropped["unknown_admission"], events.height, "an admission")
    book.add("diagnoses", events.height, lists.dropped, items(lists.lists["diagnoses"]))
    return lists


def _orders(events: pl.DataFrame, codes: Codes) -> pl.DataFrame:
    """Return one row for each subject and name: a shard's orders are many times that."""
    return one_row_per_pair(
        events.select(
            pl.col("subject_id").alias("hadm_id"),
            _content(codes.drug).fill_null("").cast(pl.Categorical).alias("drug"),
            pl.col("time").alias("start"),
        )
    )


def _first(events: pl.DataFrame) -> pl.DataFrame:
    return events.sort("time", maintain_order=True, nulls_last=True).unique(
        "subject_id", keep="first", maintain_order=True
    )


def _content(prefix: str) -> pl.Expr:
    """Return what follows the beginning of a code, separators too; null where it was NULL."""
    return pl.col("code").str.strip_prefix(prefix).replace(NO_NAME, None)
