"""``fedrx sweep``: several arms over several seeds, as one table with intervals.

An arm is a way to train: what is adapted, how hospitals are aggregated, or not federated at all.
Each arm and seed is an ordinary run below the sweep's folder; a finished one is not run again, so
an interrupted sweep goes on where it stopped.
"""

import itertools
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import client.app
from common.config import IN_PROCESS, Config
from common.configio import Scalar, differences, flatten, from_flat, parse_overrides
from common.errors import UserError
from common.evaluation.metrics import CONFIDENCE
from common.evaluation.transfer import half_width
from common.files import write_text
from common.model.adapter.layout import adapter_spec
from common.privacy.settings import plan_of, protects
from common.provenance import shown_command
from common.records.run import RunRecord
from common.records.summary import Figures, Summary
from common.rundir import RUN, RunDirectory, remove_unbegun
from common.wire.cohort import asked, hospital_names
from server.strategies import STRATEGIES, check_strategy
from sim.process.failures import StageFailed
from sim.process.lock import exclusive
from sim.process.progress import SILENT, Console
from sim.report.comparison import write_sweep_page
from sim.report.html import Bar, Block, markdown_table
from sim.report.terminal import block_parts
from sim.runs.federate import federate, resolved
from sim.runs.resume import resume
from sim.runs.single import one_node, single

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
RESULTLESS = ("federation.workers",)
"""Keys that cannot change a run's result."""
INTERVALS = f"Mean ± {CONFIDENCE:.0%} interval over seeds (Student's t)."
FIGURES: dict[str, Callable[[Summary], float | None]] = {
    "F1": lambda summary: _answers(summary).f1,
    "Jaccard": lambda summary: _answers(summary).jaccard,
    "validation loss": lambda summary: next(reversed(summary.validation_loss), None),
    "MB up": lambda summary: summary.wire.bytes_up / 1e6 if summary.wire else None,
    "worst hospital's F1": lambda summary: _worst_f1(_answers(summary)),
}


@dataclass(frozen=True)
class Interval:
    """Mean of a figure over seeds, and half the width of its confidence interval, where known."""

    mean: float | None
    half_width: float | None


@dataclass(frozen=True)
class ArmRow:
    """One row of the table."""

    arm: str
    runs: int
    figures: Mapping[str, Interval]

    def as_json(self) -> dict[str, object]:
        """Return the row as sweep.json holds it."""
        figures = {name: asdict(one) for name, one in self.figures.items()}
        return {"arm": self.arm, "runs": self.runs, **figures}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a sweep."""

    arm: str
    """Name of the arm, with the values that are varied beside it."""
    seed: int
    part: str
    """The hospital of a local-only run; else empty."""
    config: Config
    federated: bool

    @property
    def folder(self) -> str:
        """Name of the run's folder below the sweep's."""
        parts = (self.arm, f"seed-{self.seed}", self.part)
        return "-".join(part for part in parts if part).replace("=", "-").replace(" ", "-")


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
) -> dict[str, object]:
    """Run what is not finished yet, and put everything into one table.

    Args:
        cells: From ``plan_cells``.
        folder: The sweep's folder; sweep.json, sweep.md and sweep.html are written to it.
        console: Where progress and the table are shown.
        command_line: Stored in each run's environment.json.

    Returns:
        The content of sweep.json.

    Raises:
        UserError: if another process is at work on it, or a run in it is not the cell's.
    """
    again = shlex.join(shown_command(command_line)) or "the same `fedrx sweep`"
    done = run_all(cells, folder, console=console, command_line=command_line, again=again)
    directory, arms = RunDirectory(folder), dict[str, dict[int, list[Summary]]]()
    for cell in cells:
        summary = done[cell.folder].summary()
        arms.setdefault(cell.arm, {}).setdefault(cell.seed, []).append(summary)
    rows = [
        ArmRow(arm, len(seeds), tabulate([seeds[seed] for seed in sorted(seeds)]))
        for arm, seeds in arms.items()
    ]
    result = {"confidence": CONFIDENCE, "rows": [row.as_json() for row in rows]}
    directory.write_json("sweep.json", result)
    write_text(folder / "sweep.md", markdown(rows))
    runs: dict[str, list[RunDirectory]] = {}
    for cell in cells:
        runs.setdefault(cell.arm, []).append(done[cell.folder])
    arms_table = arms_block(rows)
    page = write_sweep_page(runs, arms_table, folder / "sweep.html")
    console.say(*block_parts(arms_table), f"page: {page}")
    return result


def run_all(
    cells: Sequence[Cell],
    folder: Path,
    *,
    console: Console = SILENT,
    command_line: Sequence[str],
    again: str,
    trained: Mapping[str, RunDirectory] = MappingProxyType({}),
) -> dict[str, RunDirectory]:
    """Run the cells that are not finished yet, holding their folder alone.

    Args:
        cells: All of them.
        folder: Where they are.
        console: Where progress is shown.
        command_line: Stored in each run's environment.json.
        again: The command that goes on after an interruption.
        trained: Finished runs elsewhere that stand for cells, by the cells' folders.

    Returns:
        The runs by the cells' folders.

    Raises:
        UserError: if another process is at work on the folder, or a run is not its cell's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    directory, found = RunDirectory(folder), dict[str, RunDirectory]()
    client.app.worker().forget_data()  # of an earlier call: files may have changed since
    with exclusive(directory):
        names = tuple(cell.folder for cell in cells)
        directory.write_json(RUN, RunRecord(mode="sweep", resumable=False, cells=names))
        for number, cell in enumerate(cells, 1):
            label = f"{number}/{len(cells)}: {cell.arm}, seed {cell.seed} {cell.part}"
            console.say(label, style="bold")
            elsewhere = trained.get(cell.folder)
            place = elsewhere.path if elsewhere else folder / cell.folder
            try:
                run_cell(cell, place, console, command_line)
            except StageFailed as error:
                raise StageFailed(error.what, command=again) from error
            except KeyboardInterrupt:
                console.say(f"go on with: {again}")
                raise
            found[cell.folder] = RunDirectory(place)
    return found


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
    return summary.metrics.get("personal") or summary.metrics["fedrx"]


def _worst_f1(figures: Figures) -> float | None:
    each = (figures.model_extra or {}).get("by_hospital") or {}
    known = [one["f1"] for one in each.values() if one["f1"] is not None]
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


def run_cell(cell: Cell, folder: Path, console: Console, command_line: Sequence[str]) -> Summary:
    """Run a cell in its folder, or go on with it; a finished one is not run again.

    Raises:
        UserError: if the folder holds another run than the cell's.
    """
    run = RunDirectory(folder)
    # In one process all cells have one backbone and one data set open, hospitals and single node.
    worker = client.app.worker() if cell.config.run.backend == IN_PROCESS else None
    told: dict[str, Any] = {"console": console, "command_line": command_line}
    told |= {"inside": True, "worker": worker}
    if run.record() is None:
        remove_unbegun(folder)
        begin = federate if cell.federated else single
        begin(cell.config, run_dir=folder, **told)
    else:
        _check_same(cell, RunDirectory.open(folder))
        if run.status().state != "finished":
            resume(folder, **told)
    return run.summary()


def _check_same(cell: Cell, run: RunDirectory) -> None:
    """Refuse a run that is not the cell's, by the configurations that both run with."""
    wanted = resolved(cell.config) if cell.federated else one_node(cell.config)
    changed = [
        str(change)
        for change in differences(run.config(), wanted)
        if not change.key.startswith(RESULTLESS)
    ]
    if changed:
        raise UserError(
            f"{run.path} holds a run with another configuration: {'; '.join(changed)}",
            fix="name another --run-dir, or set these keys as they were",
        )
