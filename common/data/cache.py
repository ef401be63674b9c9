"""The cached sample table: one parquet file, replaced atomically, readable by its owner alone."""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from common.data.admissions import Prepared

_ENTRY = "fedrx"


def cache_key(parts: Mapping[str, Any]) -> str:
    """Return a key over ``parts`` and the source of this package, so that new code reads anew."""
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    for module in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(module.read_bytes())
    return digest.hexdigest()[:32]


def store(path: Path, prepared: Prepared) -> None:
    """Write ``prepared``: to a private file beside ``path`` first, then in one rename.

    Several processes may do this at once; each rename leaves a complete file.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    content = {
        "drugs": prepared.drugs,
        "titles": prepared.titles,
        "codes": prepared.codes,
        "counts": prepared.counts,
    }
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".writing-")  # mode 0600
    try:
        with os.fdopen(descriptor, "wb") as stream:
            prepared.frame.write_parquet(
                stream, metadata={_ENTRY: json.dumps(content, ensure_ascii=False)}
            )
            stream.flush()
            os.fsync(stream.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def load(path: Path) -> Prepared | None:
    """Read what ``store`` wrote; None when there is none, or one that cannot be read."""
    if not path.is_file():
        return None
    try:
        content = json.loads(pl.read_parquet_metadata(path)[_ENTRY])
        return Prepared(
            frame=pl.read_parquet(path, glob=False),
            drugs=tuple(content["drugs"]),
            titles=tuple(content["titles"]),
            codes=tuple(content["codes"]),
            counts=content["counts"],
        )
    except (OSError, KeyError, ValueError, pl.exceptions.PolarsError):
        return None
