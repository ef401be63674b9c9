"""``fedrx sweep``: several arms over several seeds, as one table with intervals.

An arm is a way to train: what is adapted, how hospitals are aggregated, or not federated at all.
Each arm and seed is an ordinary run below the sweep's folder; a finished one is not run again, so
an interrupted sweep goes on where it stopped.
"""

import itertools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from common.config import Config
from common.configio import Scalar, flatten, from_flat, parse_overrides
from common.errors import UserError
from common.evaluation.metrics import CONFIDENCE
from common.evaluation.transfer import half_width
from common.files import write_text
from common.model.adapter.layout import adapter_spec
from common.privacy.settings import plan_of, protects
from common.records import Record
from common.records.checks import ArmRow, Interval, SweepRecord
from common.records.summary import Figures, Summary
from common.rundir import RunDirectory
from common.wire.cohort import asked, hospital_names
from server.strategies import STRATEGIES, check_strategy
from sim.process.progress import SILENT, Console
from sim.report.comparison import write_sweep_page
from sim.report.html import Bar, Block, markdown_table
from sim.report.terminal import block_parts
from sim.report.words import personal_note, stands_for
from sim.runs.cells import Cell, Cells, Jobs
from sim.runs.lifecycle import Run, start_or_go_on

CENTRALISED, LOCAL_ONLY = "centralised", "local-only"
ARMS: dict[str, dict[str, Scalar]] = {
    "fa-lora": {},
    "lora": {"adapter.mode": "lora"},
    "rolora": {"adapter.mode": "rolora"},
    **{name: {"federation.strategy": name} for name in STRATEGIES if name != "fedavg"},
    "bf16": {"federation.codec": "bf16"},
    "int8": {"federation.codec": "int8"},
    "reset-state": {"train.keep-state": False},
    "uniform": {"federation.weighting": "uniform"},
    "personal": {"adapter.personal": True},
    CENTRALISED: {},
    LOCAL_ONLY: {},
}
SEEDED = ("train.seed", "adapter.seed", "partition.seed", "federation.seed")
PAGE = "sweep.html"
INTERVALS = f"Mean ± {CONFIDENCE:.0%} interval over seeds (Student's t)."
FIGURES: dict[str, Callable[[Summary], float | None]] = {
    "F1": lambda summary: _answers(summary).f1,
    "Jaccard": lambda summary: _answers(summary).jaccard,
    "validation loss": lambda summary: next(reversed(summary.validation_loss), None),
    "MB up": lambda summary: summary.wire.bytes_up / 1e6 if summary.wire else None,
    "worst hospital's F1": lambda summary: _worst_f1(_answers(summary)),
}


def plan_cells(
    config: Config, *, arms: Sequence[str], seeds: Sequence[int], vary: Sequence[str] = ()
) -> list[Cell]:
    """List the runs of a sweep.

    Args:
        config: What every run shares.
        arms: Names from ``ARMS``.
        seeds: Each sets the seeds of data order, A, partition and hospital sampling.
        vary: ``key=value,value`` for a grid beside the arms.

    Raises:
        UserError: for an unknown arm, a key or value that is not allowed, a robust strategy
            that withstands nothing with so many hospitals, or an arm that privacy does not allow.
    """
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown:
        raise UserError(f"--arm {unknown[0]}", allowed=" | ".join(ARMS), fix="name one of these")
    grid = [
        [f"{key.strip()}={value}" for value in values.split(",")]
        for key, _, values in (text.partition("=") for text in vary)
    ]
    cells = []
    for arm, point, seed in itertools.product(arms, itertools.product(*grid), seeds):
        values = {**flatten(config), **dict.fromkeys(SEEDED, seed), **ARMS[arm]}
        values |= parse_overrides(point)
        name = " ".join([arm, *point])
        _check_arm(arm, from_flat(values))
        if arm == CENTRALISED:
            values |= pooled_budget(from_flat(values))
        parts = [""]
        if arm == LOCAL_ONLY:
            parts = hospital_names(from_flat(values).federation.hospitals)
        cells += [
            Cell(
                arm=name,
                seed=seed,
                part=part,
                config=from_flat({**values, "federation.only": part}),
                federated=arm != CENTRALISED,
            )
            for part in parts
        ]
    return cells


def default_arms(config: Config) -> tuple[list[str], list[str]]:
    """Return the arms that make sense with a configuration, and why the others do not."""
    arms, reasons = [], []
    for arm, values in ARMS.items():
        try:
            _check_arm(arm, from_flat(values, base=config))
            arms.append(arm)
        except UserError as error:
            reasons.append(f"without the arm {arm}: {error}")
    return arms, reasons


def pooled_budget(config: Config) -> dict[str, float]:
    """Return the keys that let one node see as many samples as the federation's hospitals.

    ``train.steps``, else ``train.epochs``, else rounds times local steps is each hospital's
    (``common.training.budget``); the node takes those of all that a round asks.

    >>> pooled_budget(from_flat({"train.steps": 100}))
    {'train.steps': 300}
    >>> pooled_budget(from_flat({"train.epochs": 2.0}))
    {'train.epochs': 2.0}
    >>> pooled_budget(Config())
    {'train.steps': 120}
    """
    train, federation = config.train, config.federation
    together = asked(federation)
    if train.epochs and not train.steps:
        return {"train.epochs": train.epochs * together / federation.hospitals}
    steps = train.steps or federation.rounds * federation.local_steps
    return {"train.steps": together * steps}


def sweep(
    cells: Sequence[Cell],
    folder: Path,
    *,
    console: Console = SILENT,
    command_line: Sequence[str],
    jobs: Jobs | None = None,
) -> Record:
    """Run what is not finished yet, and put everything into one table.

    Args:
        cells: From ``plan_cells``.
        folder: The sweep's folder; sweep.json, sweep.md and sweep.html are written to it.
        console: Where progress and the table are shown.
        command_line: Stored in each run's environment.json.
        jobs: See ``sim.runs.slurm.jobs_on``.

    Raises:
        UserError: if another process is at work on it, or a run in it is not the cell's.
    """
    kind = Sweep(cells, jobs=jobs)
    return start_or_go_on(kind, folder, console=console, command_line=command_line).result


class Sweep(Cells):
    """Arms over seeds, and one table."""

    mode = "sweep"
    file = "sweep.json"

    def train(self, run: Run) -> SweepRecord:
        """Do what is left of every cell, and put all into the table."""
        self.finish(run)
        arms: dict[str, dict[int, list[Summary]]] = {}
        for cell in self.cells:
            summary = self.runs[cell.folder].summary()
            arms.setdefault(cell.arm, {}).setdefault(cell.seed, []).append(summary)
        rows = (
            {"arm": arm, "runs": len(seeds), **tabulate([seeds[seed] for seed in sorted(seeds)])}
            for arm, seeds in arms.items()
        )
        return SweepRecord(confidence=CONFIDENCE, rows=tuple(map(ArmRow.model_validate, rows)))

    def report(self, run: Run, result: SweepRecord) -> None:
        """Write the table as markdown, and as a page with all that compares the arms."""
        text = "\n\n".join([markdown(result.rows).rstrip(), *self._notes()])
        write_text(run.directory.path / "sweep.md", f"{text}\n")
        runs: dict[str, list[RunDirectory]] = {}
        for cell in self.cells:
            runs.setdefault(cell.arm, []).append(self.runs[cell.folder])
        write_sweep_page(runs, arms_block(result.rows), run.directory.path / PAGE)

    def show(self, run: Run, result: SweepRecord) -> None:
        """Show the table."""
        page = run.directory.path / PAGE
        run.console.say(*block_parts(arms_block(result.rows)), *self._notes(), f"page: {page}")

    def _notes(self) -> list[str]:
        note = personal_note(self.runs[cell.folder].summary() for cell in self.cells)
        return [note] if note else []


def arms_block(rows: Sequence[ArmRow]) -> Block:
    """Return the arms' figures as the page shows them: F1 drawn, and the table."""
    bars = []
    for row in rows:
        f1, half = row.figures["F1"].mean, row.figures["F1"].half_width
        ends = None if f1 is None or half is None else (max(0.0, f1 - half), min(1.0, f1 + half))
        bars.append(
            Bar(name=row.arm, value=f1, text=f"F1 {_text(row.figures['F1'])}", interval=ends)
        )
    return Block(
        title="Arms",
        note=INTERVALS,
        bars=tuple(bars),
        headers=("arm", "seeds", *FIGURES),
        rows=tuple(tuple(_cells(row)) for row in rows),
    )


def tabulate(seeds: Sequence[Sequence[Summary]]) -> dict[str, Interval]:
    """Return mean and half-width of the confidence interval of each figure over seeds.

    Args:
        seeds: For each seed its runs' summaries (several for local-only: they are averaged first).

    Returns:
        By figure; Student's t, without a half-width for one seed. A figure that a run does not
        have (privacy lets no validation loss out) has neither.
    """
    return {
        name: _interval([[figure(summary) for summary in runs] for runs in seeds])
        for name, figure in FIGURES.items()
    }


def _check_arm(arm: str, config: Config) -> None:
    adapter_spec(config.adapter)
    if arm not in (CENTRALISED, LOCAL_ONLY):
        check_strategy(config.federation)
        if protects(config):
            plan_of(config)  # refuses what the protection takes away


def _answers(summary: Summary) -> Figures:
    """Return the figures of a run's answers: those of personal adapters where it trained them."""
    return summary.metrics[stands_for(summary)]


def _worst_f1(figures: Figures) -> float | None:
    known = [one.f1 for one in figures.by_hospital.values() if one.f1 is not None]
    return min(known, default=None)


def _interval(seeds: Sequence[Sequence[float | None]]) -> Interval:
    known = [[value for value in runs if value is not None] for runs in seeds]
    if [len(runs) for runs in known] != [len(runs) for runs in seeds]:
        return Interval(None, None)
    values = [statistics.fmean(runs) for runs in known]
    return Interval(statistics.fmean(values), half_width(values))


def markdown(rows: Sequence[ArmRow]) -> str:
    """Render the table as markdown."""
    table = markdown_table(("arm", "seeds", *FIGURES), [_cells(row) for row in rows])
    return f"{table}\n\n{INTERVALS}\n"


def _cells(row: ArmRow) -> list[str]:
    return [row.arm, str(row.runs), *map(_text, row.figures.values())]


def _text(figure: Interval) -> str:
    text = "–" if figure.mean is None else f"{figure.mean:.4g}"
    return text if figure.half_width is None else f"{text} ± {figure.half_width:.2g}"
