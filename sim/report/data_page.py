"""The page of ``fedrx data describe``: four plots, as PNG files and one offline HTML page."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.data.names import normalise_string
from common.data.partition import SPLITS, Hospital
from common.files import write_bytes, write_text
from sim.report.data_description import Description, TokenLengths, description_blocks
from sim.report.html import Block, to_html
from sim.report.plots import framed, inline_svg, rendered

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TOP_DRUGS = 15
MOST_LABELS = 12
_SPLIT_COLOURS = {"train": "#2b6cb0", "validation": "#90cdf4", "test": "#f6ad55"}
_BLUE, _ORANGE, _GREY = "#2b6cb0", "#dd6b20", "#4a5568"
_NOTICE = (
    "Source: {source}. Research only, not for clinical use. Diagnoses are coded at discharge and "
    "drugs are the whole stay's orders: the task is to rebuild the list, not to foresee it."
)


def write_page(description: Description, folder: Path) -> Path:
    """Write the plots and the page.

    Args:
        description: From ``describe``.
        folder: Made when absent; each file is replaced as a whole, the page last.

    Returns:
        The page's path.
    """
    hospitals, lengths = description.hospitals, description.lengths
    titled = {
        "Hospital sizes and top drugs": {
            "hospital-sizes": sizes_figure(hospitals),
            "top-drugs": drugs_figure(hospitals),
        },
        "Lengths of lists and of prompts": {
            "list-lengths": lists_figure(hospitals),
            **({"token-lengths": tokens_figure(lengths)} if lengths is not None else {}),
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    blocks = [
        Block(note=_NOTICE.format(source=description.counts.source), warning=True),
        *description_blocks(description),
    ]
    for title, figures in titled.items():
        for name, figure in figures.items():
            write_bytes(folder / f"{name}.png", rendered(figure, "png"))
        blocks.append(Block(title=title, svgs=tuple(map(inline_svg, figures.values()))))
    counts = description.counts
    page, title = folder / "index.html", f"{counts.samples:,} samples of {counts.patients:,}"
    write_text(page, to_html(f"Data: {title} patients", blocks))
    return page


def sizes_figure(hospitals: Sequence[Hospital]) -> "Figure":
    """Samples of each hospital, stacked by split, with its number of patients."""
    height = max(2.2, 0.34 * min(len(hospitals), 40) + 1.2)
    figure, axes = framed("samples (admissions)", "", height=height)
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
    _legend_above(axes)
    return figure


def drugs_figure(hospitals: Sequence[Hospital]) -> "Figure":
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
    figure, axes = framed("", "", height=6.2, width=min(11.0, 5.5 + 0.7 * len(hospitals)))
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


def lists_figure(hospitals: Sequence[Hospital]) -> "Figure":
    """How many drugs and diagnoses a sample has."""
    figure, axes = framed("items per sample", "samples")
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
    _legend_above(axes)
    return figure


def tokens_figure(lengths: TokenLengths) -> "Figure":
    """Lengths in tokens of prompt, answer and both, against the limit."""
    figure, axes = framed("tokens per sample", "samples")
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


def _legend_above(axes: "Axes") -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=4, frameon=False)


def _short(name: str, longest: int = 34) -> str:
    return name if len(name) <= longest else f"{name[: longest - 1]}\N{HORIZONTAL ELLIPSIS}"
