"""``fedrx paper``: both ranks of the paper, its four checkpoints each, its table beside ours."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from common.config import Config
from common.configio import Scalar, from_flat, read_config
from common.errors import UserError
from common.evaluation.answers_file import Evaluation
from common.evaluation.lists import check_lists
from common.provenance import source_root
from common.records import Record
from common.records.paper import PaperTable
from common.records.run import Inputs, RunRecord
from common.rundir import SUMMARY, RunDirectory
from sim.answers.evaluate import evaluate_run
from sim.process.lock import exclusive
from sim.process.open_run import rank_folder
from sim.process.progress import SILENT, Console
from sim.report.run_report import write_report
from sim.runs.lifecycle import Kind, Run, start
from sim.runs.paper_best import BEST_FOLDER, best_config, best_rows, finish_best
from sim.runs.paper_table import build_table, model_of, table_parts, write_table
from sim.runs.preparation import Preparation
from sim.runs.single import one_node, single_inside
from sim.runs.stages import EVALUATION, after_training

RANKS = (16, 32)
SMALL: dict[str, Scalar] = {
    "model.backbone": "embedded",
    "train.steps": 100,
    "train.max-length": 1024,
    "train.checkpoint-every": 20,
    "evaluation.max-new-tokens": 256,
}
SCALES: dict[str, dict[str, Scalar]] = {"small": SMALL, "full": {}}
BESIDE = {"small": True, "full": False}
"""Whether the best settings found here are tried too, by scale, unless the caller says."""


def paper_config() -> Config:
    """Return the paper's own configuration, as shipped."""
    return read_config(source_root() / "configs" / "paper.toml")


def scaled_config(scale: str, overrides: Mapping[str, Scalar]) -> Config:
    """Return the paper's configuration at a scale, with the caller's own values on top.

    Raises:
        UserError: for an unknown scale, or a value that is not allowed.
    """
    if scale not in SCALES:
        raise UserError(f"--scale {scale}", allowed=" | ".join(SCALES), fix="choose one of these")
    return from_flat({**SCALES[scale], **overrides}, base=paper_config())


def read_ranks(text: str) -> tuple[int, ...]:
    """Read ``16,32``.

    Raises:
        UserError: if these are not ranks.

    >>> read_ranks("16, 32")
    (16, 32)
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise UserError(f"--ranks {text}", allowed="ranks from 1, comma-separated", fix="16,32")
    return tuple(dict.fromkeys(int(part) for part in parts))


def paper(
    config: Config,
    *,
    scale: str,
    ranks: Sequence[int],
    console: Console = SILENT,
    command_line: Sequence[str],
    best: bool | None = None,
    run_dir: Path | None = None,
) -> Record:
    """Run every rank, evaluate every checkpoint, and put the table beside the paper's.

    Args:
        config: From ``scaled_config``.
        scale: Its scale's name; it stands in every table.
        ranks: Ranks to run; ``adapter.rank`` is replaced.
        console: Where progress and results are shown.
        command_line: Stored in environment.json.
        best: Whether the best settings found here stand beside; None: as the scale has it.
        run_dir: Run directory; default below ``runs``. Each rank has its own inside.

    Raises:
        UserError: before anything is written, for a rank or value that is not allowed.
    """
    return start(
        config,
        partial(Paper, scale, tuple(ranks), BESIDE[scale] if best is None else best),
        console=console,
        command_line=command_line,
        run_dir=run_dir,
    ).result


@dataclass
class Paper(Kind):
    """A single run for each rank, and one table."""

    mode = "paper"
    trains_here = True
    renewed = True  # its runs may have been judged meanwhile
    scale: str = ""
    ranks: tuple[int, ...] = ()
    """Ranks to run; a resumed run reads all of these from its run.json."""
    best: bool = False
    """Whether the best settings found here are run too."""

    def resolve(self, config: Config) -> Config:
        """Check every rank, and resolve the rest."""
        for rank in self.ranks:
            from_flat({"adapter.rank": rank}, base=config)
        return one_node(config)

    def ready(self, config: Config, preparation: Preparation, console: Console) -> Config:
        """Check that the best settings can be tried on these data."""
        if self.best:
            check_lists(preparation.data.hospitals, best_config(config))
        return super().ready(config, preparation, console)

    def record(self, config: Config, inputs: Inputs) -> RunRecord:
        """Say which ranks lie inside."""
        inside = {"scale": self.scale, "ranks": self.ranks, "best": self.best}
        return super().record(config, inputs).model_copy(update=inside)

    def facts(self, record: RunRecord) -> Mapping[str, object]:
        """Say which ranks lie inside."""
        return {**super().facts(record), "scale": record.scale, "ranks": list(record.ranks)}

    def place(self, run: Run) -> Mapping[str, object]:
        """Return the seconds that this process has spent."""
        return {"seconds": round(run.seconds, 3)}

    def trained_in(self, directory: RunDirectory, record: RunRecord) -> Sequence[RunDirectory]:
        """Return the runs inside."""
        names = [*map(rank_folder, record.ranks), BEST_FOLDER]
        return [RunDirectory(directory.path / name) for name in names]

    def train(self, run: Run) -> PaperTable:
        """Do what is left of every rank, and collect the table anew."""
        for rank in run.record.ranks:
            run.directory.write_status("running", rank=rank)
            _finish_rank(run, rank)
        if run.record.best:
            finish_best(run)
        return _table(run.directory, run.record)

    def report(self, run: Run, result: PaperTable) -> None:
        """Write the table's page."""
        write_table(run.directory, result)

    def show(self, run: Run, result: PaperTable) -> None:
        """Show the table."""
        page = run.directory.path / "report.html"
        run.console.say(*table_parts(result), f"report: {page}")


def renew_table(run: RunDirectory) -> Path:
    """Write the page of a finished paper run anew: its runs may have been judged meanwhile.

    Raises:
        UserError: if the paper run has not finished.
    """
    record = run.record()
    if record is None or not run.is_finished:
        raise UserError(f"{run.path} has not finished", fix="finish it with `fedrx resume`")
    table = _table(run, record)
    run.write_json(SUMMARY, table)
    write_table(run, table)
    return run.path / "report.html"


def _table(run: RunDirectory, record: RunRecord) -> PaperTable:
    table = build_table(run, record, paper_config())
    return table.model_copy(update={"best": best_rows(run)})


def _finish_rank(run: Run, rank: int) -> None:
    """Train one rank in its own run directory, and answer with each of its checkpoints."""
    config = replace(run.config, adapter=replace(run.config.adapter, rank=rank))
    one = single_inside(run, config, rank_folder(rank), f"rank {rank}")
    run.directory.write_status("running", stage=EVALUATION, rank=rank)
    with exclusive(one), after_training(one, "the answers", "fedrx evaluate"):
        _answer_with_checkpoints(one, run)


def _answer_with_checkpoints(run: RunDirectory, around: Run) -> None:
    """Answer the same held-out admissions with every checkpoint, as a run's end does with the last.

    Where somebody has evaluated the run in another way, all is answered anew: the table needs its
    own.
    """
    summary = run.summary()
    way, renewed = (summary.checkpoints[-1].name, run.config().evaluation), False
    for checkpoint in summary.checkpoints:
        known = Evaluation.read(run)
        answered = known is not None and known.facts.way[:2] == way
        if not answered or model_of(summary, checkpoint) not in run.summary().metrics:
            evaluate_run(
                run,
                checkpoint=checkpoint.name,
                console=around.console,
                worker=around.worker,
                data=around.preparation.data,
            )
            renewed = True
    if renewed:
        write_report(run)
