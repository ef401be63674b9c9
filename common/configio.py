"""Read, validate, override, flatten and write configurations.

Validation reports every problem at once: the key, its value, what is allowed, and for an unknown
key the nearest known one.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import os
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar, get_args, get_origin

from common.config import Config
from common.errors import UserError
from common.template import is_template

Scalar = bool | int | float | str
T = TypeVar("T")
_OLD_KEYS = {
    "evaluation.constrained": ("evaluation.decoding", {"true": "grammar", "false": "greedy"})
}
"""Keys of earlier configurations and run directories: key -> (key now, value -> value now)."""


@cache
def known_keys() -> Mapping[str, dataclasses.Field[Any]]:
    """Return every dotted key (``train.learning-rate``) with its dataclass field."""
    return MappingProxyType(
        {
            _dotted(section, entry): entry
            for section, values in _sections(Config())
            for entry in dataclasses.fields(values)
        }
    )


def flatten(config: Config) -> dict[str, Scalar]:
    """Return the flat run-config that Flower carries: dotted key -> scalar.

    >>> flatten(Config())["adapter.rank"]
    16
    """
    return {
        _dotted(section, entry): getattr(values, entry.name)
        for section, values in _sections(config)
        for entry in dataclasses.fields(values)
    }


def from_flat(values: Mapping[str, Any], *, base: Config | None = None) -> Config:
    """Build a configuration from dotted keys over ``base`` (default: the defaults).

    Raises:
        UserError: naming every unknown key and every value that is not allowed.
    """
    known = known_keys()
    problems: list[str] = []
    flat = flatten(base or Config())
    for given, raw in values.items():
        key, value = _renamed(given, raw)
        if key not in known:
            problems.append(_unknown(key, known))
            continue
        try:
            flat[key] = _checked(key, value, known[key])
        except ValueError as error:
            problems.append(str(error))
    if problems:
        count = f"{len(problems)} problems: " if len(problems) > 1 else ""
        raise UserError(
            f"configuration: {count}" + " | ".join(problems), fix="mend the keys named here"
        )
    sections = {
        section: dataclasses.replace(
            values, **{e.name: flat[_dotted(section, e)] for e in dataclasses.fields(values)}
        )
        for section, values in _sections(Config())
    }
    return Config(**sections)


def read_config(path: Path, overrides: Iterable[str] = ()) -> Config:
    """Read a TOML file and apply ``key=value`` overrides.

    Raises:
        UserError: for a missing or broken file, unknown keys or values that are not allowed.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows' editors begin with a mark
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"configuration file {path}: {getattr(error, 'strerror', None) or error}",
            fix="name a readable TOML file, or the name of a shipped one such as hospitals.toml",
        ) from None
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"configuration file {path}: {error}", fix="mend the TOML") from None
    values = dict(_flatten_table(table))
    values.update(parse_overrides(overrides))
    return from_flat({key: _content(key, value) for key, value in values.items()})


def parse_overrides(overrides: Iterable[str]) -> dict[str, Scalar]:
    """Turn ``key=value`` strings into values; the key's type decides how the text is read.

    >>> parse_overrides(["train.learning-rate=1e-2", "data.path=a b"])
    {'train.learning-rate': 0.01, 'data.path': 'a b'}
    """
    known = known_keys()
    values: dict[str, Scalar] = {}
    for text in overrides:
        key, equals, raw = text.partition("=")
        key, raw = _renamed(key.strip(), raw)
        if not equals:
            raise UserError(
                f"--set {text}", allowed="key=value", fix="for instance --set adapter.rank=32"
            )
        if key not in known:
            raise UserError(f"--set {_unknown(key, known)}", fix="use a known key")
        if any("\ud800" <= character <= "\udfff" for character in raw):
            raise UserError(f"--set {key} is not UTF-8 text", fix="set the terminal to UTF-8")
        values[key] = _content(key, _from_text(key, raw, known[key]))
    return values


def to_toml(config: Config, *, heading: str = "") -> str:
    """Render a complete, re-runnable TOML file."""
    lines = [f"# {line}" for line in heading.splitlines()]
    for section, values in _sections(config):
        lines += ["", f"[{section}]"] if lines else [f"[{section}]"]
        for entry in dataclasses.fields(values):
            name = entry.name.replace("_", "-")
            lines.append(f"{name} = {toml_scalar(getattr(values, entry.name))}")
    return "\n".join(lines) + "\n"


def toml_scalar(value: Scalar) -> str:
    """Render one scalar as TOML.

    >>> toml_scalar(0.001), toml_scalar(True), toml_scalar("a b")
    ('0.001', 'true', '"a b"')
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def config_digest(config: Config) -> str:
    """Return sha256 of everything that decides the result (not ``run.*``)."""
    values = {k: v for k, v in flatten(config).items() if not k.startswith("run.")}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def config_hash(config: Config) -> str:
    """Return the digest's first characters, for names that people read.

    Short hashes collide in seconds of search: nothing that is spent may be kept under one.
    """
    return config_digest(config)[:8]


def run_digest(config: Config) -> str:
    """Return sha256 of a configuration and its run directory: which run of a server's it is.

    Not Flower's run id, so that a federation that is started again is the same run.
    """
    return hashlib.sha256(f"{config_digest(config)} {config.run.directory}".encode()).hexdigest()


def completed_for_flwr(config: Config, *, run_id: int, nodes: int | None = None) -> Config:
    """Complete a configuration that plain ``flwr run`` started, without the launcher.

    Such a run has no run directory yet, and Flower's number of simulated SuperNodes decides how
    many hospitals there are. Server and hospitals derive the same folder from Flower's run id,
    as Flower prints it.

    Args:
        config: As Flower hands it over.
        run_id: Flower's run id.
        nodes: Simulated SuperNodes, where known.
    """
    if config.run.directory:
        return config
    base = Path(os.environ.get("FEDRX_RUNS", "~/fedrx-runs")).expanduser()
    directory = str(base / f"flwr-{run_id % 2**64}")
    federation = replace(config.federation, hospitals=nodes or config.federation.hospitals)
    return replace(config, federation=federation, run=replace(config.run, directory=directory))


@dataclass(frozen=True, slots=True)
class Change:
    """One key whose value differs between two configurations."""

    key: str
    old: Scalar
    new: Scalar

    def __str__(self) -> str:
        return f"{self.key}: {self.old!r} -> {self.new!r}"


def differences(old: Config, new: Config) -> list[Change]:
    """Return every key that differs, ``run.*`` left out.

    >>> from common.config import TrainConfig
    >>> print(*differences(Config(), Config(train=TrainConfig(seed=3))))
    train.seed: 0 -> 3
    """
    before, after = flatten(old), flatten(new)
    return [
        Change(key, before[key], after[key])
        for key in before
        if before[key] != after[key] and not key.startswith("run.")
    ]


def changed_freely(config: Config, overrides: Iterable[str], free: tuple[str, ...]) -> Config:
    """Apply ``key=value`` overrides of what does not decide what was trained.

    Args:
        config: A run's own.
        overrides: As on the command line.
        free: Keys, and sections with their dot, that may change.

    Raises:
        UserError: naming every other key that would change.
    """
    changed = from_flat(parse_overrides(overrides), base=config)
    refused = [str(one) for one in differences(config, changed) if not one.key.startswith(free)]
    if refused:
        raise UserError(
            f"--set would change what was trained: {'; '.join(refused)}",
            allowed=", ".join(f"{key}*" if key.endswith(".") else key for key in free),
            fix="leave it out, or train a run with it",
        )
    return changed


def choices(entry: dataclasses.Field[Any]) -> tuple[str, ...]:
    """Return what a key's type allows; nothing where every text is allowed.

    >>> choices(known_keys()["federation.mismatch"])
    ('stop', 'refuse')
    """
    return get_args(entry.type) if get_origin(entry.type) is Literal else ()


def file_keys() -> tuple[str, ...]:
    """Return the keys whose values name files or folders of this machine.

    >>> "data.path" in file_keys(), "run.name" in file_keys()
    (True, False)
    """
    return tuple(key for key, entry in known_keys().items() if entry.metadata["file"])


def _sections(config: Config) -> list[tuple[str, Any]]:
    return [(entry.name, getattr(config, entry.name)) for entry in dataclasses.fields(config)]


def _dotted(section: str, entry: dataclasses.Field[Any]) -> str:
    return f"{section}.{entry.name.replace('_', '-')}"


def _content(key: str, value: T) -> T | str:
    """Return a file's text for the name of the file, where a key's value is such a text.

    Only what a person typed is read so: a value that came over the wire is never opened.
    """
    entry = known_keys().get(key)
    if entry is None or not entry.metadata["content"] or not isinstance(value, str):
        return value
    if not value or is_template(value):
        return value
    try:
        return Path(value).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise UserError(
            f"{key}={value}: {getattr(error, 'strerror', None) or 'it is no UTF-8 text'}",
            fix="name a readable text file",
        ) from None


def _flatten_table(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _flatten_table(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _renamed(key: str, value: T) -> tuple[str, T | str]:
    """Return what an old key is called today, where its value still means something.

    >>> _renamed("evaluation.constrained", True), _renamed("train.seed", 3)
    (('evaluation.decoding', 'grammar'), ('train.seed', 3))
    """
    new, values = _OLD_KEYS.get(key, (key, {}))
    text = str(value).strip().lower()
    return (new, values[text]) if text in values else (key, value)


def _unknown(key: str, known: Mapping[str, object]) -> str:
    tails = {name.split(".", 1)[1]: name for name in known}
    initials = {"".join(word[0] for word in tail.split("-")): tail for tail in tails if "-" in tail}
    tail = key.split(".")[-1]
    near = [tails[initials[tail]]] if tail in initials else []
    near = near or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    near = near or [tails[name] for name in difflib.get_close_matches(tail, tails, n=1)]
    return f"unknown key {key}" + (f" (did you mean {near[0]}?)" if near else "")


def _from_text(key: str, raw: str, entry: dataclasses.Field[Any]) -> Scalar:
    kind: type = type(entry.default)
    text = raw.strip()
    if kind is str:
        if len(text) >= 2 and text[0] == text[-1] and text[0] in "\"'":
            return text[1:-1]
        return text
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        return int(text.replace("_", "")) if kind is int else float(text)
    except (KeyError, ValueError):
        raise UserError(
            f"--set {key}={raw}",
            allowed=allowed(entry),
            fix=f"for instance --set {key}={str(entry.default).lower()}",
        ) from None


def allowed(entry: dataclasses.Field[Any]) -> str:
    """Return what a key may be set to, for people."""
    limits = entry.metadata
    if choices(entry):
        return " | ".join(choices(entry))
    kind = {bool: "true | false", int: "an integer", float: "a number", str: "text"}[
        type(entry.default)
    ]
    bounds = [
        f"{sign} {limits[name]:g}"
        for name, sign in (("low", ">="), ("above", ">"), ("high", "<="))
        if limits[name] is not None
    ]
    return f"{kind} {' and '.join(bounds)}".strip()


def _checked(key: str, value: object, entry: dataclasses.Field[Any]) -> Scalar:
    """Return ``value`` in the key's type, or raise ValueError with the whole complaint."""
    kind: type = type(entry.default)
    complaint = f"{key}={value!r} (allowed: {allowed(entry)})"
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(complaint)
    limits = entry.metadata
    if choices(entry) and value not in choices(entry):
        raise ValueError(complaint)
    if isinstance(value, int | float) and not isinstance(value, bool):
        low, above, high = limits["low"], limits["above"], limits["high"]
        if (
            (low is not None and value < low)
            or (above is not None and value <= above)
            or (high is not None and value > high)
        ):
            raise ValueError(complaint)
    assert isinstance(value, bool | int | float | str)
    if limits["fault"] and (fault := limits["fault"](value)):
        raise ValueError(f"{key}: {fault}")
    return value
