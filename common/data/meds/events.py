"""Shards of a MEDS data set: found, checked, and read down to the events in use."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import polars as pl

from common.data.meds.codes import EICU, MIMIC_IV, Codes
from common.data.samples import Progress
from common.errors import UserError

CODES_FILE = "metadata/codes.parquet"
_LINES = 10
"""Lines of progress at most."""
_FIX = "write the data set again with the MEDS extraction"


@contextmanager
def reading(label: str) -> Iterator[None]:
    """Turn what a reader raises on a bad file into one line without cell values."""
    try:
        yield
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError):
        raise UserError(f"{label} is no parquet file, or a damaged one", fix=_FIX) from None


def find_shards(folder: Path) -> dict[str, Path]:
    """Return the data's shards and the table of codes, by path below the folder.

    Raises:
        UserError: No shard, no table of codes, or a shard without MEDS' columns.
    """
    if not (folder / "data").is_dir():
        raise UserError(
            f"data.path={folder} holds parquet files or metadata/ but no data/",
            allowed="a MEDS data set: data/**/*.parquet and metadata/",
            fix="name the folder that holds data/ and metadata/",
        )
    shards = sorted(path for path in (folder / "data").rglob("*.parquet") if path.is_file())
    if not shards:
        raise UserError(f"{folder / 'data'} holds no parquet file", fix=_FIX)
    codes = folder / CODES_FILE
    if not codes.is_file():
        raise UserError(
            f"{CODES_FILE} is missing in {folder}",
            allowed="the table of codes with their descriptions, which are the diagnoses' titles",
            fix=_FIX,
        )
    files = {path.relative_to(folder).as_posix(): path for path in (*shards, codes)}
    for label, path in files.items():
        _check_columns(label, path)
    return files


def extraction_of(folder: Path) -> Codes:
    """Return the codes of the extraction that a folder is of, by a column that only eICU's has."""
    for path in (folder / "data").rglob("*.parquet"):
        with reading(path.name):
            if EICU.words_column in pl.scan_parquet(path, glob=False).collect_schema():
                return EICU
    return MIMIC_IV


def read_shards(
    folder: Path, codes: Codes, progress: Progress
) -> Iterator[tuple[str, dict[str, pl.DataFrame], int]]:
    """Yield each shard's label, its events in use by kind, and the number of all its events.

    A kind that it has none of is an empty frame.

    Raises:
        UserError: As ``find_shards`` and ``read_shard``; also for a subject in two shards.
    """
    files = find_shards(folder)
    shards = {label: path for label, path in files.items() if label != CODES_FILE}
    seen = pl.Series("subject_id", [], pl.Int64)
    for place, (label, path) in enumerate(shards.items()):
        if place % -(-len(shards) // _LINES) == 0:
            progress(f"reading events: shard {place + 1} of {len(shards)}")
        events, total = read_shard(label, path, codes)
        subjects = events["subject_id"].unique()
        if subjects.is_in(seen.implode()).any():
            raise UserError(
                f"{label} holds subjects of another shard",
                allowed="each subject in one shard, as MEDS says",
                fix="extract again, or name one data set's folder",
            )
        seen = pl.concat([seen, subjects])
        groups = events.group_by("kind", maintain_order=True)
        yield label, defaultdict(events.clear, {str(kind): g for (kind,), g in groups}), total


def read_titles(folder: Path, codes: Codes) -> pl.DataFrame:
    """Return the titles of diagnoses: icd_version, icd_code, title; each code and version once.

    Raises:
        UserError: A damaged table, or no diagnosis in it has a description.
    """
    with reading(CODES_FILE):
        table = pl.read_parquet(folder / CODES_FILE, columns=["code", "description"])
        table = table.cast(pl.String)
    coded = table.filter(pl.col("code").str.starts_with(codes.diagnosis)).with_columns(
        title=pl.col("description").str.replace_all(r"\s+", " ").str.strip_chars()
    )
    titled = coded.filter(pl.col("title").fill_null("") != "")
    if titled.is_empty():
        raise UserError(
            f"{CODES_FILE} describes no code that begins with {codes.diagnosis}",
            allowed="a description for each diagnosis",
            fix="set data.meds-codes to the codes of this extraction, or extract with metadata",
        )
    parts = split_code(codes.diagnosis)
    return titled.select(
        parts.list.get(0, null_on_oob=True).alias("icd_version"),
        parts.list.get(1, null_on_oob=True).alias("icd_code"),
        "title",
    ).unique(["icd_version", "icd_code"], keep="first", maintain_order=True)


def read_shard(label: str, path: Path, codes: Codes) -> tuple[pl.DataFrame, int]:
    """Read a shard's events in use, in the file's order.

    Returns:
        subject_id, time, kind, code, text (the value, as text), admission, sequence, site, words,
        priority, row; and the number of all rows.

    Raises:
        UserError: A damaged shard, or an event without a subject.
    """
    with reading(label):
        names = pl.scan_parquet(path, glob=False).collect_schema().names()
        rows = (
            pl.scan_parquet(path, glob=False)
            .with_row_index("row")
            .select(
                "row",
                pl.col("subject_id").cast(pl.Int64),
                pl.col("time").cast(pl.Datetime("us")),
                pl.col("code").cast(pl.String),
                _column(names, "text_value", pl.String).alias("text"),
                _column(names, "numeric_value", pl.Float64).cast(pl.String).alias("number"),
                _column(names, codes.admission_column, pl.Int64).alias("admission"),
                _column(names, codes.sequence_column, pl.Int64).alias("sequence"),
                _column(names, codes.site_column, pl.String).alias("site"),
                _column(names, codes.words_column, pl.String).alias("words"),
                _column(names, codes.priority_column, pl.String).alias("priority"),
            )
        )
        total = int(rows.select(pl.len()).collect().item())
        events = (
            rows.with_columns(kind=_kind(codes))
            .filter(pl.col("kind").is_not_null())
            .collect(engine="streaming")
        )
    if nameless := events["subject_id"].null_count():
        raise UserError(f"{label}: {nameless} events have no subject_id", fix=_FIX)
    return events.with_columns(pl.coalesce("text", "number").alias("text")), total


def split_code(prefix: str) -> pl.Expr:
    """Return the parts of ``code`` after a prefix."""
    return pl.col("code").str.strip_prefix(prefix).str.split("//")


def _kind(codes: Codes) -> pl.Expr:
    code = pl.col("code")
    tests = {
        name: code.str.starts_with(prefix) for name, prefix in codes.prefixes.items() if prefix
    }
    tests |= {"birth": code == codes.birth, "measure": code.is_in(list(codes.measures))}
    return pl.coalesce(
        pl.when(test).then(pl.lit(name)).otherwise(None) for name, test in tests.items()
    )


def _column(names: list[str], name: str, dtype: pl.DataType | type[pl.DataType]) -> pl.Expr:
    """Return an optional column; a value that is not of its type is null."""
    return pl.col(name).cast(dtype, strict=False) if name in names else pl.lit(None, dtype)


def _check_columns(label: str, path: Path) -> None:
    with reading(label):
        schema = pl.scan_parquet(path, glob=False).collect_schema()
    needed = ("code", "description") if label == CODES_FILE else ("subject_id", "time", "code")
    missing = [name for name in needed if name not in schema]
    if missing:
        raise UserError(
            f"{label} lacks column {', '.join(missing)}", allowed=", ".join(needed), fix=_FIX
        )
    fits = {"time": (pl.Datetime, pl.Date), "code": (pl.String, pl.Categorical, pl.Enum)}
    wrong = ["subject_id"] * ("subject_id" in needed and not schema["subject_id"].is_integer())
    wrong += [name for name in fits if name in needed and schema[name] not in fits[name]]
    # Text here would make every measure null, and nothing would count it.
    numbers = schema.get("numeric_value", pl.Null())
    if label != CODES_FILE and not (numbers.is_numeric() or numbers == pl.Null):
        wrong.append("numeric_value")
    if wrong:
        raise UserError(
            f"{label}: column {wrong[0]} is {schema[wrong[0]]}",
            allowed="subject_id int64, time a timestamp, code text and numeric_value a float, as "
            "MEDS has them",
            fix=_FIX,
        )
