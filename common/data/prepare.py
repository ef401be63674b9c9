"""The one way to samples: tables in, cached sample table out."""

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import polars as pl

from common.config import DataConfig
from common.data.cache import cache_key, load, require_writable, store, writing
from common.data.mimic.admissions import Prepared, Progress, prepare_tables
from common.data.mimic.orders import CHUNK_ROWS
from common.data.mimic.tables import find_tables
from common.data.samples import Admission, SampleTable
from common.data.source import hash_tables, source_of
from common.data.synthetic.write import write_tables
from common.user_cache import fedrx_cache

SYNTHETIC_PATH = "synthetic"


@dataclass(frozen=True, kw_only=True)
class PreparedSource:
    """Prepared columns, and where they come from."""

    prepared: Prepared
    source: str
    file_hashes: Mapping[str, str]


def prepare_source(
    config: DataConfig,
    *,
    cache_dir: Path | None = None,
    chunk_rows: int = CHUNK_ROWS,
    progress: Progress | None = None,
) -> PreparedSource:
    """Prepare the tables of ``config.path`` into the cache, or find them there.

    The cache is keyed by the tables' sha256, the settings that shape samples, and this package's
    source. ``config.path == "synthetic"`` first writes the synthetic tables into the cache, and
    then goes the same way as any folder.

    Args:
        config: Where the tables are and how they become samples.
        cache_dir: Cache folder (default: the user's, see ``fedrx_cache``).
        chunk_rows: Rows of prescriptions per batch; the result does not depend on it.
        progress: Called with one line for each step.

    Raises:
        UserError: Tables that cannot be used as they are, or a cache that cannot be written; the
            cache holds what it held.
    """
    cache = cache_dir or fedrx_cache()
    folder = data_folder(config, cache)
    tables = find_tables(folder)
    hashes = hash_tables(tables)
    key = cache_key({"files": hashes, "drop_flushes": config.drop_flushes})
    path = cache / "samples" / f"{key}.samples"
    prepared = load(path)
    if prepared is None:
        require_writable(path.parent)
        prepared = prepare_tables(
            folder, drop_flushes=config.drop_flushes, chunk_rows=chunk_rows, progress=progress
        )
        store(path, prepared)
    elif progress is not None:
        progress("samples are in the cache")
    source = source_of(folder, tables, hashes)
    return PreparedSource(prepared=prepared, source=source, file_hashes=hashes)


def load_samples(
    config: DataConfig, *, cache_dir: Path | None = None, progress: Progress | None = None
) -> SampleTable:
    """Prepare the samples of ``config.path``, or read them from the cache.

    Args and errors are those of ``prepare_source``.
    """
    found = prepare_source(config, cache_dir=cache_dir, progress=progress)
    return sample_table(found.prepared, source=found.source, file_hashes=found.file_hashes)


def data_folder(config: DataConfig, cache: Path) -> Path:
    """Return the folder of the tables, writing the synthetic ones when they are asked for."""
    if config.path != SYNTHETIC_PATH:
        return Path(config.path).expanduser().absolute()
    key = cache_key({"patients": config.synthetic_patients, "seed": config.synthetic_seed})
    folder = cache / "synthetic" / key
    if folder.is_dir():
        return folder
    with writing(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".writing-") as scratch:
            written = Path(scratch) / key
            write_tables(written, patients=config.synthetic_patients, seed=config.synthetic_seed)
            # Another process may have been faster; its tables are the same.
            try:
                written.rename(folder)
            except OSError:
                if not folder.is_dir():
                    raise
    return folder


def sample_table(prepared: Prepared, *, source: str, file_hashes: Mapping[str, str]) -> SampleTable:
    """Turn columns into samples; equal strings are one object, so that millions fit."""
    admissions = tuple(
        Admission(
            diagnoses=_pick(prepared.titles, row.pop("diagnoses")),
            diagnosis_codes=_pick(prepared.codes, codes),
            drugs=_pick(prepared.drugs, row.pop("drugs")),
            **row,
        )
        for row in prepared.frame.iter_rows(named=True)
        for codes in (row["diagnoses"],)
    )
    return SampleTable(
        admissions=admissions,
        counts=prepared.counts,
        source=source,
        file_hashes=dict(file_hashes),
        digest=table_digest(prepared),
    )


def _pick(vocabulary: tuple[str, ...], indices: list[int]) -> tuple[str, ...]:
    if len(indices) == 1:
        return (vocabulary[indices[0]],)
    picked: tuple[str, ...] = itemgetter(*indices)(vocabulary)
    return picked


def table_digest(prepared: Prepared) -> str:
    """Return the sha256 of all columns and vocabularies: equal digests mean equal samples."""
    digest = hashlib.sha256()
    for vocabulary in (prepared.drugs, prepared.titles, prepared.codes):
        digest.update(json.dumps(vocabulary).encode())
    for column in prepared.frame.iter_columns():
        flat = column
        if column.dtype == pl.List:
            flat = column.explode()
            digest.update(column.list.len().to_numpy().tobytes())
        text = flat.dtype == pl.String
        digest.update("\0".join(flat).encode() if text else flat.to_numpy().tobytes())
    return digest.hexdigest()
