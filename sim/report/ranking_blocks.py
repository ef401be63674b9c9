"""What a report says beside the metrics: differences, rankings, hospitals, interactions."""

from collections.abc import Mapping
from typing import Any

from common.evaluation.high_priority import CITATION
from common.records import Summary
from sim.report.html import Block
from sim.report.plots import Points, lines_svg
from sim.report.words import model_name, number, with_interval

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
    metrics = {model: one.model_dump() for model, one in summary.metrics.items()}
    return [
        *_beyond(summary, metrics),
        *_rankings(summary, metrics),
        *_by_hospital(summary, metrics),
        *_interactions(summary, metrics),
        *_unmapped(summary, metrics),
    ]


def _beyond(summary: Summary, metrics: Mapping[str, Mapping[str, Any]]) -> list[Block]:
    told = {model: one["f1_beyond"] for model, one in metrics.items() if one.get("f1_beyond")}
    if not told:
        return []
    others = list(dict.fromkeys(other for one in told.values() for other in one))
    rows = [
        (
            model_name(model, summary),
            *(_difference(one.get(other)) for other in others),
            *_lengths(metrics[model]),
        )
        for model, one in told.items()
    ]
    return [
        Block(
            title="Beside the baselines",
            note="Difference in F1, paired by admission; 95% bootstrap intervals over patients. "
            "Drugs per list are means.",
            headers=(
                *("", *(f"F1 beyond {model_name(other, summary)}" for other in others)),
                *("drugs listed", "drugs ordered"),
            ),
            rows=tuple(rows),
        )
    ]


def _rankings(summary: Summary, metrics: Mapping[str, Mapping[str, Any]]) -> list[Block]:
    ranked = {model: one for model, one in metrics.items() if "prauc" in one}
    if not ranked:
        return []
    lines: dict[str, Points] = {"as ordered": _PERFECT}
    rows = []
    for model, one in ranked.items():
        calibration = one.get("calibration") or {}
        name = model_name(model, summary)
        rows.append(
            (
                name,
                _estimate(one["prauc"]),
                number(one["at"]["10"]["precision"]),
                number(one["at"]["10"]["recall"]),
                number(calibration.get("brier")),
                number(calibration.get("expected_error")),
            )
        )
        if calibration:
            bands = calibration["bins"]
            lines[name] = tuple((band["confidence"], band["ordered"]) for band in bands)
    return [
        Block(
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
            svgs=(lines_svg(lines, x_label="confidence", y_label="share ordered"),)
            if len(lines) > 1
            else (),
        )
    ]


def _by_hospital(summary: Summary, metrics: Mapping[str, Mapping[str, Any]]) -> list[Block]:
    told = {model: one for model, one in metrics.items() if one.get("by_hospital")}
    if not told:
        return []
    names = list(next(iter(told.values()))["by_hospital"])
    rows = [
        (
            model_name(model, summary),
            *(number(one["by_hospital"].get(name, {}).get("f1")) for name in names),
            one["worst_hospital"],
            number(one.get("hospital_gap")),
        )
        for model, one in told.items()
    ]
    return [
        Block(
            title="F1 by hospital",
            headers=("", *names, "worst", "best less worst"),
            rows=tuple(rows),
        )
    ]


def _unmapped(summary: Summary, metrics: Mapping[str, Mapping[str, Any]]) -> list[Block]:
    rows = tuple(
        (model_name(model, summary), number(told["predicted"]), number(told["true"]))
        for model, one in metrics.items()
        if (told := one.get("unmapped"))
    )
    note = "Share of the names; each of these counts as itself, and is equal to no code."
    title = "Names that data.drug-map does not hold"
    return [Block(title=title, note=note, headers=("", "listed", "ordered"), rows=rows)] * bool(
        rows
    )


def _interactions(summary: Summary, metrics: Mapping[str, Mapping[str, Any]]) -> list[Block]:
    return [
        Block(
            title=title,
            note=note,
            headers=("", "interacting, listed", "interacting, ordered", "unknown, listed"),
            rows=tuple(
                (
                    model_name(model, summary),
                    *(number(one[key][side][what]) for side, what in _SIDES),
                )
                for model, one in metrics.items()
                if key in one
            ),
        )
        for key, (title, note) in _INTERACTIONS.items()
        if any(key in one for one in metrics.values())
    ]


def _estimate(told: Mapping[str, Any] | None) -> str:
    return with_interval(told["value"], [told["low"], told["high"]]) if told else "–"


def _difference(told: Mapping[str, Any] | None) -> str:
    """Format a difference, whose ends may be negative."""
    if not told or told["low"] is None:
        return f"{told['value']:+.3f}" if told else "–"
    return f"{told['value']:+.3f} ({told['low']:+.2f} to {told['high']:+.2f})"


def _lengths(values: Mapping[str, Any]) -> tuple[str, str]:
    told = values["drugs_per_list"]
    return f"{told['predicted']:.1f}", f"{told['true']:.1f}"
