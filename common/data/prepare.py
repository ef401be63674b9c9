"""The one way to samples: tables in, cached sample table out."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import polars as pl

from common.config import DataConfig
from common.data.cache import cache_key, load, require_writable, store
from common.data.samples import Admission, Prepared, Progress, SampleTable, Visit
from common.data.source import hash_files
from common.data.sources import source_for
from common.errors import UserError
from common.user_cache import fedrx_cache


@dataclass(frozen=True, kw_only=True)
class PreparedSource:
    """Prepared columns, and where they come from."""

    prepared: Prepared
    source: str
    """The tag."""
    file_hashes: Mapping[str, str]


def prepare_source(
    config: DataConfig,
    *,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> PreparedSource:
    """Prepare the data of ``config.path`` into the cache, or find it there.

    The cache is keyed by the files' sha256, the settings that shape samples, and this package's
    source.

    Args:
        config: Where the data is and how it becomes samples.
        cache_dir: Cache folder (default: the user's, see ``fedrx_cache``).
        progress: Called with one line for each step.

    Raises:
        UserError: Data that cannot be used as it is, or a cache that cannot be written; the
            cache holds what it held.
    """
    say = progress or (lambda _line: None)
    cache = cache_dir or fedrx_cache()
    source = source_for(config.path)
    if config.protocol not in source.protocols:
        raise UserError(
            f"data.protocol={config.protocol} with {source.kind}",
            allowed=", ".join(source.protocols),
            fix="set another data.protocol, or data.path to tables of MIMIC-IV's form",
        )
    folder = source.folder(config, cache)
    hashes = hash_files(source.files(folder, config))
    key = cache_key(
        {"files": hashes, "drop_flushes": config.drop_flushes, "protocol": config.protocol}
    )
    path = cache / "samples" / f"{key}.samples"
    prepared = load(path)
    if prepared is None:
        require_writable(path.parent)
        prepared = source.read(folder, config, progress=say)
        store(path, prepared)
    else:
        say("samples are in the cache")
    tag = source.tag(folder, hashes)
    return PreparedSource(prepared=prepared, source=tag, file_hashes=hashes)


def load_samples(
    config: DataConfig, *, cache_dir: Path | None = None, progress: Progress | None = None
) -> SampleTable:
    """Prepare the samples of ``config.path``, or read them from the cache.

    Args and errors are those of ``prepare_source``.
    """
    found = prepare_source(config, cache_dir=cache_dir, progress=progress)
    return sample_table(found.prepared, source=found.source, file_hashes=found.file_hashes)


def sample_table(prepared: Prepared, *, source: str, file_hashes: Mapping[str, str]) -> SampleTable:
    """Turn columns into samples; equal strings are one object, so that millions fit."""
    past: tuple[Visit, ...] = ()
    admissions = []
    for row in prepared.frame.iter_rows(named=True):
        codes = row["diagnoses"]
        if prepared.counts.protocol:
            past = _visits(prepared, row) or past
            row |= {
                "protocol": prepared.counts.protocol.name,
                "earlier": tuple(past[place] for place in row["earlier"]),
                "procedures": _pick(prepared.procedures, row["procedures"]),
                "ordered": _pick(prepared.drugs, row["ordered"]),
                "services": tuple(row["services"]),
                "labs": tuple(row["labs"]),
            }
        admissions.append(
            Admission(
                diagnoses=_pick(prepared.titles, row.pop("diagnoses")),
                diagnosis_codes=_pick(prepared.codes, codes),
                drugs=_pick(prepared.drugs, row.pop("drugs")),
                **row,
            )
        )
    return SampleTable(
        admissions=tuple(admissions),
        counts=prepared.counts,
        source=source,
        file_hashes=dict(file_hashes),
        digest=table_digest(prepared),
    )


def _visits(prepared: Prepared, row: dict[str, Any]) -> tuple[Visit, ...]:
    """Take a patient's visits out of a row; the first row of each patient holds them."""
    lists = [row.pop(f"visit_{name}") or () for name in ("diagnoses", "procedures", "drugs")]
    return tuple(
        Visit(
            diagnoses=_pick(prepared.titles, diagnoses),
            diagnosis_codes=_pick(prepared.codes, diagnoses),
            procedures=_pick(prepared.procedures, procedures),
            drugs=_pick(prepared.drugs, drugs),
        )
        for diagnoses, procedures, drugs in zip(*lists, strict=True)
    )


def _pick(vocabulary: tuple[str, ...], indices: list[int]) -> tuple[str, ...]:
    if not indices:
        return ()
    if len(indices) == 1:
        return (vocabulary[indices[0]],)
    picked: tuple[str, ...] = itemgetter(*indices)(vocabulary)
    return picked


def table_digest(prepared: Prepared) -> str:
    """Return the sha256 of all columns and vocabularies: equal digests mean equal samples."""
    digest = hashlib.sha256()
    for vocabulary in _vocabularies(prepared):
        digest.update(json.dumps(vocabulary).encode())
    for column in prepared.frame.iter_columns():
        flat = column
        while flat.dtype == pl.List:
            digest.update(flat.list.len().to_numpy().tobytes())
            flat = flat.explode()
        text = flat.dtype == pl.String
        if prepared.counts.protocol and text:
            flat = flat.fill_null("")
        digest.update("\0".join(flat).encode() if text else flat.to_numpy().tobytes())
    return digest.hexdigest()


def _vocabularies(prepared: Prepared) -> Iterator[tuple[str, ...]]:
    """Yield what the columns' indices stand for; a protocol's only where there is one."""
    yield from (prepared.drugs, prepared.titles, prepared.codes)
    if prepared.counts.protocol:
        yield (prepared.counts.protocol.name,)
        yield prepared.procedures
