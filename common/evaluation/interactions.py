"""Interacting drugs of lists: the shipped high-priority pairs, and a file that the user names.

Two forms of csv are read: DDInter's downloads (columns ``Drug_A`` and ``Drug_B`` among others; CC
BY-NC-SA 4.0), and ``drug_a,drug_b``. Names are compared as ingredients, and a pair has no order.
A column ``Level`` (DDInter's) or ``severity`` says which pairs are of high priority.

The rate is that of the literature on drug recommendation (Shang et al., AAAI 2019): interacting
pairs over all pairs, both summed over the lists.
"""

import csv
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, combinations, product
from pathlib import Path
from typing import NamedTuple

from common.data.names import normalise, require_no_more
from common.errors import UserError

_COLUMNS = (("Drug_A", "Drug_B"), ("drug_a", "drug_b"))
_FORMS = " or ".join(map(",".join, _COLUMNS))
_SEVERITY_COLUMNS = ("level", "severity")
SEVERE = ("contraindicated", "high", "major", "severe")
"""Severities, in any case, that make a pair of the user's file one of high priority."""
_LEVEL = "ingredient"


class Pair(NamedTuple):
    """Two ingredients, in alphabetical order."""

    first: str
    second: str


@dataclass(frozen=True, kw_only=True)
class Interactions:
    """Which ingredients interact."""

    pairs: frozenset[Pair]
    known: frozenset[str]
    """Every ingredient that some pair holds."""
    high_priority: Mapping[Pair, str] = field(default_factory=dict)
    """Pairs of high priority, and why each is one."""


class InteractionFigures(NamedTuple):
    """Interactions of some lists."""

    rate: float | None
    """Interacting pairs over pairs; None where no list holds two ingredients."""
    pairs: int
    interacting: int
    unknown: float | None
    """Share of the listed ingredients that no pair holds."""
    known: int
    """Listed ingredients that some pair holds."""
    lists: int
    """Lists with an interacting pair."""


class Interaction(NamedTuple):
    """Two names of one list that interact."""

    first: str
    second: str
    high_priority: str
    """Why they are of high priority; empty where they are not."""


def read_interactions(path: Path) -> Interactions:
    """Read a file of interacting pairs.

    Raises:
        UserError: If it cannot be read, has other columns, half a pair, or no pair at all.
    """
    what = f"evaluation.interactions={path}"
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            found = list(_pairs(csv.DictReader(stream), what))
    except OSError as error:
        raise UserError(f"{what}: {error.strerror}", allowed=_FORMS, fix="name a csv") from None
    except (UnicodeDecodeError, csv.Error):
        raise UserError(
            f"{what} cannot be read as csv in UTF-8", allowed=_FORMS, fix="name a csv"
        ) from None
    pairs = frozenset(pair for pair, _ in found)
    if not pairs:
        raise UserError(f"{what} holds no pair", allowed=_FORMS, fix="fill it in")
    return Interactions(
        pairs=pairs,
        known=frozenset(chain.from_iterable(pairs)),
        high_priority={
            pair: f"{severity} in the file of interactions"
            for pair, severity in found
            if severity in SEVERE
        },
    )


def _pairs(rows: "csv.DictReader[str]", what: str) -> Iterator[tuple[Pair, str]]:
    """Yield every pair that a row names, and its severity in small letters."""
    names = rows.fieldnames or ()
    columns = next((c for c in _COLUMNS if set(c) <= set(names)), None)
    severity = next((c for c in names if c.lower() in _SEVERITY_COLUMNS), "")
    if columns is None:
        raise UserError(f"{what} has other columns", allowed=_FORMS, fix="name the two columns so")
    for row in rows:
        require_no_more(row, f"{what}, line {rows.line_num}")
        sides = [normalise(row[column] or "", _LEVEL) for column in columns]
        if not all(sides):
            raise UserError(
                f"{what}, line {rows.line_num} names one drug alone",
                allowed="two drugs in every row",
                fix="complete the row or take it out",
            )
        for pair in product(*sides):
            if len(set(pair)) == 2:
                yield Pair(*sorted(pair)), (row.get(severity) or "").strip().lower()


def interacting(drugs: Collection[str], interactions: Interactions) -> list[Interaction]:
    """Return the pairs of one list's names that interact, in the list's order."""
    parts: Mapping[str, tuple[str, ...]] = {name: normalise(name, _LEVEL) for name in drugs}
    found = []
    for a, b in combinations(parts, 2):
        pairs = [Pair(*sorted(two)) for two in product(parts[a], parts[b])]
        if not interactions.pairs.isdisjoint(pairs):
            reasons = [interactions.high_priority.get(pair, "") for pair in pairs]
            found.append(Interaction(a, b, next(filter(None, reasons), "")))
    return found


def interaction_figures(
    lists: Iterable[Sequence[str]], interactions: Interactions
) -> InteractionFigures:
    """Return the rate of interacting pairs over some lists.

    Args:
        lists: Drug names; the ingredients of each list are counted once.
        interactions: From ``read_interactions``.
    """
    pairs = interacting_pairs = named = known = lists_with = 0
    for drugs in lists:
        parts = sorted({part for name in drugs for part in normalise(name, _LEVEL)})
        pairs += len(parts) * (len(parts) - 1) // 2
        own = sum(Pair(*two) in interactions.pairs for two in combinations(parts, 2))
        interacting_pairs += own
        lists_with += own > 0
        named += len(parts)
        known += sum(part in interactions.known for part in parts)
    return InteractionFigures(
        rate=interacting_pairs / pairs if pairs else None,
        pairs=pairs,
        interacting=interacting_pairs,
        unknown=(named - known) / named if named else None,
        known=known,
        lists=lists_with,
    )
