"""The cached sample table: one file, replaced atomically, readable by its owner alone.

The file is the sha256 of a parquet file and then that file: one that has changed on the disk is
none, and never reaches a decoder that would make other samples of it.
"""

import hashlib
import io
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl

from common.data.mimic.admissions import Prepared
from common.errors import UserError

_ENTRY = "fedrx"
_DIGEST_BYTES = hashlib.sha256().digest_size


def cache_key(parts: Mapping[str, Any]) -> str:
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
    except (OSError, pl.exceptions.PolarsError) as error:
        reason = getattr(error, "strerror", None) or "the samples cannot be encoded"
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
        "counts": prepared.counts,
    }
    with writing(path.parent):
        encoded = io.BytesIO()
        prepared.frame.write_parquet(
            encoded, metadata={_ENTRY: json.dumps(content, ensure_ascii=False)}
        )
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _replace(path, encoded.getbuffer())


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
            counts=content["counts"],
        )
    except (KeyError, ValueError, pl.exceptions.PolarsError, pl.exceptions.PanicException):
        return None


def _replace(path: Path, encoded: memoryview) -> None:
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".writing-")  # mode 0600
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(hashlib.sha256(encoded).digest())
            stream.write(encoded)
            stream.flush()
            os.fsync(stream.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
