"""A deployed hospital's own limit on what all runs together may spend on its patients."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.config import Config
from common.errors import RunFailed
from common.files import write_json
from common.privacy.accounting import epsilon
from common.privacy.plan import PrivacyPlan
from common.privacy.settings import is_private, plan_of

MAX_EPSILON = "max-epsilon"
"""Key of the node configuration; without it the hospital sets no limit."""
PROMISE = "privacy-promise.json"


class LimitReached(RunFailed):
    """The hospital takes no part in this run. The text holds public constants alone."""


def keep_to_limit(config: Config, node_config: Mapping[str, Any], folder: Path) -> None:
    """Record what a run may spend on this hospital's patients, or refuse to take part in it.

    Runs on the same patients compose: their epsilons add up, and so do their deltas (Dwork and
    Roth 2014, theorem 3.16). A run counts with its whole plan from its first message on, for all
    the hospital knows of how far the server gets.

    Args:
        config: The run's, as the server sent it.
        node_config: Flower's, of this node.
        folder: The hospital's own folder of this run, which exists; its siblings are those of
            other runs.

    Raises:
        LimitReached: if the run does not protect patients, or would exceed the limit.
    """
    if MAX_EPSILON not in node_config:
        return
    limit = float(node_config[MAX_EPSILON])
    plan = plan_of(config) if is_private(config) else None
    if plan is None or plan.unit != "patient" or plan.deterministic_noise:
        raise LimitReached(
            f"this hospital takes part only in runs that protect every patient ({MAX_EPSILON} is "
            "set in its node configuration); fix: set privacy.target-epsilon, "
            "privacy.unit = patient and no deterministic noise"
        )
    own = folder / PROMISE
    new = not own.exists() or _promise(own)["plan"] != plan.fingerprint
    if new:
        # Before the others are read: of two runs that begin together one sees the other's.
        write_json(own, _cost(plan))
    try:
        _check_sum(own, limit)
    except LimitReached:
        if new:  # an older one may have been spent from, and counts whatever the limit is now
            own.unlink()
        raise


def _check_sum(own: Path, limit: float) -> None:
    others = [_promise(file) for file in own.parent.parent.glob(f"*/{PROMISE}") if file != own]
    spent, asked = math.fsum(one["epsilon"] for one in others), _promise(own)["epsilon"]
    if not spent + asked <= limit:
        raise LimitReached(
            f"this hospital's limit is epsilon {limit:g} over all runs: {spent:.4g} is promised to "
            f"{len(others)} others, and this one may spend {asked:.4g}"
        )


def _cost(plan: PrivacyPlan) -> dict[str, Any]:
    return {"plan": plan.fingerprint, "epsilon": epsilon(plan).value, "delta": plan.delta}


def _promise(file: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return {**found, "epsilon": float(found["epsilon"]), "plan": str(found["plan"])}
    except (ValueError, KeyError, TypeError):
        raise LimitReached(
            f"{PROMISE} of an earlier run is damaged: its cost is unknown, and nothing is released"
        ) from None
