"""The page of ``fedrx data describe``: four plots, as PNG files and one offline HTML page."""

import html
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from common.data.names import normalise_string
from common.data.partition import SPLITS, Hospital
from common.files import utf8, write_bytes
from sim.report.data_description import Description, TokenLengths

TOP_DRUGS = 15
MOST_LABELS = 12
_SPLIT_COLOURS = {"train": "#2b6cb0", "validation": "#90cdf4", "test": "#f6ad55"}
_BLUE, _ORANGE, _GREY = "#2b6cb0", "#dd6b20", "#4a5568"
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;"
    "color:#1a202c}svg{max-width:100%;height:auto}.note{background:#fffaf0;border-left:4px solid "
    "#dd6b20;padding:.5rem 1rem}table{border-collapse:collapse}td,th{padding:.2rem .8rem;"
    "text-align:right;border-bottom:1px solid #e2e8f0}"
    "td:first-child,th:first-child{text-align:left}"
)


def write_page(description: Description, folder: Path) -> Path:
    """Write the plots and the page.

    Args:
        description: From ``describe``.
        folder: Made when absent; each file is replaced as a whole, the page last.

    Returns:
        The page's path.
    """
    figures = {
        "hospital-sizes": ("Hospital sizes", sizes_figure(description.hospitals)),
        "top-drugs": ("Top drugs by hospital", drugs_figure(description.hospitals)),
        "list-lengths": ("List lengths", lists_figure(description.hospitals)),
    }
    if description.lengths is not None:
        figures["token-lengths"] = ("Token lengths", tokens_figure(description.lengths))
    folder.mkdir(parents=True, exist_ok=True)
    drawings = []
    for name, (title, figure) in figures.items():
        write_bytes(folder / f"{name}.png", _rendered(figure, "png"))
        svg = _rendered(figure, "svg").decode()
        drawings.append(f"<h2>{title}</h2>\n{svg[svg.index('<svg') :]}")
    page = folder / "index.html"
    write_bytes(page, utf8(_page(description, drawings)))
    return page


def sizes_figure(hospitals: Sequence[Hospital]) -> Figure:
    """Samples of each hospital, stacked by split, with its number of patients."""
    figure, axes = _axes(height=max(2.2, 0.34 * min(len(hospitals), 40) + 1.2))
    names = [one.name for one in hospitals]
    left = np.zeros(len(hospitals))
    for split in SPLITS:
        sizes = np.array([len(getattr(one, split)) for one in hospitals])
        axes.barh(names, sizes, left=left, label=split, color=_SPLIT_COLOURS[split])
        left += sizes
    if len(hospitals) <= 3 * MOST_LABELS:
        for place, one in enumerate(hospitals):
            axes.text(left[place], place, f"  {one.patients} patients", va="center", color=_GREY)
        axes.set_xlim(0, left.max() * 1.22)
    else:
        axes.set_yticks([])
        axes.set_ylabel(f"{len(hospitals)} hospitals")
    axes.invert_yaxis()
    axes.set_xlabel("samples (admissions)")
    _legend_above(axes)
    return figure


def drugs_figure(hospitals: Sequence[Hospital]) -> Figure:
    """Share of a hospital's samples with each of the most frequent drugs."""
    folded, spelling = _drug_counts(hospitals)
    total = sum(folded, Counter[str]())
    top = [name for name, _ in sorted(total.items(), key=lambda e: (-e[1], e[0]))[:TOP_DRUGS]]
    share_VK = np.array(
        [
            [
                100 * counts[name] / max(one.samples, 1)
                for counts, one in zip(folded, hospitals, strict=True)
            ]
            for name in top
        ]
    )
    figure, axes = _axes(height=6.2, width=min(11.0, 5.5 + 0.7 * len(hospitals)))
    image = axes.imshow(share_VK, aspect="auto", cmap="Blues", vmin=0, vmax=100)
    axes.set_yticks(range(len(top)), [_short(spelling[name]) for name in top])
    if len(hospitals) <= MOST_LABELS:
        axes.set_xticks(range(len(hospitals)), [one.name for one in hospitals], rotation=30)
        for row, column in np.ndindex(share_VK.shape):
            share = share_VK[row, column]
            colour = "white" if share > 55 else "#1a202c"
            axes.text(column, row, f"{share:.0f}", ha="center", va="center", color=colour)
    else:
        axes.set_xticks([])
        axes.set_xlabel(f"{len(hospitals)} hospitals, in the order of their names")
    figure.colorbar(image, ax=axes, label="% of the hospital's samples")
    return figure


def lists_figure(hospitals: Sequence[Hospital]) -> Figure:
    """How many drugs and diagnoses a sample has."""
    figure, axes = _axes()
    drugs = [len(sample.drugs) for one in hospitals for sample in one.admissions]
    diagnoses = [len(sample.diagnoses) for one in hospitals for sample in one.admissions]
    edges = _whole_number_bins(max(*drugs, *diagnoses))
    for values, label, colour in (
        (diagnoses, "diagnoses", _ORANGE),
        (drugs, "drugs", _BLUE),
    ):
        mean = float(np.mean(values))
        axes.hist(values, bins=edges, alpha=0.6, color=colour, label=f"{label} (mean {mean:.1f})")
        axes.axvline(mean, color=colour, linestyle="--")
    axes.set_xlabel("items per sample")
    axes.set_ylabel("samples")
    _legend_above(axes)
    return figure


def tokens_figure(lengths: TokenLengths) -> Figure:
    """Lengths in tokens of prompt, answer and both, against the limit."""
    figure, axes = _axes()
    total = [prompt + answer for prompt, answer in zip(lengths.prompt, lengths.answer, strict=True)]
    edges = _whole_number_bins(max(total))
    for values, label, colour in (
        (lengths.prompt, "prompt", _ORANGE),
        (lengths.answer, "answer", _BLUE),
    ):
        axes.hist(values, bins=edges, alpha=0.6, color=colour, label=label)
    axes.hist(total, bins=edges, histtype="step", color=_GREY, label="both")
    if lengths.max_length <= 1.5 * max(total):
        label = f"train.max-length {lengths.max_length:,}"
        axes.axvline(lengths.max_length, color="#c53030", linestyle="--", label=label)
    axes.set_xlabel("tokens per sample")
    axes.set_ylabel("samples")
    _legend_above(axes)
    return figure


def _drug_counts(hospitals: Sequence[Hospital]) -> tuple[list[Counter[str]], dict[str, str]]:
    folded: dict[str, str] = {}
    spellings: dict[str, Counter[str]] = {}
    counts = []
    for one in hospitals:
        raw = Counter(drug for sample in one.admissions for drug in sample.drugs)
        counter: Counter[str] = Counter()
        for drug, number in raw.items():
            name = folded.setdefault(drug, normalise_string(drug))
            counter[name] += number
            spellings.setdefault(name, Counter())[drug] += number
        counts.append(counter)
    return counts, {name: found.most_common(1)[0][0] for name, found in spellings.items()}


def _whole_number_bins(largest: int) -> list[float]:
    """At most 45 bins that hold equally many whole numbers each; others would show false peaks."""
    width = -(-(largest + 1) // 45)
    return [edge - 0.5 for edge in range(0, largest + width + 1, width)]


def _axes(*, width: float = 8.5, height: float = 3.8) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _legend_above(axes: Axes) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=4, frameon=False)


def _short(name: str, longest: int = 34) -> str:
    return name if len(name) <= longest else f"{name[: longest - 1]}\N{HORIZONTAL ELLIPSIS}"


def _rendered(figure: Figure, kind: str) -> bytes:
    stream = io.BytesIO()
    # No date and a fixed salt for ids: equal input gives an equal page.
    metadata = {"Date": None} if kind == "svg" else {}
    with rc_context({"svg.hashsalt": "fedrx"}):
        figure.savefig(stream, format=kind, dpi=130, metadata=metadata)
    return stream.getvalue()


def _page(description: Description, drawings: Sequence[str]) -> str:
    data = description.data
    partition = data["partition"]
    rows = "".join(_row(one) for one in partition["hospitals"])
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>FedRx data</title>
<style>{_STYLE}</style></head><body>
<h1>Data: {data["samples"]:,} samples of {data["patients"]:,} patients</h1>
<p class="note">Source: <b>{html.escape(data["source"])}</b>. Research only, not for clinical use.
Diagnoses are coded at discharge and drugs are the whole stay's orders: the task is to rebuild the
list, not to foresee it.</p>
<table><tr><th>hospital</th><th>patients</th><th>samples</th><th>train</th><th>validation</th>
<th>test</th></tr>{rows}</table>
<p>Partition by {html.escape(partition["scheme"])}. Skew of the drug distributions (mean pairwise
Jensen-Shannon divergence, bits): {partition["skew"]:.3f}; by chance {partition["null_skew"]:.3f}
(p {partition["p_value"]:.2f}).</p>
{"".join(drawings)}
</body></html>
"""


def _row(one: Mapping[str, object]) -> str:
    keys = ("name", "patients", "samples", "train", "validation", "test")
    return "<tr>" + "".join(f"<td>{html.escape(str(one[key]))}</td>" for key in keys) + "</tr>"
