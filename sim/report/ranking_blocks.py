"""What a report says beside the metrics: differences, rankings, hospitals, interactions."""

from collections.abc import Mapping, Sequence
from typing import Any

from common.evaluation.high_priority import CITATION
from common.records.summary import Summary
from sim.report.html import Block
from sim.report.plots import Points, lines_svg
from sim.report.words import model_name, number, with_interval

Models = Sequence[tuple[str, Mapping[str, Any]]]
"""The name of each that has the figure at hand, and its figures."""
Interval = Mapping[str, float | None]
"""``value``, ``low`` and ``high``."""
_PERFECT = ((0.0, 0.0), (1.0, 1.0))
_SIDES = (("predicted", "rate"), ("true", "rate"), ("predicted", "unknown"))
_SHIPPED = (
    "Share of the lists' pairs of ingredients that are of the 15 pairs of classes of "
    f"{CITATION} (a minimum list), and of the ingredients that are in none of them."
)
_NAMED = (
    "Share of the lists' pairs of ingredients that the user's file calls interacting, and of the "
    "ingredients that the file does not know."
)
_INTERACTIONS = {
    "ddi_high_priority": ("High-priority interactions", _SHIPPED),
    "interactions": ("Interacting drugs", _NAMED),
}


def ranking_blocks(summary: Summary) -> list[Block]:
    """Return the blocks on rankings, hospitals and interactions, as far as a run has them."""
    models = [
        (model_name(key, summary), one.model_dump(exclude_unset=True))
        for key, one in summary.metrics.items()
    ]
    blocks = [
        _beyond(summary, _with(models, "f1_beyond")),
        _rankings(_with(models, "prauc")),
        _by_hospital(_with(models, "by_hospital")),
        *(_interactions(key, _with(models, key)) for key in _INTERACTIONS),
        _unmapped(_with(models, "unmapped")),
    ]
    return [block for block in blocks if block.rows]


def _with(models: Models, figure: str) -> Models:
    return [(name, one) for name, one in models if figure in one]


def _beyond(summary: Summary, models: Models) -> Block:
    others = list(dict.fromkeys(other for _, one in models for other in one["f1_beyond"] or ()))
    return Block(
        title="Beside the baselines",
        note="Difference in F1, paired by admission; 95% bootstrap intervals over patients. "
        "Drugs per list are means.",
        headers=(
            *("", *(f"F1 beyond {model_name(other, summary)}" for other in others)),
            *("drugs listed", "drugs ordered"),
        ),
        rows=tuple(
            (
                name,
                *(_difference(one["f1_beyond"].get(other)) for other in others),
                *(f"{one['drugs_per_list'][side]:.1f}" for side in ("predicted", "true")),
            )
            for name, one in models
            if one["f1_beyond"]
        ),
    )


def _rankings(models: Models) -> Block:
    lines: dict[str, Points] = {"as ordered": _PERFECT}
    rows = []
    for name, one in models:
        calibration = one.get("calibration") or {}
        at_10 = one["at"]["10"]
        figures = [at_10["precision"], at_10["recall"]]
        figures += [calibration.get("brier"), calibration.get("expected_error")]
        rows.append((name, _estimate(one["prauc"]), *map(number, figures)))
        if calibration:
            bands = calibration["bins"]
            lines[name] = tuple((band["confidence"], band["ordered"]) for band in bands)
    return Block(
        title="Rankings",
        note="All drugs of a hospital's training split (or of the user's formulary), the "
        "likeliest first. PRAUC is the average precision of an admission. Confidences are "
        "recalibrated, and scored lists cut, on each hospital's own validation patients; the "
        "plot shows how often drugs of a confidence were ordered.",
        headers=(
            *("", "PRAUC", "precision at 10", "recall at 10"),
            *("Brier score", "expected calibration error"),
        ),
        rows=tuple(rows),
        svgs=(lines_svg(lines, x_label="confidence", y_label="share ordered", shares=True),)
        if len(lines) > 1
        else (),
    )


def _by_hospital(models: Models) -> Block:
    models = [(name, one) for name, one in models if one["by_hospital"]]
    hospitals = list(models[0][1]["by_hospital"]) if models else []
    return Block(
        title="F1 by hospital",
        headers=("", *hospitals, "worst", "best less worst"),
        rows=tuple(
            (
                name,
                *(number(one["by_hospital"].get(place, {}).get("f1")) for place in hospitals),
                one["worst_hospital"],
                number(one.get("hospital_gap")),
            )
            for name, one in models
        ),
    )


def _unmapped(models: Models) -> Block:
    return Block(
        title="Names that data.drug-map does not hold",
        note="Share of the names; each of these counts as itself, and is equal to no code.",
        headers=("", "listed", "ordered"),
        rows=tuple(
            (name, number(one["unmapped"]["predicted"]), number(one["unmapped"]["true"]))
            for name, one in models
            if one["unmapped"]
        ),
    )


def _interactions(key: str, models: Models) -> Block:
    title, note = _INTERACTIONS[key]
    return Block(
        title=title,
        note=note,
        headers=("", "interacting, listed", "interacting, ordered", "unknown, listed"),
        rows=tuple(
            (name, *(number(one[key][side][share]) for side, share in _SIDES))
            for name, one in models
        ),
    )


def _estimate(estimate: Interval | None) -> str:
    if not estimate:
        return "–"
    return with_interval(estimate["value"], [estimate["low"], estimate["high"]])


def _difference(estimate: Interval | None) -> str:
    """Format a difference, whose ends may be negative."""
    if not estimate:
        return "–"
    if estimate["low"] is None:
        return f"{estimate['value']:+.3f}"
    return f"{estimate['value']:+.3f} ({estimate['low']:+.2f} to {estimate['high']:+.2f})"
