"""Tables in csv on disk: read by header, refused with one clear line.

Everything is read as text first (codes keep their leading zeros); numbers and times are parsed
here, by column, so that a bad file is named and no cell value ever reaches a message.
"""

import csv
import gzip
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import polars as pl

from common.errors import UserError

SUFFIXES = (".csv.gz", ".csv")
TIME_FORMAT = "%Y-%m-%d %H:%M:%S"
DATE_FORMAT = "%Y-%m-%d"
NULL_OF_NAMES = r"\N"
OFFICE = ("N/A", "n/a", "#N/A", "(null)")
"""What spreadsheets and database clients show for NULL, and write."""
NULLS = (NULL_OF_NAMES, "NA", "None", "NULL", "null", "NaN", "nan", "NaT", "<NA>", *OFFICE)
"""How exports write NULL, letter by letter: databases, R, Python, pandas.

They are NULL where a number, a time or an attribute stands. Drugs and diagnosis titles are names
and never NULL in MIMIC-IV: there "NA" may be somebody's word for sodium, and only ``\\N`` is none.
"""
MORE_FIELDS = "more fields"
"""Column of ``scan``: what stands after a row's last column; null in a row like its header."""
_TOO_WIDE = ("found more fields", "column names not specified in schema")
"""What the parser says of a row longer than the header, and of a first row that is."""
_DAMAGED_FIX = "fetch the file again and compare it with SHA256SUMS.txt"
_REWRITTEN_FIX = (
    "keep the file as PhysioNet ships it (a spreadsheet or data frame may have rewritten it)"
)
_EXACT_FLOAT = 2**53
"""Beyond it a whole number that was once a float may be another one."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table's file, already known to have the columns in use."""

    name: str
    path: Path
    label: str
    """Path below the data folder, for messages: ``hosp/omr.csv.gz``."""
    columns: tuple[str, ...]
    header: tuple[str, ...] = ()
    """All columns of the file, in its order."""
    clocked: bool = False
    """Whether hours count, so that a date alone is no time."""
    nulls: Counter[str] = field(default_factory=Counter, compare=False)
    """Cells that spelled NULL, by column, as far as the table was read."""


def scan(table: Table) -> pl.LazyFrame:
    """Return the columns in use, and ``MORE_FIELDS``, as lazy text columns; an empty cell is null.

    The parser refuses a row with too many fields only where it reads every column, and reading a
    big table then takes a third longer. Here one column beyond the header's shows such rows,
    unless the cell that was pushed out is empty.
    """
    rows = pl.scan_csv(
        table.path,
        has_header=False,
        skip_lines=1,
        schema=dict.fromkeys((*table.header, MORE_FIELDS), pl.String),
        missing_columns="insert",
        glob=False,
    )
    return rows.select(*table.columns, MORE_FIELDS)


def stream(table: Table, lines: pl.LazyFrame, *, chunk_rows: int) -> Iterator[pl.DataFrame]:
    """Yield a big table's rows batch by batch, in any order; the table is never held whole.

    Args:
        table: The table as found.
        lines: What is wanted of ``scan``'s columns, ``MORE_FIELDS`` among them.
        chunk_rows: Rows of a batch.

    Raises:
        UserError: A damaged or empty table, or one with a row longer than its header.
    """
    rows = 0
    with reading(table.label):
        for batch in lines.collect_batches(
            chunk_size=chunk_rows, maintain_order=False, engine="streaming"
        ):
            if batch[MORE_FIELDS].is_not_null().any():
                raise bad_width(table.label)
            rows += batch.height
            yield batch
    require_rows(table, rows)


def read(
    table: Table, *, numbers: Sequence[str] = (), attributes: Sequence[str] = ()
) -> pl.DataFrame:
    """Read the table's columns in use as text, but ``numbers`` as int64.

    Args:
        table: The table as found.
        numbers: Columns with a whole number in every row.
        attributes: Columns of words that may be NULL, however that is spelled.

    Raises:
        UserError: A damaged file, one without rows or with a row longer than its header, or a cell
            of ``numbers`` that is empty or not a whole number (the column is named, never the
            cell).
    """
    with reading(table.label):
        # Every column: only then the parser refuses a row with too many fields.
        rows = pl.scan_csv(table.path, infer_schema=False, glob=False).collect(engine="streaming")
        frame = rows.select(table.columns)
    require_rows(table, frame.height)
    frame = frame.with_columns(blank_nulls(table, frame[name]) for name in attributes)
    return frame.with_columns(whole_numbers(table, frame[name], required=True) for name in numbers)


def blank_nulls(table: Table, text: pl.Series) -> pl.Series:
    """Empty the cells that spell NULL, and count them with the table."""
    spelled = text.str.strip_chars().is_in(NULLS).fill_null(False)
    table.nulls[text.name] += int(spelled.sum())
    return text.set(spelled, None)


def spelled_nulls(tables: Mapping[str, Table]) -> dict[str, int]:
    """Return the cells that spelled NULL, by ``table.column``, as far as the tables were read."""
    return {
        f"{table.name}.{column}": cells
        for table in tables.values()
        for column, cells in sorted(table.nulls.items())
        if cells
    }


def whole_numbers(table: Table, text: pl.Series, *, required: bool = False) -> pl.Series:
    """Parse a text column to int64; a cell that is empty or spells NULL is null.

    Raises:
        UserError: A cell is no whole number, or null where ``required``.
    """
    digits = text.str.strip_chars().cast(pl.Int64, strict=False)
    values, unreadable = mend_numbers(table, text, digits)
    bad = values.null_count() if required else unreadable
    if bad:
        raise bad_numbers(table, text.name, bad, empty=bad - unreadable)
    return values


def whole_number(column: str) -> pl.Expr:
    """Parse a text column to int64; null where it is not all digits."""
    return pl.col(column).str.strip_chars().cast(pl.Int64, strict=False)


def was_float(text: pl.Series) -> pl.Series:
    """Read whole numbers that a spreadsheet or data frame wrote as floats, where that is exact.

    >>> was_float(pl.Series(["22995465.0", "7.5", "2.3E+07", "12345678901234567.0"])).to_list()
    [22995465, None, None, None]
    """
    whole = text.str.strip_chars().str.extract(r"^([+-]?\d+)\.0*$").cast(pl.Int64, strict=False)
    return whole.set(whole.abs() > _EXACT_FLOAT, None)


def mend_numbers(table: Table, text: pl.Series, parsed: pl.Series) -> tuple[pl.Series, int]:
    """Look again at cells that are not all digits: a float may be a whole number."""
    return _mend(table, text, parsed, was_float)


def _mend(
    table: Table, text: pl.Series, parsed: pl.Series, again: Callable[[pl.Series], pl.Series]
) -> tuple[pl.Series, int]:
    """Look again at cells that were not parsed; most columns have none, and cost nothing here.

    Args:
        table: Where NULL's spellings are counted.
        text: The cells.
        parsed: What came of them at first.
        again: Another way to read a cell.

    Returns:
        The values, and the number of cells that are neither read nor NULL.
    """
    if parsed.null_count() > text.null_count():
        text = blank_nulls(table, text)
        parsed = parsed.fill_null(again(text))
    return parsed, parsed.null_count() - text.null_count()


def require_rows(table: Table, rows: int) -> None:
    """Refuse a table that has a header and nothing below it."""
    if rows == 0:
        raise UserError(f"{table.label} has no rows", fix=_DAMAGED_FIX)


@contextmanager
def reading(label: str) -> Iterator[None]:
    """Turn what a reader raises on a bad file into one line without cell values."""
    try:
        yield
    except pl.exceptions.PolarsError as error:
        if any(sign in str(error) for sign in _TOO_WIDE):
            raise bad_width(label) from None
        kind = "is not UTF-8 text" if "utf" in str(error).lower() else "is not a well-formed csv"
        raise UserError(f"{label} {kind}", fix=_DAMAGED_FIX) from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{label} {_io_problem(error)}", fix=_DAMAGED_FIX) from None


def times(frame: pl.DataFrame, table: Table, column: str, *, required: bool) -> pl.DataFrame:
    """Parse a text column of times (``2180-05-06 22:23:00``), or of dates, to datetime.

    Raises:
        UserError: A cell is in another format, or empty where ``required``.
    """
    text = frame[column]
    first = text.str.to_datetime(TIME_FORMAT, strict=False)
    values, unreadable = mend_times(table, text, first)
    if bad := values.null_count() if required else unreadable:
        raise bad_times(table, column, bad)
    return frame.with_columns(values)


def mend_times(table: Table, text: pl.Series, parsed: pl.Series) -> tuple[pl.Series, int]:
    """Look again at cells that are no time: a date is its midnight, where hours do not count."""
    return _mend(table, text, parsed, _no_time if table.clocked else _midnight)


def _midnight(text: pl.Series) -> pl.Series:
    return text.str.to_datetime(DATE_FORMAT, strict=False)


def _no_time(text: pl.Series) -> pl.Series:
    return pl.repeat(None, len(text), dtype=pl.Datetime, eager=True)


def bad_numbers(table: Table, column: str, cells: int, *, empty: int = 0) -> UserError:
    """Return the error for cells of a column of whole numbers that hold none."""
    return UserError(
        f"{table.label}: {cells} cells of column {column} are no whole number"
        + f" ({empty} of them empty)" * bool(empty),
        allowed="digits in every row, as in 22995465 or 22995465.0",
        fix=_REWRITTEN_FIX,
    )


def bad_times(table: Table, column: str, cells: int) -> UserError:
    """Return the error for cells of a time column that cannot be read."""
    return UserError(
        f"{table.label}: {cells} cells of column {column} are no time",
        allowed="YYYY-MM-DD HH:MM:SS",
        fix=_REWRITTEN_FIX,
    )


def bad_width(label: str) -> UserError:
    """Return the error for rows whose cells may stand under the wrong column."""
    return UserError(
        f"{label} has rows with more fields than its header",
        allowed="one field for each column; text that holds a comma in quotes",
        fix=_DAMAGED_FIX,
    )


def find_csv(folder: Path, name: str) -> Path | None:
    """Return the table's file in a folder, zipped or not, if it is there."""
    candidates = (folder / f"{name}{suffix}" for suffix in SUFFIXES)
    return next((path for path in candidates if path.is_file()), None)


def open_table(name: str, path: Path, label: str, columns: tuple[str, ...]) -> Table:
    """Return the table of a file after a look at its header.

    Raises:
        UserError: An empty file, a foreign delimiter, a missing or repeated column, a damaged gz.
    """
    table = Table(name=name, path=path, label=label, columns=columns)
    return replace(table, header=_header(table))


def _header(table: Table) -> tuple[str, ...]:
    """Return the names of the file's columns, all in use among them, each once."""
    with reading(table.label):
        header = _first_line(table.path)
    if not header.strip():
        raise UserError(f"{table.label} is empty", fix=_DAMAGED_FIX)
    names = _fields(header, ",")
    missing = [name for name in table.columns if name not in names]
    repeated = sorted({name or "(blank)" for name in names if names.count(name) > 1})
    if repeated and not missing:
        raise UserError(
            f"{table.label} has several columns named {', '.join(repeated)}",
            allowed="one column of each name",
            fix="use the table as PhysioNet ships it",
        )
    if not missing:
        return tuple(names)
    for delimiter, word in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
        if set(table.columns) & set(_fields(header, delimiter)):
            raise UserError(
                f"{table.label} is delimited by {word}",
                allowed="commas",
                fix="export it again with commas, or fetch the original",
            )
    raise UserError(
        f"{table.label} lacks column {', '.join(missing)}",
        allowed=f"a header with {', '.join(table.columns)}, in any order",
        fix="use the table as PhysioNet ships it",
    )


def _fields(header: str, delimiter: str) -> list[str]:
    return [name.strip() for name in next(csv.reader([header], delimiter=delimiter))]


def _first_line(path: Path) -> str:
    with path.open("rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
    if path.suffix == ".gz" and not zipped:
        if path.stat().st_size == 0:
            return ""
        raise gzip.BadGzipFile
    with gzip.open(path, "rb") if zipped else path.open("rb") as stream:
        line: bytes = stream.readline(1 << 16)
    return line.decode("utf-8-sig", errors="replace").rstrip("\r\n")


def _io_problem(error: Exception) -> str:
    if isinstance(error, PermissionError):
        return "cannot be read (permission denied)"
    if isinstance(error, gzip.BadGzipFile) or "gzip header" in str(error):
        return "is not a gzip file"
    return "is truncated or damaged"
