"""Missing body measures: one policy per field, fitted on the training split alone."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from common.config import DataConfig
from common.data.samples import Admission


def policies_of(config: DataConfig) -> dict[str, str]:
    """Return the policy (``unknown``, ``drop`` or ``median``) of each field that may be missing."""
    return {
        "height_cm": config.missing_height,
        "weight_kg": config.missing_weight,
        "bmi": config.missing_bmi,
    }


def fit_medians(train: Sequence[Admission], policies: Mapping[str, str]) -> dict[str, float | None]:
    """Return the training median of every field under the median policy; None when none is known.

    >>> known = Admission(patient=1, admission=1, sex="F", age=50, height_cm=160.0)
    >>> fit_medians([known], {"height_cm": "median", "bmi": "unknown"})
    {'height_cm': 160.0}
    """
    medians: dict[str, float | None] = {}
    for name, policy in policies.items():
        if policy == "median":
            known = [value for one in train if (value := getattr(one, name)) is not None]
            medians[name] = round(statistics.median(known), 1) if known else None
    return medians


def apply_policies(
    admissions: Sequence[Admission],
    policies: Mapping[str, str],
    medians: Mapping[str, float | None],
) -> tuple[tuple[Admission, ...], dict[str, int]]:
    """Fill or drop what is missing.

    Args:
        admissions: Samples of one split.
        policies: Policy by field.
        medians: From ``fit_medians`` on the training split of the same hospital.

    Returns:
        The samples that remain, and how many were dropped by reason (``missing_height_cm``: the
        first field that was missing decides).
    """
    kept: list[Admission] = []
    dropped = {f"missing_{name}": 0 for name, policy in policies.items() if policy == "drop"}
    for one in admissions:
        absent = [name for name in policies if getattr(one, name) is None]
        refused = next((name for name in absent if policies[name] == "drop"), None)
        if refused is not None:
            dropped[f"missing_{refused}"] += 1
            continue
        filled: dict[str, Any] = {
            name: medians[name] for name in absent if policies[name] == "median"
        }
        kept.append(dataclasses.replace(one, **filled) if filled else one)
    return tuple(kept), dropped
