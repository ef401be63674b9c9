"""MIMIC-IV at full size: `prepare` beside `pd.read_csv` of the whole prescriptions file.

Replicates a folder of tables (the demo, or the synthetic source) with new ids until prescriptions
has as many rows as MIMIC-IV 2.2, then measures each contender in a fresh process:

    python benchmarks/data_full_size.py --data DIR [--rows 15416708] [--json FILE]

Goals: prepare under 60 s and 2 GB on 2 cores; >= 3x faster and >= 5x smaller than pandas.
"""

import argparse
import gzip
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import polars as pl

FULL_ROWS = 15_416_708
TABLES = ("patients", "admissions", "diagnoses_icd", "omr", "services", "transfers")
SUBJECT_STEP, ADMISSION_STEP = 100_000, 10_000_000
CONTENDERS = {
    "pandas": "pd.read_csv of prescriptions, whole",
    "lists": "FedRx: prescriptions -> drug lists",
    "prepare": "FedRx: prepare (all tables -> cached samples)",
}
GIB = 1 << 30


def replicate(source: Path, target: Path, rows: int) -> int:
    """Write `rows` prescriptions and the other tables to match; return the number of copies."""
    hosp = target / "hosp"
    hosp.mkdir(parents=True)
    lines = pl.read_csv(_find(source, "prescriptions"), infer_schema=False)
    copies = math.ceil(rows / lines.height)
    _write(hosp / "prescriptions.csv.gz", lines, copies, rows)
    for name in TABLES:
        frame = pl.read_csv(_find(source, name), infer_schema=False)
        _write(hosp / f"{name}.csv.gz", frame, copies, frame.height * copies)
    titles = pl.read_csv(_find(source, "d_icd_diagnoses"), infer_schema=False)
    _write(hosp / "d_icd_diagnoses.csv.gz", titles, 1, titles.height)
    return copies


def _find(source: Path, name: str) -> Path:
    return next((source / "hosp").glob(f"{name}.csv*"))


def _write(path: Path, frame: pl.DataFrame, copies: int, rows: int) -> None:
    with gzip.open(path, "wb", compresslevel=1) as stream:
        for copy in range(copies):
            shifted = frame.with_columns(
                pl.col(name).cast(pl.Int64, strict=False) + copy * step
                for name, step in (("subject_id", SUBJECT_STEP), ("hadm_id", ADMISSION_STEP))
                if name in frame.columns
            )
            part = shifted.head(max(0, rows - copy * frame.height))
            stream.write(part.write_csv(include_header=copy == 0).encode())


def measure(contender: str, folder: Path) -> dict[str, Any]:
    """Run one contender in a fresh process and return its seconds, peak and answer."""
    command = [sys.executable, str(Path(__file__).resolve()), "--contender", contender]
    root = str(Path(__file__).resolve().parents[1])
    environment = os.environ | {"PYTHONPATH": root}
    done = subprocess.run(
        [*command, "--data", str(folder)],
        check=True,
        capture_output=True,
        text=True,
        env=environment,
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def contend(contender: str, folder: Path) -> dict[str, Any]:
    """Do one contender's work in this process."""
    import time

    from common.provenance import peak_rss_bytes

    started = time.perf_counter()
    if contender == "pandas":
        import pandas as pd

        frame = pd.read_csv(folder / "hosp" / "prescriptions.csv.gz", low_memory=False)
        answer = {"rows": len(frame)}
    elif contender == "lists":
        from common.data.cleaning.orders import drug_lists
        from common.data.mimic.orders import read_orders
        from common.data.mimic.tables import find_tables
        from common.data.tables import read

        tables = find_tables(folder)
        known = read(tables["admissions"])["hadm_id"].cast(pl.Int64)
        lists = drug_lists(read_orders(tables["prescriptions"]), known)
        answer = {"admissions": lists.lists.height, "pairs": lists.counts["pairs_clean"]}
    else:
        from common.config import DataConfig
        from common.data.prepare import prepare_source

        found = prepare_source(DataConfig(path=str(folder)), cache_dir=folder.parent / "cache")
        counts = found.prepared.counts.as_json()
        answer = {"samples": counts["samples"], "pairs": counts["pairs_clean"]}
    seconds = time.perf_counter() - started
    return {
        "contender": contender,
        "seconds": seconds,
        "cpu_seconds": time.process_time(),
        "peak_bytes": peak_rss_bytes(),
        **answer,
    }


def main() -> None:
    """Build the tables, measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder that holds hosp/")
    parser.add_argument("--rows", type=int, default=FULL_ROWS)
    parser.add_argument("--scratch", type=Path, help="where the big tables go (default: temporary)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender:
        print(json.dumps(contend(arguments.contender, arguments.data)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        folder = Path(scratch) / "tables"
        copies = replicate(arguments.data, folder, arguments.rows)
        size = (folder / "hosp" / "prescriptions.csv.gz").stat().st_size
        print(
            f"prescriptions: {arguments.rows:,} rows, {copies} copies, {size / 1e6:,.0f} MB gz; "
            f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
            flush=True,
        )
        results = [measure(contender, folder) for contender in CONTENDERS]
    whole = results[0]
    print(f"{'':46}{'seconds':>9}{'cpu s':>8}{'peak GB':>9}{'faster':>8}{'smaller':>9}")
    for result in results:
        print(
            f"{CONTENDERS[result['contender']]:46}{result['seconds']:9.1f}{result['cpu_seconds']:8.1f}"
            f"{result['peak_bytes'] / 1e9:9.2f}{whole['seconds'] / result['seconds']:7.1f}x"
            f"{whole['peak_bytes'] / result['peak_bytes']:8.1f}x"
        )
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"rows": arguments.rows, "copies": copies, "results": results}, indent=2)
        )


if __name__ == "__main__":
    main()
