"""How a run's facts read: names of models, figures with intervals, sizes, standing sentences."""

from collections.abc import Iterable, Sequence

from common.configio import toml_scalar
from common.model.adapter.spec import SCHEMES
from common.records.summary import Figures, Summary

NOTICE = "Research only, not for clinical use."
MODEL_NAMES = {
    "fedrx": "FedRx (trained B)",
    "personal": "FedRx, personal (B + own)",
    "untrained": "untrained backbone",
    "nearest_neighbours": "nearest neighbours",
    "logistic_regression": "logistic regression",
}
PERSONAL_NOTE = (
    "Personal answers are made with a B that each hospital trained for itself, without noise, and "
    "that never left it: no epsilon covers them, nor what is said of them."
)
OWN_NOTE = (
    "Made with {hospital}'s own B, which was trained without noise: no epsilon covers this list, "
    "and it is for {hospital} alone."
)
COLUMNS = (
    ("output_rate", "output rate"),
    ("precision", "precision"),
    ("recall", "recall"),
    ("jaccard", "Jaccard"),
    ("f1", "F1"),
    ("length_ratio", "length ratio"),
    ("oov_rate", "out of vocabulary"),
)
RANDOM_WEIGHTS = (
    "The tiny backbone's weights are random: the run shows that everything works, and its answers "
    "mean nothing."
)


def stands_for(summary: Summary) -> str:
    """Name the model whose answers a run is compared by: its personal adapters, if it has them.

    >>> stands_for(Summary()), stands_for(Summary(metrics={"fedrx": Figures()}))
    ('fedrx', 'fedrx')
    >>> stands_for(Summary(metrics={"fedrx": Figures(), "personal": Figures()}))
    'personal'
    """
    return "personal" if "personal" in summary.metrics else "fedrx"


def personal_note(summaries: Iterable[Summary]) -> str:
    """Return what is to be said beside figures of runs, if one of them is personal."""
    named = any(stands_for(summary) == "personal" for summary in summaries)
    return PERSONAL_NOTE if named else ""


def peak_memory(summary: Summary) -> str:
    """Say how much memory a run took, on the host and on a GPU.

    >>> peak_memory(Summary(peak_rss_bytes=2**30, peak_device_bytes=2**32))
    '1.00 GiB, on the GPU 4.00 GiB'
    """
    sizes = [("", summary.peak_rss_bytes), ("on the GPU ", summary.peak_device_bytes)]
    return ", ".join(f"{where}{size / 2**30:.2f} GiB" for where, size in sizes if size)


def model_name(model: str, summary: Summary) -> str:
    """Name a row of answers for people: a model, a baseline, or an earlier checkpoint of the run.

    >>> model_name("fedrx", Summary()), model_name("round-00001", Summary(rounds=4))
    ('FedRx (trained B)', 'FedRx, round 1 of 4')
    """
    unit, _, count = model.partition("-")
    steps = summary.scaling.steps if summary.scaling else 0
    totals = {"round": summary.rounds, "step": steps}
    if totals.get(unit) and count.isdigit():
        return f"FedRx, {unit} {int(count)} of {totals[unit]}"
    return MODEL_NAMES.get(model, model)


def number(value: float | None) -> str:
    """Format a metric; an absent one is a dash.

    >>> number(0.12345), number(None)
    ('0.123', '–')
    """
    return "–" if value is None else f"{value:.3f}"


def setting(value: object) -> str:
    """Write a key's value as ``--set`` takes it.

    >>> setting(True), setting(0.5), setting("tiny")
    ('true', '0.5', 'tiny')
    """
    return toml_scalar(value) if isinstance(value, bool) else str(value)


def figure(values: Figures, name: str) -> str:
    """Format one of a model's figures.

    >>> figure(Figures(f1=0.5, intervals={"f1": (0.4, 0.6)}), "f1")
    '0.500 (0.40–0.60)'
    """
    return with_interval(getattr(values, name), values.interval(name))


def with_interval(value: float | None, interval: Sequence[float | None] | None) -> str:
    """Format a metric with its interval.

    >>> with_interval(0.5, [0.4, 0.6])
    '0.500 (0.40–0.60)'
    """
    if value is None or not interval or None in interval:
        return number(value)
    return f"{value:.3f} ({interval[0]:.2f}–{interval[1]:.2f})"


def speed(summary: Summary, before: str = "") -> str:
    """Say how fast a worker trained, where that is told.

    >>> speed(Summary(tokens_per_second=19932.6), ", "), speed(Summary())
    (', 19,933 tokens/s in training', '')
    """
    found = summary.tokens_per_second
    return f"{before}{found:,.0f} tokens/s in training" if found else ""


def matrices(summary: Summary) -> str:
    """Name the matrices that a run trains and sends."""
    held = SCHEMES[summary.adapter.mode].held if summary.adapter else ("lora_B",)
    return " and ".join(part.removeprefix("lora_") for part in held)


def megabytes(count: float) -> str:
    """Format bytes.

    >>> megabytes(2_500_000)
    '2.50 MB'
    """
    return f"{count / 1e6:.2f} MB"
