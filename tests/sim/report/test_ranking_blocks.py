"""Blocks on rankings, hospitals and interactions: each figure where it belongs, or no block."""

from common.records.summary import Summary
from sim.report import plots
from sim.report.html import to_html, to_markdown
from sim.report.ranking_blocks import ranking_blocks

BANDS = [
    {"pairs": 30, "confidence": 0.05, "ordered": 0.1},
    {"pairs": 10, "confidence": 0.75, "ordered": 0.6},
]
FEDRX = {
    "f1_beyond": {"popularity": {"value": 0.123, "low": 0.05, "high": 0.21}},
    "drugs_per_list": {"predicted": 9.96, "true": 11.02},
    "prauc": {"value": 0.543, "low": 0.5, "high": 0.6},
    "at": {"10": {"precision": 0.4, "recall": 0.35}},
    "calibration": {"brier": 0.061, "expected_error": 0.0231, "bins": BANDS},
    "by_hospital": {"north": {"samples": 3, "f1": 0.61}, "south": {"samples": 4, "f1": 0.42}},
    "worst_hospital": "south",
    "hospital_gap": 0.19,
    "unmapped": {"predicted": 0.25, "true": None},
    "ddi_high_priority": {
        "predicted": {"rate": 0.0123, "pairs": 900, "interacting": 11, "unknown": 0.9},
        "true": {"rate": 0.0456, "pairs": 100, "interacting": 4, "unknown": 0.8},
    },
    "interactions": {
        "predicted": {"rate": 0.07, "pairs": 100, "interacting": 7, "unknown": 0.2},
        "true": {"rate": None, "pairs": 0, "interacting": 0, "unknown": None},
    },
}
POPULARITY = {
    "drugs_per_list": {"predicted": 5.0, "true": 11.02},
    "prauc": {"value": 0.3, "low": None, "high": None},
    "at": {"10": {"precision": 0.3, "recall": 0.2}},
}
SUMMARY = Summary.model_validate({"metrics": {"fedrx": FEDRX, "popularity": POPULARITY}})


def rows(title):
    (block,) = [one for one in ranking_blocks(SUMMARY) if one.title == title]
    return block.rows


def test_each_figure_stands_in_its_row():
    name = "FedRx (trained B)"
    assert rows("Beside the baselines") == ((name, "+0.123 (+0.05 to +0.21)", "10.0", "11.0"),)
    assert rows("Rankings") == (
        (name, "0.543 (0.50–0.60)", "0.400", "0.350", "0.061", "0.023"),
        ("popularity", "0.300", "0.300", "0.200", "–", "–"),
    )
    assert rows("F1 by hospital") == ((name, "0.610", "0.420", "south", "0.190"),)
    assert rows("High-priority interactions") == ((name, "0.012", "0.046", "0.900"),)
    assert rows("Interacting drugs") == ((name, "0.070", "–", "0.200"),)
    assert rows("Names that data.drug-map does not hold") == ((name, "0.250", "–"),)


def test_the_reliability_plot_ends_where_shares_do(monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "inline_svg", lambda figure: drawn.append(figure) or "<svg")
    ranking_blocks(SUMMARY)
    (axes,) = drawn[0].axes
    assert (axes.get_xlim(), axes.get_ylim()) == ((0, 1), (0, 1))


def test_the_reliability_plot_is_on_the_page():
    page = to_html("x", ranking_blocks(SUMMARY))
    assert page.count("<svg") == 1
    assert "share ordered" in page
    assert "Rankings" in to_markdown("x", ranking_blocks(SUMMARY))


def test_a_run_without_them_has_no_blocks():
    assert ranking_blocks(Summary.model_validate({"metrics": {"fedrx": {"f1": 0.5}}})) == []
    assert ranking_blocks(Summary()) == []
