"""The run directory: the contract that every later step reads (its files: sim/README.md).

``run.json`` says what kind of run it is and ``status.json`` how far; checkpoints sort in time.
"""

import contextlib
import datetime
import errno
import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config import Config
from common.configio import config_hash, read_config, to_toml
from common.errors import DiskFull, UserError
from common.files import (
    append_json_line,
    json_document,
    json_line,
    needing_room,
    read_json_lines,
    utf8,
    write_bytes,
    write_bytes_or_over,
    write_json,
    write_text,
)
from common.provenance import tensors_sha256
from common.records import Record
from common.records.run import (
    SCHEMA,
    DataFacts,
    Environment,
    Inputs,
    Metric,
    RunRecord,
    SavedFacts,
    State,
    Status,
    WireLine,
    WorkerFacts,
)
from common.records.summary import Summary
from common.tensor_files import (
    Altered,
    Tensors,
    damaged,
    digests_of,
    read_tensors,
    sealed,
    unsealed,
    write_tensors,
)

RUN, ENVIRONMENT, SUMMARY = "run.json", "environment.json", "summary.json"
DATA, STATUS, METRICS, WIRE = "data.json", "status.json", "metrics.jsonl", "wire.jsonl"
LOCK = ".lock"
"""Held by the one process that works on the run."""
WORKERS = "workers"
TRAINED = "trained"
"""Stage in status.json: all rounds are done and summed up."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One saved moment of a run."""

    name: str
    b: Tensors
    """B matrices (fp32) by wire key."""
    extra: Tensors
    """Whatever else resuming needs, such as optimizer or strategy tensors."""
    facts: SavedFacts


@dataclass(frozen=True)
class RunDirectory:
    """Paths and atomic writes of one run."""

    path: Path

    @classmethod
    def create(cls, config: Config, *, directory: Path | None = None) -> "RunDirectory":
        """Make a new run directory and write its resolved configuration.

        Args:
            config: The complete configuration.
            directory: As ``made`` takes it.

        Raises:
            UserError: if the directory holds files already, or cannot be made.
        """
        run = cls.made(config, directory=directory)
        run.begin(config)
        return run

    @classmethod
    def made(cls, config: Config, *, directory: Path | None = None) -> "RunDirectory":
        """Make a run's directory, and write nothing: whoever holds it alone may ``begin`` there.

        Args:
            config: The complete configuration.
            directory: Where; default ``runs/<UTC time>-<name>-<hash>`` below the working directory.

        Raises:
            UserError: if the directory holds files already, or cannot be made.
        """
        named = _named(config, directory)
        now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S")
        place = named or Path("runs") / f"{now}-{config.run.name}-{config_hash(config)}"
        place = place.expanduser().absolute()
        try:
            if named is None:
                return cls(_made_beside_others(place))
            _require_new(place)
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise _unusable(place, error) from None
        return cls(place)

    def begin(self, config: Config) -> None:
        """Write what every run has before its run.json: status and resolved configuration.

        Raises:
            UserError: if another run has begun here.
        """
        _require_new(self.path)
        self.write_status("started")
        self.write_config(config)

    @classmethod
    def require_new(cls, config: Config, *, directory: Path | None = None) -> None:
        """Check that ``create`` could make the directory; nothing is made.

        Raises:
            UserError: if a named directory holds files already, or cannot be made.
        """
        directory = _named(config, directory)
        if directory is not None:
            _require_new(directory.expanduser().absolute())

    @classmethod
    def open(cls, path: Path) -> "RunDirectory":
        """Open an existing run directory.

        Raises:
            UserError: if ``path`` is not a run directory, or is one of runs inside.
        """
        run = cls(path.expanduser().absolute())
        record = run.record()
        if record is None:
            what = f"is not a run directory: it has no {RUN}"
            raise UserError(
                f"{run.path} {what if run.path.exists() else 'does not exist'}",
                fix="name a folder that a fedrx run has written",
            )
        if record.cells:
            raise UserError(
                f"{run.path} holds the runs of one {record.mode}",
                allowed="a run, such as " + str(run.path / record.cells[0]),
                fix="name one inside, or give the command of all again",
            )
        return run

    def write_config(self, config: Config) -> None:
        """Write the resolved configuration."""
        write_text(self.path / "config.toml", to_toml(config, heading="Resolved by fedrx."))

    def config(self) -> Config:
        """Read the resolved configuration back."""
        return read_config(self.path / "config.toml")

    def record(self) -> RunRecord | None:
        """Read run.json; None of a run that never began."""
        content = self.read_json(RUN)
        if content.get("schema_version", SCHEMA) != SCHEMA:
            raise UserError(
                f"{self.path} was written by another version of FedRx",
                allowed=f"schema version {SCHEMA}",
                fix="use the version that made it",
            )
        return RunRecord.read(content, what=str(self.path / RUN)) if content else None

    def inputs(self) -> Inputs:
        """Return what a run reads; what is not known of it is empty."""
        record = self.record()
        return record.inputs if record else Inputs()

    def summary(self) -> Summary:
        """Read summary.json of a run that trains; before its end an absent one is empty.

        Raises:
            UserError: if it is damaged, or a finished run has none.
        """
        if not (self.path / SUMMARY).exists() and self.is_finished:
            raise UserError(
                f"{self.path} is finished, and its {SUMMARY} is gone",
                fix="bring it back from a copy, or start a new run",
            )
        return Summary.read(self.read_json(SUMMARY), what=str(self.path / SUMMARY))

    def data(self) -> DataFacts:
        """Read data.json; an absent one is empty."""
        return DataFacts.read(self.read_json(DATA), what=str(self.path / DATA))

    def environment(self) -> Environment:
        """Read environment.json."""
        return Environment.read(self.read_json(ENVIRONMENT), what=str(self.path / ENVIRONMENT))

    def workers(self) -> list[WorkerFacts]:
        """Read what the workers of a federation tell."""
        files = sorted((self.path / WORKERS).glob("*.json"))
        return [WorkerFacts.read(file.read_bytes(), what=str(file)) for file in files]

    def write_status(self, state: State, **facts: Any) -> None:
        """Replace status.json, also on a full disk."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        content = json_document(Status(state=state, updated=now, **facts).as_json())
        write_bytes_or_over(self.path / STATUS, utf8(content))

    def status(self) -> Status:
        """Read status.json."""
        return Status.read(_read_object(self.path / STATUS), what=str(self.path / STATUS))

    @property
    def is_finished(self) -> bool:
        """Whether it is a run that has come to its end."""
        return self.record() is not None and self.status().state == "finished"

    def write_json(self, name: str, value: Any) -> None:
        """Write one JSON document, or a record, atomically."""
        write_json(self.path / name, value.as_json() if isinstance(value, Record) else value)

    def read_json(self, name: str) -> dict[str, Any]:
        """Read one JSON document; an absent file is an empty object."""
        file = self.path / name
        return _read_object(file) if file.exists() else {}

    def metric(self, name: str, value: float | str | None, **labels: Any) -> None:
        """Append one event to metrics.jsonl (labels: the fields of ``Metric``)."""
        event = Metric(name=name, value=value, **labels, time=round(time.time(), 3))
        self.append(METRICS, event)

    def metrics(self, name: str | None = None) -> list[Metric]:
        """Read metrics.jsonl, optionally only the events called ``name``."""
        lines = (line for line in self.lines(METRICS) if name in (None, line.get("name")))
        return [Metric.read(line, what=METRICS) for line in lines]

    def numbers(self, name: str) -> list[float]:
        """Read the numbers of the events called ``name``."""
        return [event.number for event in self.metrics(name) if event.number is not None]

    def forget_metrics(self, *, after: int) -> None:
        """Drop the events of later rounds or steps, which a resumed run will write again.

        A line that was torn by a crash goes with them.
        """
        file = self.path / METRICS
        if file.exists():
            kept = [event.as_json() for event in self.metrics() if event.place <= after]
            write_text(file, "".join(map(json_line, kept)))

    def wire(self) -> list[WireLine]:
        """Read wire.jsonl."""
        return [WireLine.read(line, what=WIRE) for line in self.lines(WIRE)]

    def append(self, file: str, record: Record | Mapping[str, object]) -> None:
        """Append one JSON object, or a record, to a JSON-lines file of the run."""
        content = record.as_json() if isinstance(record, Record) else record
        append_json_line(self.path / file, content)

    def lines(self, file: str) -> list[dict[str, Any]]:
        """Read a JSON-lines file of the run.

        Raises:
            UserError: if a complete line of it is no JSON object.
        """
        try:
            return read_json_lines(self.path / file)
        except ValueError:
            raise _damaged_file(self.path / file) from None

    def hospital(self, name: str) -> Path:
        """Return (and make) the folder of what stays in a hospital."""
        folder = self.path / "hospitals" / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def save_checkpoint(
        self, name: str, b: Tensors, *, facts: SavedFacts, extra: Tensors | None = None
    ) -> Path:
        """Write ``checkpoints/name``; it appears complete or not at all.

        Raises:
            DiskFull: if there is no room; the checkpoints before it stay.
        """
        folder = self.path / "checkpoints" / name
        temporary = folder.with_name(f".{name}.part")
        shutil.rmtree(temporary, ignore_errors=True)
        with needing_room(name):
            temporary.mkdir(parents=True)
        try:
            write_tensors(temporary / "b.safetensors", b)
            if extra:
                write_tensors(temporary / "extra.safetensors", extra)
            content = sealed(facts.as_json(), digests_of(b, extra or {}))
            write_bytes(temporary / "facts.json", content)
        except DiskFull:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        if folder.exists():
            self.remove_checkpoint(name)
        temporary.rename(folder)
        return folder

    def checkpoint_names(self) -> list[str]:
        """Return the names of the complete checkpoints, oldest first."""
        folder = self.path / "checkpoints"
        if not folder.is_dir():
            return []
        return sorted(
            p.name
            for p in folder.iterdir()
            if not p.name.startswith(".")
            and (p / "b.safetensors").exists()
            and (p / "facts.json").exists()
        )

    def checkpoint_facts(self, name: str) -> SavedFacts:
        """Read what a checkpoint says about itself.

        Raises:
            Altered: if that is not what was written.
        """
        return unsealed(self.path / "checkpoints" / name / "facts.json")[0]

    def remove_checkpoint(self, name: str) -> None:
        """Remove one checkpoint; it disappears at once."""
        hidden = self.path / "checkpoints" / f".{name}.gone"
        shutil.rmtree(hidden, ignore_errors=True)
        (self.path / "checkpoints" / name).rename(hidden)
        shutil.rmtree(hidden)

    def load_checkpoint(self, name: str | None = None) -> Checkpoint:
        """Load one checkpoint; default the last.

        Raises:
            UserError: if there is none of that name, or the last is not the one that training
                ended with.
            Altered: if a part of it is not what was written.
        """
        names = self.checkpoint_names()
        if not names or (name is not None and name not in names):
            raise UserError(
                f"{self.path} has no checkpoint {name or ''}".rstrip(),
                allowed=", ".join(names) or "a run with checkpoints",
                fix="name one of these" if names else "train it, or bring them back from a copy",
            )
        folder = self.path / "checkpoints" / (name or names[-1])
        extra_file = folder / "extra.safetensors"
        facts, digests = unsealed(folder / "facts.json")
        try:
            b = read_tensors(folder / "b.safetensors")
            extra = read_tensors(extra_file) if extra_file.exists() else {}
        except Altered:
            raise damaged(folder.name) from None
        found = tensors_sha256(b)
        if facts.b_sha256 not in ("", found) or digests_of(b, extra) != digests:
            raise damaged(folder.name)
        if name is None and self.summary().b_sha256 not in ("", found):
            raise UserError(
                f"{self.path}: training ended with another B than that of its last checkpoint, "
                f"{folder.name}",
                fix="bring the checkpoint after it back from a copy, or start the run anew",
            )
        return Checkpoint(name=folder.name, b=b, extra=extra, facts=facts)


def _read_object(file: Path) -> dict[str, Any]:
    """Read a JSON object of the run; each was written whole, so another content is damage."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise _damaged_file(file) from None
    if not isinstance(value, dict):
        raise _damaged_file(file)
    return value


def _damaged_file(file: Path) -> UserError:
    return UserError(
        f"{file} is damaged: it is not the JSON that was written", fix="bring it back from a copy"
    )


def _named(config: Config, directory: Path | None) -> Path | None:
    """Return the run directory that the caller or the configuration names, if one does."""
    if directory is None and config.run.directory:
        return Path(config.run.directory)
    return directory


def _made_beside_others(place: Path) -> Path:
    """Make a folder of this name, or of a numbered one: runs may begin in the same second."""
    place.parent.mkdir(parents=True, exist_ok=True)
    folder, number = place, 1
    while True:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
            return folder
        number += 1
        folder = place.with_name(f"{place.name}-{number}")


def _is_unbegun(directory: Path) -> bool:
    """Tell whether a folder holds nothing but what was written before run.json: before any work."""
    if not (directory / STATUS).exists():  # the first file
        return all(
            file.name == LOCK or file.match(f".{STATUS}.*.part") for file in directory.iterdir()
        )
    run = RunDirectory(directory)
    return run.record() is None and run.status().state == "started"


def _require_new(directory: Path) -> None:
    try:
        occupied = directory.exists() and not _is_unbegun(directory)
        # Above it, a file would be in the way, or a folder that nobody may write to.
        above = next(place for place in (directory, *directory.parents) if place.exists())
        if not above.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(above, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise _unusable(directory, error) from None
    if occupied:
        raise UserError(
            f"run directory {directory} is not empty",
            allowed="a new or an empty folder",
            fix="name another --run-dir, or go on with `fedrx resume`",
        )


def _unusable(directory: Path, error: OSError) -> UserError:
    return UserError(
        f"run directory {directory}: {error.strerror}", fix="name a writable --run-dir"
    )
