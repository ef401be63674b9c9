"""The cached sample table: one file, replaced atomically, readable by its owner alone.

The file is the sha256 of a parquet file and then that file: one that has changed on the disk is
none, and never reaches a decoder that would make other samples of it.
"""

import hashlib
import io
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import polars as pl

from common.data.samples import Counts, Prepared
from common.errors import DiskFull, UserError
from common.files import write_bytes

_ENTRY = "fedrx"
_DIGEST_BYTES = hashlib.sha256().digest_size


def cache_key(parts: Mapping[str, object]) -> str:
    """Return a key over ``parts`` and the source of this package, so that new code reads anew."""
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    for module in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(module.read_bytes())
    return digest.hexdigest()[:32]


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what a full or write-protected disk raises into one line."""
    try:
        yield
    except (OSError, DiskFull, pl.exceptions.PolarsError) as error:
        problem = error.__cause__ or error
        reason = getattr(problem, "strerror", None) or "the samples cannot be encoded"
        raise UserError(
            f"the cache folder {folder} cannot be written ({reason})",
            fix="set FEDRX_CACHE to a folder that you can write to and that has room",
        ) from None


def require_writable(folder: Path) -> None:
    """Make the folder and open a file in it, so that a closed disk is told before the reading.

    Raises:
        UserError: The folder cannot be written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        tempfile.TemporaryFile(dir=folder).close()


def store(path: Path, prepared: Prepared) -> None:
    """Write ``prepared``: to a private file beside ``path`` first, then in one rename.

    Several processes may do this at once; each rename leaves a complete file.

    Raises:
        UserError: A full or write-protected disk; nothing is left behind then.
    """
    content = {
        "drugs": prepared.drugs,
        "titles": prepared.titles,
        "codes": prepared.codes,
        "counts": prepared.counts.as_json(),
        "procedures": prepared.procedures,
    }
    with writing(path.parent):
        parquet = io.BytesIO()
        prepared.frame.write_parquet(
            parquet, metadata={_ENTRY: json.dumps(content, ensure_ascii=False)}
        )
        encoded = parquet.getvalue()
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_bytes(path, hashlib.sha256(encoded).digest() + encoded)


def load(path: Path) -> Prepared | None:
    """Read what ``store`` wrote; None when there is none, or one whose bytes have changed."""
    try:
        entry = memoryview(path.read_bytes())
    except OSError:
        return None
    digest, encoded = entry[:_DIGEST_BYTES], entry[_DIGEST_BYTES:]
    if hashlib.sha256(encoded).digest() != digest:
        return None
    try:
        content = json.loads(pl.read_parquet_metadata(io.BytesIO(encoded))[_ENTRY])
        return Prepared(
            frame=pl.read_parquet(io.BytesIO(encoded)),
            drugs=tuple(content["drugs"]),
            titles=tuple(content["titles"]),
            codes=tuple(content["codes"]),
            counts=Counts(**content["counts"]),
            procedures=tuple(content["procedures"]),
        )
    except (KeyError, ValueError, pl.exceptions.PolarsError, pl.exceptions.PanicException):
        return None
