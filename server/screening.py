"""One hospital cannot decide the model: updates far from the round's others, and large weights.

A majority of honest hospitals is what both rules rest on: the median of a round then lies among
theirs. With fewer than three updates there is no majority, and nobody is accused.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

import numpy as np

from common.config import FederationConfig
from common.wire.contract import Tensors, Update

FEWEST = 3
"""Updates of a round with which one of them can be told from the others."""


def outliers(config: FederationConfig, b: Tensors, updates: Sequence[Update]) -> dict[str, str]:
    """Return hospital -> reason of those that moved B implausibly far.

    An update is refused if its change of B is longer (L2 norm over all matrices) than
    ``federation.max-update-norm`` times the median of the round.
    """
    if not config.max_update_norm or len(updates) < FEWEST:
        return {}
    norms = {update.hospital: distance(update.b, b) for update in updates}
    usual = median(norms.values())
    limit = config.max_update_norm * usual
    return {
        hospital: f"its B moved {norm / usual:.3g} times as far as the round's median "
        f"(federation.max-update-norm is {config.max_update_norm:g})"
        for hospital, norm in norms.items()
        if usual and norm > limit
    }


def with_capped_weights(config: FederationConfig, updates: Sequence[Update]) -> list[Update]:
    """Cut weights to ``federation.max-weight-share`` times their median; 0 cuts none.

    >>> one = [Update(hospital=str(w), b={}, weight=w, metrics={}) for w in (2.0, 4.0, 900.0)]
    >>> [update.weight for update in with_capped_weights(FederationConfig(), one)]
    [2.0, 4.0, 12.0]
    """
    if not config.max_weight_share or not updates:
        return list(updates)
    most = config.max_weight_share * median(update.weight for update in updates)
    return [replace(update, weight=min(update.weight, most)) for update in updates]


def distance(one: Tensors, other: Tensors) -> float:
    """Return the L2 norm of a difference, over all matrices."""
    squares = (np.square(one[key].astype(np.float64) - other[key]).sum() for key in sorted(one))
    return math.sqrt(math.fsum(map(float, squares)))
