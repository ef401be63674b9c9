"""Laboratory results as a few lines of text for each admission.

One result for each name, the last that was known; what the laboratory flagged comes first, then
what is latest, and only the first ``MOST_LABS`` are kept. None of this looks at other admissions.
"""

import polars as pl

from common.data.protocols import FLAGGED, MOST_LABS

COLUMNS = {
    "hadm_id": pl.Int64,
    "name": pl.String,
    "time": pl.Datetime,
    "value": pl.Float64,
    "unit": pl.String,
    "flagged": pl.Boolean,
}


def last_results(results: pl.DataFrame) -> pl.DataFrame:
    """Keep the last result of each admission and name; at one time the larger value counts.

    Args:
        results: ``COLUMNS``.
    """
    return results.sort("time", "value", "flagged", "unit", nulls_last=True).unique(
        ["hadm_id", "name"], keep="last", maintain_order=True
    )


def lab_lines(results: pl.DataFrame) -> pl.DataFrame:
    """Return hadm_id and ``labs``, a list of texts, what matters most first.

    Args:
        results: ``COLUMNS``; those that were known in time.

    >>> from datetime import datetime
    >>> rows = [(1, "Sodium", datetime(2150, 1, 1, 9), 128.0, "mEq/L", True),
    ...         (1, "pH (Urine)", datetime(2150, 1, 1, 10), 6.5, None, False)]
    >>> lab_lines(pl.DataFrame(rows, schema=COLUMNS, orient="row"))["labs"].to_list()
    [['Sodium: 128 mEq/L, abnormal', 'pH (Urine): 6.5']]
    """
    number = pl.col("value").cast(pl.String).str.replace(r"\.0$", "")
    unit = pl.col("unit").fill_null("")
    text = pl.concat_str(
        pl.col("name"),
        pl.lit(": "),
        number,
        pl.when(unit == "").then(pl.lit("")).otherwise(pl.lit(" ") + unit),
        pl.when("flagged").then(pl.lit(FLAGGED)).otherwise(pl.lit("")),
    )
    ordered = last_results(results).sort(
        "hadm_id", "flagged", "time", "name", descending=[False, True, True, False]
    )
    return ordered.group_by("hadm_id", maintain_order=True).agg(text.head(MOST_LABS).alias("labs"))
