"""``fedrx report --bundle``: what a paper's readers need of a run, as an RO-Crate without rows.

It holds the configuration, the environment and the figures: no patient rows, no answers, no
weights, no times, no folders of this machine, no reviewers' names. Before anything is written,
every text is checked for what looks like an id or a date.
"""

import datetime
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from common.config import Config
from common.configio import flatten, from_flat, to_toml
from common.data.handling import CREDENTIALED, handling_of
from common.data.sources import identifiers_of
from common.errors import UserError
from common.files import json_document, json_line, new_folder, write_text
from common.privacy.budget.receipts import privacy_lines
from common.privacy.settings import is_private
from common.provenance import pip_install
from common.rundir import RunDirectory

FOLDER = "bundle"
METADATA = "ro-crate-metadata.json"
_ENVIRONMENT = (
    *("python", "system", "machine", "processor", "cpus", "accelerators"),
    *("versions", "git_commit", "source_digest"),
)
_TITLES = {
    "config.toml": ("Configuration: every key, re-runnable with data of one's own", "text/toml"),
    "environment.json": ("Versions, processor, accelerators, source digest", "application/json"),
    "data.json": ("Hashes of the tables, counts, reasons of dropped rows", "application/json"),
    "figures.json": ("The run's figures, as in its summary.json", "application/json"),
    "metrics.jsonl": ("Events of the training: name, value, round", "application/jsonl"),
    "privacy.jsonl": ("What each hospital spent, by round", "application/jsonl"),
}
_PRIVATE = frozenset({"time", "updated", "reviewers", "command_line", "prompt_date"})
"""Keys that are left out at any depth: times, names of people, command lines."""
_COUNTS = frozenset({"cutoffs", "seconds", "training_seconds"})
"""Of a private run left out as well: how many names and validation patients each hospital has, and
how long its steps took, which follows how many patients were drawn."""
_PLACES = (
    *("run.directory", "run.hospital-keys"),
    *("run.tracker-url", "run.tracker-agreement", "judge.base-url"),
)
"""Keys that name folders, servers and agreements: the bundle has their defaults."""
_LICENSE = {
    "name": "The authors of the run decide",
    "description": "No license is given with this bundle. FedRx itself is under Apache-2.0; the "
    "data that the figures are of has terms of its own, which bind whoever publishes them.",
}
_DATE = re.compile(
    r"(?<!\d)(?:(?:19|2[01])\d\d[-/]\d{1,2}[-/]\d{1,2}|\d{1,2}[-./]\d{1,2}[-./](?:19|2[01])\d\d)(?!\d)"
)


def write_bundle(
    run: RunDirectory,
    target: Path | None = None,
    *,
    today: Callable[[], datetime.date] = datetime.date.today,
) -> Path:
    """Write a run's bundle.

    Args:
        run: A run with figures.
        target: Folder to write; default ``bundle`` in the run directory. An earlier bundle there
            is replaced.
        today: The day of publication.

    Returns:
        The folder.

    Raises:
        UserError: If the run has no figures, a text holds what looks like an id or a date, the
            folder holds something else, or the package rocrate is not installed.
    """
    try:
        from rocrate.model.contextentity import ContextEntity
        from rocrate.rocrate import ROCrate
    except ImportError:
        raise UserError("--bundle needs the package rocrate", fix=pip_install("rocrate")) from None
    folder = (target or run.path / FOLDER).expanduser().absolute()
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file", allowed="a folder", fix="name another with --out")
    if names and not (METADATA in names and names <= {METADATA, *_TITLES}):
        raise UserError(
            f"{folder} holds something else",
            allowed="a new or empty folder, or an earlier bundle",
            fix="name another folder with --out",
        )
    files = contents(run)
    source = run.summary().source or CREDENTIALED
    crate = ROCrate()
    crate.name = "A FedRx run"
    crate.root_dataset["datePublished"] = today().isoformat()
    crate.root_dataset["license"] = crate.add(
        ContextEntity(crate, "#license", properties={"@type": "CreativeWork", **_LICENSE})
    )
    crate.description = (
        "Configuration, environment and figures of one run of FedRx, without patient rows, answers "
        f"or weights. Research only, not for clinical use. {handling_of(source).report}"
    )
    with new_folder(folder) as written:
        scratch = written.parent / "files"
        for name, content in files.items():
            write_text(scratch / name, content)
            title, kind = _TITLES[name]
            crate.add_file(scratch / name, name, properties={"name": title, "encodingFormat": kind})
        crate.write(written)
        shutil.rmtree(folder, ignore_errors=True)
    return folder


def contents(run: RunDirectory) -> dict[str, str]:
    """Return the bundle's files, checked.

    Raises:
        UserError: If the run has no figures, or a text holds what looks like an id or a date.
    """
    private = is_private(run.config())
    left_out = _PRIVATE | _COUNTS if private else _PRIVATE
    summary, events = _public(run.summary().as_json(), left_out), run.metrics()
    if not summary:
        raise UserError(f"{run.path} has no figures yet", fix="`fedrx resume` it")
    if private:
        events = [event for event in events if not event.name.endswith("seconds")]
    environment = run.environment().as_json()
    documents: dict[str, list[Any]] = {
        "environment.json": [
            _public({k: environment[k] for k in _ENVIRONMENT if k in environment})
        ],
        # Of a private run no count of patients is told.
        "data.json": [] if private else [_public(run.data().as_json())],
        "figures.json": [summary],
        "metrics.jsonl": [_public(event.as_json(), left_out) for event in events],
        "privacy.jsonl": [_public(line.as_json()) for line in privacy_lines(run)],
    }
    keys = _public(flatten(run.config()))
    if keys["data.path"] != "synthetic":
        keys["data.path"] = "DATA"
    keys |= {key: flatten(Config())[key] for key in _PLACES}
    ids = re.compile(rf"(?<![\w.])(?:{identifiers_of(run.config().data)})(?![\w.])")
    config = to_toml(from_flat(keys), heading="Of a bundle: data.path is yours to fill in.")
    # Its numbers are no ids: a seed may be a day's date.
    _check("config.toml", _texts(keys), ids)
    files = {"config.toml": config}
    for name, values in documents.items():
        if any(values):
            _check(name, _texts(values), ids)
            files[name] = (
                "".join(map(json_line, values)) if name.endswith("l") else json_document(values[0])
            )
    return files


def _public(value: Any, left_out: Collection[str] = _PRIVATE) -> Any:
    """Leave out times and people, and of a place on this machine all but its last name."""
    if isinstance(value, Mapping):
        return {key: _public(one, left_out) for key, one in value.items() if key not in left_out}
    if isinstance(value, list | tuple):
        return [_public(one, left_out) for one in value]
    if isinstance(value, str) and value.startswith(("/", "~", "./", "../")):
        return Path(value).name
    return value


def _texts(value: Any) -> Iterator[str]:
    """Yield every key and every text; numbers of ours are counts and measures."""
    if isinstance(value, Mapping):
        for key, one in value.items():
            yield str(key)
            yield from _texts(one)
    elif isinstance(value, list):
        for one in value:
            yield from _texts(one)
    elif isinstance(value, str):
        yield value


def _check(name: str, texts: Any, ids: re.Pattern[str]) -> None:
    for text in texts:
        for what, pattern in (("an id", ids), ("a date", _DATE)):
            if pattern.search(text):
                raise UserError(
                    f"the bundle's {name} would hold what looks like {what}: nothing was written",
                    allowed="no ids, no dates",
                    fix="look for it in the configuration's names and the hospitals' names",
                )
