"""The paper's table, and ours beside it."""

from collections.abc import Iterator, Sequence

from common.config import Config
from common.configio import differences
from common.records.paper import Here, PaperRow, PaperTable, RankRun, Row
from common.records.run import RunRecord
from common.records.summary import CheckpointFacts, Readings, Summary
from common.rundir import RunDirectory
from sim.process.open_run import rank_folder
from sim.report import terminal
from sim.report.html import Block, write_page
from sim.report.words import MODEL_NAMES, NOTICE, number

BACKBONE = "Llama-3.1-8B-Instruct"
TRAIN_SAMPLES = 3900
TEST_SAMPLES = 20
STEPS = 4875


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
BEST_HEADERS = (
    *("lists", "steps", "output rate", "accuracy: over predicted, over true", "F1", "PRAUC"),
)
OTHER_HEADERS = ("", "output rate", "accuracy: over predicted, over true", "F1")
BEST_TITLE = "The best settings found here, at the same steps"
BEST_NOTE = (
    "All seven projections at rank 16, AdamW at 0.01, lists learnt as sets. Scored: every drug of "
    "the formulary ranked. Formulary: written, each name of it at most once."
)
LAST = "fedrx"
"""Name of a run's last checkpoint among its metrics."""
READINGS = set(Readings.model_fields)
NOTE = (
    "The paper's accuracy is the share of drugs that match; it does not say of which list, so both "
    "readings are shown. Its last step is printed as 4870 for rank 16. Appropriateness is a "
    "judge's: `fedrx judge` on a rank's run fills it in."
)


def paper_rows(rank: int) -> list[PaperRow]:
    """Return the paper's rows of a rank; none if it did not use it."""
    return [row for row in PAPER if row.rank == rank]


def scale_line(config: Config, summary: Summary, name: str) -> str:
    """Say in one line how far a run is from the paper's.

    Args:
        config: Of the run.
        summary: Its summary.json.
        name: Name of the scale.
    """
    scaling, answers = summary.scaling, next(iter(summary.metrics.values()))
    assert scaling is not None
    assert summary.backbone is not None
    backbone = summary.backbone.name
    parts = [
        f"backbone {backbone}" + ("" if BACKBONE in backbone else f" (paper: {BACKBONE})"),
        _against("steps", scaling.steps, STEPS),
    ]
    if scaling.train_samples is not None:
        parts.append(_against("training samples", scaling.train_samples, TRAIN_SAMPLES))
    if scaling.epochs is not None:
        parts.append(
            f"{scaling.epochs:.3g} epochs" + ("" if scaling.epochs == 5 else " (paper: 5)")
        )
    parts += [
        _against("tokens at most", config.train.max_length, 2048),
        _against("test admissions", answers.samples, TEST_SAMPLES),
        f"{config.train.optimizer} at {config.train.learning_rate:g}"
        + ("" if _papers_optimizer(config) else " (paper: sgd at 0.001)"),
        f"{summary.source} data",
    ]
    return f"scale {name}: " + ", ".join(parts)


def build_table(run: RunDirectory, record: RunRecord, paper: Config) -> PaperTable:
    """Collect what the runs of all ranks have found.

    Args:
        run: The paper run; each rank's own run lies inside.
        record: Its run.json.
        paper: The paper's own configuration.
    """
    rows: list[Row] = []
    others: dict[str, Readings] = {}
    runs: list[RankRun] = []
    for rank in record.ranks:
        one = RunDirectory.open(run.path / rank_folder(rank))
        summary = one.summary()
        for theirs, ours in _pairs(paper_rows(rank), summary.checkpoints):
            here = _here(ours, summary) if ours else None
            rows.append(Row(rank=rank, paper=theirs, here=here))
        trained = {model_of(summary, one) for one in summary.checkpoints}
        others |= {
            model: Readings(**figures.model_dump(include=READINGS))
            for model, figures in summary.metrics.items()
            if model not in trained
        }
        runs.append(
            RankRun(
                rank=rank,
                folder=one.path.name,
                scale=scale_line(one.config(), summary, record.scale),
                trainable_parameters=summary.trainable_parameters,
                b_sha256=summary.b_sha256,
                validation_loss=summary.validation_loss,
                seconds=summary.seconds,
            )
        )
    changes = tuple(str(change) for change in differences(paper, run.config()))
    return PaperTable(
        scale=runs[0].scale, differences=changes, rows=tuple(rows), others=others, runs=tuple(runs)
    )


def _pairs(
    theirs: Sequence[PaperRow], ours: Sequence[CheckpointFacts]
) -> list[tuple[PaperRow | None, CheckpointFacts | None]]:
    """Put each row of the paper beside the checkpoint at the same share of the run."""
    total = ours[-1].step
    by_step = {one.step: one for one in ours}
    places = [max(1, round(row.steps * total / STEPS)) for row in theirs]
    pairs: list[tuple[int, PaperRow | None, CheckpointFacts | None]] = [
        (place, row, by_step.get(place)) for place, row in zip(places, theirs, strict=True)
    ]
    pairs += [(step, None, one) for step, one in by_step.items() if step not in places]
    return [(row, one) for _, row, one in sorted(pairs, key=lambda pair: pair[0])]


def model_of(summary: Summary, checkpoint: CheckpointFacts) -> str:
    """Return a checkpoint's name among the metrics: the last one is the run's result."""
    return LAST if checkpoint == summary.checkpoints[-1] else checkpoint.name


def table_blocks(table: PaperTable) -> list[Block]:
    """Return the table, what stands beside it and what was scaled, for page and markdown."""
    scale = table.scale
    runs = tuple(
        (str(one.rank), f"{one.trainable_parameters:,}", f"{one.seconds:.0f} s")
        for one in table.runs
    )
    return [
        Block(note=NOTICE, warning=True),
        Block(
            title="The paper's table, and this run",
            note=f"{scale}. {NOTE}",
            headers=HEADERS,
            rows=tuple(_cells(row) for row in table.rows),
        ),
        *(
            Block(
                title=BEST_TITLE,
                note=f"{scale}, but for its own settings. {BEST_NOTE}",
                headers=BEST_HEADERS,
                rows=_best_cells(table),
            )
            for _ in table.best[:1]
        ),
        Block(title="Beside it", note=scale, headers=OTHER_HEADERS, rows=_other_cells(table)),
        Block(
            title="Runs", note=scale, headers=("rank", "trainable parameters", "time"), rows=runs
        ),
        Block(
            title="Settings that differ from configs/paper.toml",
            note=scale,
            headers=("key: paper -> here",),
            rows=tuple((line,) for line in table.differences),
            text_cells=True,
        ),
    ]


def rank_runs(run: RunDirectory) -> list[RunDirectory]:
    """Return the runs inside a paper run; of any other run, itself."""
    record = run.record()
    ranks = record.ranks if record else ()
    return [RunDirectory.open(run.path / rank_folder(rank)) for rank in ranks] or [run]


def write_table(run: RunDirectory, table: PaperTable) -> None:
    """Write report.md and report.html of a paper run."""
    write_page(run.path / "report.html", "FedRx: the paper's run", table_blocks(table))


def table_parts(table: PaperTable) -> Iterator[object]:
    """Return the tables as the terminal shows them."""
    shown_tables = [
        (
            f"The paper's above, this run's below (accuracy over predicted, true); {table.scale}",
            SHORT_HEADERS,
            tuple(_cells(row) for row in table.rows),
        ),
        (f"Beside it; {table.scale}", OTHER_HEADERS, _other_cells(table)),
    ]
    if table.best:
        best = f"{BEST_TITLE}; else {table.scale}"
        shown_tables.insert(1, (best, BEST_HEADERS, _best_cells(table)))
    for title, headers, cells in shown_tables:
        rows = ([cell.replace(" / ", "\n") for cell in row] for row in cells)
        yield terminal.table(headers, rows, words=0, title=title, caption=NOTICE, **terminal.LINED)


def percent(value: float | None) -> str:
    """Format a share as the paper does.

    >>> percent(0.229), percent(None)
    ('22.9%', '–')
    """
    return "–" if value is None else f"{100 * value:.1f}%"


def _here(checkpoint: CheckpointFacts, summary: Summary) -> Here:
    model = model_of(summary, checkpoint)
    judged = summary.judge.appropriateness.get(model) if summary.judge else None
    return Here(
        checkpoint=checkpoint.name,
        steps=checkpoint.step,
        **summary.metrics[model].model_dump(include=READINGS),
        appropriateness=judged.mean if judged else None,
        validation_loss=checkpoint.validation_loss,
        b_norm=checkpoint.b_norm,
    )


def _cells(row: Row) -> tuple[str, ...]:
    paper, here, absent = row.paper, row.here, (None,) * 3
    rate, accuracy, suitable = (
        (paper.output_rate, paper.accuracy, paper.appropriateness) if paper else absent
    )
    readings, f1, loss = (_both_readings(here), here.f1, here.validation_loss) if here else absent
    ours, judged = (here.output_rate, here.appropriateness) if here else absent[:2]
    return (
        str(row.rank),
        f"{paper.steps if paper else '–'} / {here.steps if here else '–'}",
        f"{percent(rate)} / {percent(ours)}",
        f"{percent(accuracy)} / {readings or '–, –'}",
        number(f1),
        f"{percent(suitable)} / {percent(judged)}",
        number(loss),
        f"{here.b_norm:.3g}" if here else "–",
    )


def _other_cells(table: PaperTable) -> tuple[tuple[str, ...], ...]:
    return tuple(
        (
            MODEL_NAMES.get(model, model),
            percent(values.output_rate),
            _both_readings(values),
            number(values.f1),
        )
        for model, values in table.others.items()
    )


def _best_cells(table: PaperTable) -> tuple[tuple[str, ...], ...]:
    return tuple(
        (
            one.lists,
            str(one.steps),
            percent(one.output_rate),
            _both_readings(one),
            number(one.f1),
            number(one.prauc),
        )
        for one in table.best
    )


def _both_readings(values: Readings) -> str:
    return f"{percent(values.accuracy_over_predicted)}, {percent(values.accuracy_over_true)}"


def _against(what: str, here: int, paper: int) -> str:
    return f"{here:,} {what}" + ("" if here == paper else f" (paper: {paper:,})")


def _papers_optimizer(config: Config) -> bool:
    return config.train.optimizer == "sgd" and config.train.learning_rate == 1e-3
