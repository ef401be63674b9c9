"""How many hospitals a round asks, and what its aggregation withstands with so many."""

import math

from common.config import FederationConfig
from common.errors import UserError

NOT_EVALUATED = "not-evaluated"
"""Event of a round without a validation loss; its value is the reason."""
WITHSTANDS_NOTHING = "withstands-nothing"
"""Event of a round in which a robust strategy had too few updates; its value is their number."""


def sampled(fraction: float, hospitals: int) -> int:
    """Return how many hospitals a share of them is, rounded up; at least one.

    >>> sampled(0.5, 3), sampled(0.1, 3), sampled(1.0, 3)
    (2, 1, 3)
    """
    return max(1, math.ceil(fraction * hospitals - 1e-9))


def is_robust(federation: FederationConfig, updates: int) -> bool:
    """Return whether a robust strategy withstands anything with so many updates; others: True.

    Flower's trimmed mean cuts ``int(trim * updates)`` at each end. Krum withstands f malicious
    hospitals among at least 2 f + 3 (Blanchard et al. 2017); with fewer, Flower's picks one too.

    >>> trimmed = FederationConfig(strategy="trimmed-mean", trim=0.2)
    >>> [is_robust(trimmed, n) for n in (4, 5)]
    [False, True]
    """
    if federation.strategy == "trimmed-mean":
        return int(federation.trim * updates) > 0
    if federation.strategy == "krum":
        return updates >= 2 * federation.malicious + 3
    return True


def hospital_names(hospitals: int) -> list[str]:
    """Return the names that a simulation's hospitals have.

    >>> hospital_names(2)
    ['hospital-1', 'hospital-2']
    """
    digits = len(str(hospitals))
    return [f"hospital-{number:0{digits}d}" for number in range(1, hospitals + 1)]


def check_only(federation: FederationConfig) -> None:
    """Refuse ``federation.only`` where no hospital of a simulation has that name.

    Raises:
        UserError: naming the first and the last hospital.
    """
    names = hospital_names(federation.hospitals)
    if federation.only and federation.only not in names:
        raise UserError(
            f"federation.only={federation.only}",
            allowed=" to ".join(dict.fromkeys((names[0], names[-1]))),
            fix="name one of the hospitals, or leave it empty for all of them",
        )


def check_strategy(federation: FederationConfig) -> None:
    """Refuse a robust strategy that withstands nothing even if every asked hospital answers.

    Raises:
        UserError: for a trimmed mean that cuts nothing, and for krum with too few hospitals. One
            hospital alone (``federation.only``) is not aggregated, and passes.
    """
    asked = sampled(federation.fraction, federation.hospitals)
    if federation.only or is_robust(federation, asked):
        return
    if federation.strategy == "trimmed-mean":
        raise UserError(
            f"federation.strategy=trimmed-mean with federation.trim={federation.trim:g} cuts "
            f"nothing of {asked} hospitals a round",
            allowed="federation.trim x hospitals a round of at least 1",
            fix="take more hospitals, a larger federation.fraction or a larger federation.trim",
        )
    raise UserError(
        f"federation.strategy=krum with federation.malicious={federation.malicious} withstands "
        f"nobody among {asked} hospitals a round",
        allowed=f"at least 2 x federation.malicious + 3 = {2 * federation.malicious + 3}",
        fix="take more hospitals or a larger federation.fraction",
    )
