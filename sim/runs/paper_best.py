"""Beside the paper's settings, the best ones found here: the same checkpoints, two kinds of lists.

What was tried, and on whom it was chosen: benchmarks/README.md, "What makes answers better".
"""

from common.config import Config
from common.configio import Scalar, from_flat
from common.records.paper import BestAnswers, BestRow
from common.rundir import RunDirectory
from sim.answers.evaluate import evaluate_run
from sim.process.lock import exclusive
from sim.report.run_report import write_report
from sim.runs.lifecycle import Run
from sim.runs.paper_table import LAST, READINGS, model_of
from sim.runs.single import single_inside
from sim.runs.stages import EVALUATION, after_training

BEST_FOLDER = "best"
BEST: dict[str, Scalar] = {
    "data.drug-order": "set",
    "adapter.targets": "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
    "adapter.rank": 16,
    "train.optimizer": "adamw",
    "train.learning-rate": 1e-2,
    "train.schedule": "cosine",
    "train.warmup-steps": 4,
    "train.max-grad-norm": 1.0,
    "evaluation.method": "score",
    "evaluation.frequencies": True,
}
"""As in configs/hospitals.toml; the rest is the paper run's own."""
LISTS = {
    "scored": ("evaluation.method=score",),
    "formulary": ("evaluation.method=generate", "evaluation.decoding=formulary"),
}
_ANSWERS = "best.json"


def best_config(config: Config) -> Config:
    """Return the best settings, with a paper run's scale."""
    return from_flat(BEST, base=config)


def finish_best(run: Run) -> None:
    """Do what is left: training in a run directory of its own, then both kinds of lists."""
    title = "the best settings found here"
    one = single_inside(run, best_config(run.config), BEST_FOLDER, title)
    known = _known(run.directory)
    for lists in LISTS:
        if lists not in known:
            run.directory.write_status("running", stage=EVALUATION, lists=lists)
            with exclusive(one), after_training(one, "the answers", "fedrx evaluate"):
                known[lists] = _answered(one, run, lists)
            answered = {lists: [row.as_json() for row in rows] for lists, rows in known.items()}
            run.directory.write_json(_ANSWERS, answered)
    write_report(one)


def best_rows(run: RunDirectory) -> tuple[BestRow, ...]:
    """Return what a paper run knows of the best settings; nothing where it has not tried them."""
    return tuple(row for rows in _known(run).values() for row in rows)


def _known(run: RunDirectory) -> dict[str, list[BestRow]]:
    known = BestAnswers.read(run.read_json(_ANSWERS), what=str(run.path / _ANSWERS))
    return {
        lists: list(getattr(known, lists)) for lists in LISTS if lists in known.model_fields_set
    }


def _answered(one: RunDirectory, around: Run, lists: str) -> list[BestRow]:
    rows: list[BestRow] = []
    for checkpoint in one.summary().checkpoints:
        summary = one.summary()
        # The last checkpoint stands beside the first that is answered.
        if not rows or model_of(summary, checkpoint) != LAST:
            summary = evaluate_run(
                one,
                checkpoint=checkpoint.name,
                overrides=LISTS[lists],
                console=around.console,
                worker=around.worker,
                data=around.preparation.data,
            )
        figures = summary.metrics[model_of(summary, checkpoint)]
        rows.append(
            BestRow(
                lists=lists,
                checkpoint=checkpoint.name,
                steps=checkpoint.step,
                prauc=figures.prauc.value if figures.prauc else None,
                **figures.model_dump(include=READINGS),
            )
        )
    return rows
