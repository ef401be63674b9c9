"""The paper's table, and ours beside it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from common.config import Config
from common.configio import differences
from common.files import write_text
from common.rundir import RunDirectory
from sim.process.open_run import rank_folder
from sim.report.html import Block, to_html, to_markdown
from sim.report.words import MODEL_NAMES, NOTICE, number

BACKBONE = "Llama-3.1-8B-Instruct"
TRAIN_SAMPLES = 3900
TEST_SAMPLES = 20
STEPS = 4875


@dataclass(frozen=True, kw_only=True)
class PaperRow:
    """One row of the paper's table."""

    rank: int
    steps: int
    output_rate: float
    accuracy: float
    appropriateness: float


def _row(rank: int, steps: int, rate: float, accuracy: float, suitable: float) -> PaperRow:
    return PaperRow(
        rank=rank, steps=steps, output_rate=rate, accuracy=accuracy, appropriateness=suitable
    )


PAPER = (
    _row(16, 1950, 0.60, 0.130, 0.811),
    _row(16, 2925, 0.45, 0.229, 0.799),
    _row(16, 3900, 0.55, 0.197, 0.811),
    _row(16, 4875, 0.55, 0.157, 0.855),  # printed as 4870
    _row(32, 1950, 0.55, 0.207, 0.982),
    _row(32, 2925, 0.55, 0.185, 0.875),
    _row(32, 3900, 0.50, 0.174, 0.851),
    _row(32, 4875, 0.55, 0.216, 0.910),
)
HEADERS = (
    *("rank", "steps: paper / here", "output rate: paper / here"),
    *("accuracy: paper / over predicted, over true", "F1", "appropriate: paper / here"),
    *("validation loss", "norm of B"),
)
SHORT_HEADERS = ("rank", "steps", "output", "accuracy", "F1", "suitable", "loss", "norm of B")
"""On a terminal of 80 columns, where the paper's figures stand above this run's."""
OTHER_HEADERS = ("", "output rate", "accuracy: over predicted, over true", "F1")
NOTE = (
    "The paper's accuracy is the share of drugs that match; it does not say of which list, so both "
    "readings are shown. Its last step is printed as 4870 for rank 16. Appropriateness is a "
    "judge's: `fedrx judge` on a rank's run fills it in."
)


def paper_rows(rank: int) -> list[PaperRow]:
    """Return the paper's rows of a rank; none if it did not use it."""
    return [row for row in PAPER if row.rank == rank]


def scale_line(config: Config, summary: Mapping[str, Any], name: str) -> str:
    """Say in one line how far a run is from the paper's.

    Args:
        config: Of the run.
        summary: Its summary.json.
        name: Name of the scale.
    """
    scaling, answers = summary["scaling"], next(iter(summary["metrics"].values()))
    backbone = str(summary["backbone"]["name"])
    parts = [
        f"backbone {backbone}" + ("" if BACKBONE in backbone else f" (paper: {BACKBONE})"),
        _against("steps", scaling["steps"], STEPS),
        _against("training samples", scaling["train_samples"], TRAIN_SAMPLES),
        f"{scaling['epochs']:.3g} epochs" + ("" if scaling["epochs"] == 5 else " (paper: 5)"),
        _against("tokens at most", config.train.max_length, 2048),
        _against("test admissions", answers["samples"], TEST_SAMPLES),
        f"{config.train.optimizer} at {config.train.learning_rate:g}"
        + ("" if _papers_optimizer(config) else " (paper: sgd at 0.001)"),
        f"{summary['source']} data",
    ]
    return f"scale {name}: " + ", ".join(parts)


def build_table(
    run: RunDirectory, ranks: Sequence[int], paper: Config, name: str
) -> dict[str, Any]:
    """Collect what the runs of all ranks have found.

    Args:
        run: The paper run; each rank's own run lies inside.
        ranks: Ranks that were run.
        paper: The paper's own configuration.
        name: Name of the scale.

    Returns:
        Plain JSON: ``scale``, ``differences`` (configuration keys, paper -> here), ``rows``,
        ``others`` (untrained backbone and baselines), ``runs``.
    """
    rows: list[dict[str, Any]] = []
    others: dict[str, Any] = {}
    runs: list[dict[str, Any]] = []
    for rank in ranks:
        one = RunDirectory.open(run.path / rank_folder(rank))
        summary = one.read_json("summary.json")
        judged = summary.get("judge", {}).get("appropriateness", {})
        metrics = summary["metrics"]
        for theirs, ours in _pairs(paper_rows(rank), summary["checkpoints"]):
            model = model_of(summary, ours) if ours else ""
            rows.append(
                {
                    "rank": rank,
                    "paper": asdict(theirs) if theirs else None,
                    "here": _here(ours, metrics[model], judged.get(model)) if ours else None,
                }
            )
        trained = {model_of(summary, one) for one in summary["checkpoints"]}
        others |= {model: _metrics(m) for model, m in metrics.items() if model not in trained}
        runs.append(
            {
                "rank": rank,
                "folder": one.path.name,
                "scale": scale_line(one.config(), summary, name),
                "trainable_parameters": summary["trainable_parameters"],
                "b_sha256": summary["b_sha256"],
                "validation_loss": summary["validation_loss"],
                "seconds": summary["seconds"],
            }
        )
    return {
        "scale": runs[0]["scale"],
        "differences": [str(change) for change in differences(paper, run.config())],
        "rows": rows,
        "others": others,
        "runs": runs,
    }


def _pairs(
    theirs: Sequence[PaperRow], ours: Sequence[Mapping[str, Any]]
) -> list[tuple[PaperRow | None, Mapping[str, Any] | None]]:
    """Put each row of the paper beside the checkpoint at the same share of the run."""
    total = ours[-1]["step"]
    by_step = {one["step"]: one for one in ours}
    places = [max(1, round(row.steps * total / STEPS)) for row in theirs]
    pairs: list[tuple[int, PaperRow | None, Mapping[str, Any] | None]] = [
        (place, row, by_step.get(place)) for place, row in zip(places, theirs, strict=True)
    ]
    pairs += [(step, None, one) for step, one in by_step.items() if step not in places]
    return [(row, one) for _, row, one in sorted(pairs, key=lambda pair: pair[0])]


def model_of(summary: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> str:
    """Return a checkpoint's name among the metrics: the last one is the run's result."""
    last = summary["checkpoints"][-1]["name"]
    name = str(checkpoint["name"])
    return "fedrx" if name == last else name


def table_blocks(table: Mapping[str, Any]) -> list[Block]:
    """Return the table, what stands beside it and what was scaled, for page and markdown."""
    scale = table["scale"]
    runs = tuple(
        (str(one["rank"]), f"{one['trainable_parameters']:,}", f"{one['seconds']:.0f} s")
        for one in table["runs"]
    )
    return [
        Block(note=NOTICE, warning=True),
        Block(
            title="The paper's table, and this run",
            note=f"{scale}. {NOTE}",
            headers=HEADERS,
            rows=tuple(_cells(row) for row in table["rows"]),
        ),
        Block(title="Beside it", note=scale, headers=OTHER_HEADERS, rows=_other_cells(table)),
        Block(
            title="Runs", note=scale, headers=("rank", "trainable parameters", "time"), rows=runs
        ),
        Block(
            title="Settings that differ from configs/paper.toml",
            note=scale,
            headers=("key: paper -> here",),
            rows=tuple((line,) for line in table["differences"]),
            text_cells=True,
        ),
    ]


def rank_runs(run: RunDirectory) -> list[RunDirectory]:
    """Return the runs inside a paper run; of any other run, itself."""
    ranks = run.read_json("environment.json").get("ranks", [])
    return [RunDirectory.open(run.path / rank_folder(rank)) for rank in ranks] or [run]


def write_table(run: RunDirectory, table: Mapping[str, Any]) -> None:
    """Write summary.json, report.md and report.html of a paper run."""
    blocks = table_blocks(table)
    run.write_json("summary.json", dict(table))
    write_text(run.path / "report.md", to_markdown("FedRx: the paper's run", blocks))
    write_text(run.path / "report.html", to_html("FedRx: the paper's run", blocks))


def show_table(console: Console, table: Mapping[str, Any]) -> None:
    """Print the table on the terminal."""
    titles = (
        f"The paper's above, this run's below (accuracy over predicted, true); {table['scale']}",
        f"Beside it; {table['scale']}",
    )
    rows = tuple(_cells(row) for row in table["rows"]), _other_cells(table)
    for title, headers, cells in zip(titles, (SHORT_HEADERS, OTHER_HEADERS), rows, strict=True):
        shown = Table(title=title, caption=NOTICE, box=SIMPLE, show_lines=True)
        for header in headers:
            shown.add_column(header, justify="right")
        for row in cells:
            shown.add_row(*(cell.replace(" / ", "\n") for cell in row))
        console.print(shown)


def percent(value: float | None) -> str:
    """Format a share as the paper does.

    >>> percent(0.229), percent(None)
    ('22.9%', '–')
    """
    return "–" if value is None else f"{100 * value:.1f}%"


def _here(
    checkpoint: Mapping[str, Any], metrics: Mapping[str, Any], judged: Mapping[str, Any] | None
) -> dict[str, Any]:
    return {
        "checkpoint": checkpoint["name"],
        "steps": checkpoint["step"],
        **_metrics(metrics),
        "appropriateness": judged["mean"] if judged else None,
        "validation_loss": checkpoint["validation_loss"],
        "b_norm": checkpoint["b_norm"],
    }


def _metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    names = ("output_rate", "accuracy_over_predicted", "accuracy_over_true", "f1", "jaccard")
    return {name: metrics[name] for name in names}


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    theirs, ours = row["paper"] or {}, row["here"] or {}
    return (
        str(row["rank"]),
        f"{theirs.get('steps', '–')} / {ours.get('steps', '–')}",
        f"{percent(theirs.get('output_rate'))} / {percent(ours.get('output_rate'))}",
        f"{percent(theirs.get('accuracy'))} / {_both_readings(ours)}",
        number(ours.get("f1")),
        f"{percent(theirs.get('appropriateness'))} / {percent(ours.get('appropriateness'))}",
        number(ours.get("validation_loss")),
        f"{ours['b_norm']:.3g}" if ours else "–",
    )


def _other_cells(table: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
    return tuple(
        (
            MODEL_NAMES.get(model, model),
            percent(values["output_rate"]),
            _both_readings(values),
            number(values["f1"]),
        )
        for model, values in table["others"].items()
    )


def _both_readings(values: Mapping[str, Any]) -> str:
    readings = ("accuracy_over_predicted", "accuracy_over_true")
    return ", ".join(percent(values.get(name)) for name in readings)


def _against(what: str, here: int, paper: int) -> str:
    return f"{here:,} {what}" + ("" if here == paper else f" (paper: {paper:,})")


def _papers_optimizer(config: Config) -> bool:
    return config.train.optimizer == "sgd" and config.train.learning_rate == 1e-3
