"""How many hospitals a round asks, and what they are called in a simulation."""

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


def trained_by(federation: FederationConfig) -> list[str]:
    """Return the names in ``federation.only``, sorted; empty where all hospitals take part.

    >>> trained_by(FederationConfig(only="hospital-3, hospital-1"))
    ['hospital-1', 'hospital-3']
    """
    return sorted({name.strip() for name in federation.only.split(",")} - {""})


def asked(federation: FederationConfig) -> int:
    """Return how many hospitals are asked in a round.

    >>> asked(FederationConfig()), asked(FederationConfig(only="hospital-1")), asked(
    ...     FederationConfig(hospitals=9, fraction=0.5, only="hospital-1,hospital-2,hospital-3"))
    (3, 1, 2)
    """
    return sampled(federation.fraction, len(trained_by(federation)) or federation.hospitals)


def hospital_names(hospitals: int) -> list[str]:
    """Return the names that a simulation's hospitals have.

    >>> hospital_names(2)
    ['hospital-1', 'hospital-2']
    """
    digits = len(str(hospitals))
    return [f"hospital-{number:0{digits}d}" for number in range(1, hospitals + 1)]


def check_only(federation: FederationConfig) -> None:
    """Refuse ``federation.only`` where no hospital of a simulation has such a name.

    Raises:
        UserError: naming the first and the last hospital.
    """
    names = hospital_names(federation.hospitals)
    if not set(trained_by(federation)) <= set(names):
        raise UserError(
            f"federation.only={federation.only}",
            allowed=" to ".join(dict.fromkeys((names[0], names[-1]))),
            fix="name hospitals, comma-separated, or leave it empty for all of them",
        )
