"""Krippendorff's alpha against the worked examples of Krippendorff (2011), sections B to E."""

import pytest

from common.evaluation.agreement import krippendorff_alpha, unanimous_share


def by_unit(*raters: str) -> list[list[int]]:
    """Turn rows of one rater each (a point is a missing value) into lists per unit."""
    rows = [row.split() for row in raters]
    return [[ord(v) - 48 for v in unit if v != "."] for unit in zip(*rows, strict=True)]


FOUR_RATERS = by_unit(
    "1 2 3 3 2 1 4 1 2 . . .",
    "1 2 3 3 2 2 4 1 2 5 . 3",
    ". 3 3 3 2 3 4 2 2 5 1 .",
    "1 2 3 3 2 4 4 1 2 5 1 .",
)


def test_binary_data_of_two_raters() -> None:
    units = by_unit("0 1 0 0 0 0 0 0 1 0", "1 1 1 0 0 1 0 0 0 0")
    assert krippendorff_alpha(units) == pytest.approx(0.095, abs=5e-4)


def test_nominal_data_of_two_raters() -> None:
    units = by_unit("a a b b d c c c e d d a", "b a b b b c c c e d d d")
    assert krippendorff_alpha(units) == pytest.approx(0.692, abs=5e-4)


@pytest.mark.parametrize(
    ("metric", "published"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)]
)
def test_four_raters_with_missing_values(metric: str, published: float) -> None:
    assert krippendorff_alpha(FOUR_RATERS, metric) == pytest.approx(published, abs=5e-4)


def test_order_of_units_and_raters_does_not_matter() -> None:
    turned = [unit[::-1] for unit in reversed(FOUR_RATERS)]
    assert krippendorff_alpha(turned, "ordinal") == krippendorff_alpha(FOUR_RATERS, "ordinal")


def test_no_value_is_made_up() -> None:
    assert krippendorff_alpha([]) is None
    assert krippendorff_alpha([["a"], ["b"]]) is None
    assert krippendorff_alpha([["a", "a"], ["a", "a"]]) is None
    assert unanimous_share([["a"]]) is None


def test_systematic_disagreement_is_below_chance() -> None:
    alpha = krippendorff_alpha([["a", "b"], ["b", "a"], ["a", "b"]])
    assert alpha is not None
    assert alpha < 0
