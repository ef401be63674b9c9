"""Interacting drugs of lists, from a file that the user names; FedRx ships none.

Two forms of csv are read: DDInter's downloads (columns ``Drug_A`` and ``Drug_B`` among others; CC
BY-NC-SA 4.0), and ``drug_a,drug_b``. Names are compared as ingredients, and a pair has no order.

The rate is that of the literature on drug recommendation (Shang et al., AAAI 2019): interacting
pairs over all pairs, both summed over the lists.
"""

import csv
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from common.data.names import normalise
from common.errors import UserError

_COLUMNS = (("Drug_A", "Drug_B"), ("drug_a", "drug_b"))
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
    repeated: int = 0
    """Rows that name a pair again, in whichever order."""
    selves: int = 0
    """Rows that name one ingredient twice; they are left out."""


class InteractionFigures(NamedTuple):
    """Interactions of some lists."""

    rate: float | None
    """Interacting pairs over pairs; None where no list holds two ingredients."""
    pairs: int
    interacting: int
    unknown: float | None
    """Share of the listed ingredients that no pair of the file holds."""


def read_interactions(path: Path) -> Interactions:
    """Read a file of interacting pairs.

    Raises:
        UserError: If it cannot be read, has other columns, half a pair, or no pair at all.
    """
    what = f"evaluation.interactions={path}"
    expected = " or ".join(",".join(columns) for columns in _COLUMNS)
    found: set[Pair] = set()
    repeated = selves = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            rows = csv.DictReader(stream)
            columns = next((c for c in _COLUMNS if set(c) <= set(rows.fieldnames or ())), None)
            if columns is None:
                raise UserError(
                    f"{what} has other columns", allowed=expected, fix="name the two columns so"
                )
            for row in rows:
                sides = [normalise(row[column] or "", _LEVEL) for column in columns]
                if not all(sides):
                    raise UserError(
                        f"{what}, line {rows.line_num} names one drug alone",
                        allowed="two drugs in every row",
                        fix="complete the row or take it out",
                    )
                for first in sides[0]:
                    for second in sides[1]:
                        pair = Pair(*sorted((first, second)))
                        selves += first == second
                        repeated += pair in found
                        if first != second:
                            found.add(pair)
    except OSError as error:
        raise UserError(f"{what}: {error.strerror}", allowed=expected, fix="name a csv") from None
    except (UnicodeDecodeError, csv.Error):
        raise UserError(
            f"{what} cannot be read as csv in UTF-8", allowed=expected, fix="name a csv"
        ) from None
    if not found:
        raise UserError(f"{what} holds no pair", allowed=expected, fix="fill it in")
    return Interactions(
        pairs=frozenset(found),
        known=frozenset(name for pair in found for name in pair),
        repeated=repeated,
        selves=selves,
    )


def interacting(drugs: Collection[str], interactions: Interactions) -> list[tuple[str, str]]:
    """Return the pairs of one list's names that interact, in the list's order."""
    parts: Mapping[str, tuple[str, ...]] = {name: normalise(name, _LEVEL) for name in drugs}
    return [
        (a, b)
        for a, b in combinations(parts, 2)
        if any(Pair(*sorted((x, y))) in interactions.pairs for x in parts[a] for y in parts[b])
    ]


def interaction_figures(
    lists: Iterable[Sequence[str]], interactions: Interactions
) -> InteractionFigures:
    """Return the rate of interacting pairs over some lists.

    Args:
        lists: Drug names; the ingredients of each list are counted once.
        interactions: From ``read_interactions``.
    """
    pairs = interacting_pairs = named = unknown = 0
    for drugs in lists:
        parts = sorted({part for name in drugs for part in normalise(name, _LEVEL)})
        pairs += len(parts) * (len(parts) - 1) // 2
        interacting_pairs += sum(Pair(*two) in interactions.pairs for two in combinations(parts, 2))
        named += len(parts)
        unknown += sum(part not in interactions.known for part in parts)
    return InteractionFigures(
        rate=interacting_pairs / pairs if pairs else None,
        pairs=pairs,
        interacting=interacting_pairs,
        unknown=unknown / named if named else None,
    )
