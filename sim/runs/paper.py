"""``fedrx paper``: both ranks of the paper, its four checkpoints each, its table beside ours."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from common.config import Config
from common.configio import flatten, from_flat, read_config
from common.data.dataset import open_hospitals
from common.errors import UserError
from common.evaluation.answers import evaluate_answers
from common.evaluation.answers_file import Evaluation
from common.provenance import environment, source_root
from common.rundir import RunDirectory, remove_unbegun
from common.training.worker import Worker
from sim.answers.evaluate import evaluate_run
from sim.process.lock import exclusive
from sim.process.open_run import rank_folder
from sim.process.progress import Meter
from sim.process.stages import EVALUATION, REPORT, after_training, reported
from sim.report.run_report import write_report
from sim.runs import single
from sim.runs.federate import Preparation, fingerprints, prepare
from sim.runs.paper_table import build_table, model_of, show_table, write_table

MODE = "paper"
RANKS = (16, 32)
SMALL: dict[str, Any] = {
    "model.backbone": "embedded",
    "train.steps": 100,
    "train.max-length": 1024,
    "train.checkpoint-every": 20,
    "evaluation.max-new-tokens": 256,
}
SCALES: dict[str, dict[str, Any]] = {"small": SMALL, "full": {}}


def paper_config() -> Config:
    """Return the paper's own configuration, as shipped."""
    return read_config(source_root() / "configs" / "paper.toml")


def scaled_config(scale: str, overrides: dict[str, Any]) -> Config:
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
    console: Console,
    command_line: Sequence[str],
    run_dir: Path | None = None,
) -> dict[str, Any]:
    """Run every rank, evaluate every checkpoint, and put the table beside the paper's.

    Args:
        config: From ``scaled_config``.
        scale: Its scale's name; it stands in every table.
        ranks: Ranks to run; ``adapter.rank`` is replaced.
        console: Where progress and results are shown.
        command_line: Stored in environment.json.
        run_dir: Run directory; default below ``runs``. Each rank has its own inside.

    Returns:
        The content of summary.json: see ``sim.runs.paper_table.build_table``.

    Raises:
        UserError: before anything is written, for a rank or value that is not allowed.
    """
    started = time.monotonic()
    RunDirectory.require_new(config, directory=run_dir)
    for rank in ranks:
        from_flat({"adapter.rank": rank}, base=config)
    config = single.one_node(config)
    preparation = prepare(config, console)
    facts = {
        **environment(list(command_line)),
        "mode": MODE,
        "scale": scale,
        "ranks": list(ranks),
        "config": flatten(config),
        "inputs": fingerprints(preparation),
    }
    run = RunDirectory.create(config, directory=run_dir)
    config = replace(config, run=replace(config.run, directory=str(run.path)))
    run.write_config(config)
    run.write_json("environment.json", facts)
    with exclusive(run):
        return go_on(run, config, preparation, console, started=started)


def go_on(
    run: RunDirectory,
    config: Config,
    preparation: Preparation,
    console: Console,
    *,
    started: float,
) -> dict[str, Any]:
    """Do what is left of a paper run, and write its table anew.

    Args:
        run: The paper run's directory, held alone.
        config: As it was when the run began.
        preparation: What the run reads.
        console: Where progress and results are shown.
        started: When this process began to work on it, by ``time.monotonic``.
    """
    facts, worker = run.read_json("environment.json"), Worker()
    with reported(run, console):
        for rank in facts["ranks"]:
            run.write_status("running", rank=rank)
            _finish_rank(run, config, rank, console, facts["command_line"], worker)
        run.write_status("running", stage=REPORT)
        table = _table(run)
        write_table(run, table)
        run.write_status("finished", seconds=round(time.monotonic() - started, 3))
    show_table(console, table)
    console.print(f"report: {run.path / 'report.html'}", markup=False, highlight=False)
    return table


def renew_table(run: RunDirectory) -> Path:
    """Write the page of a finished paper run anew: its runs may have been judged meanwhile.

    Raises:
        UserError: if the paper run has not finished.
    """
    if run.status()["state"] != "finished":
        raise UserError(f"{run.path} has not finished", fix="finish it with `fedrx resume`")
    write_table(run, _table(run))
    return run.path / "report.html"


def _table(run: RunDirectory) -> dict[str, Any]:
    facts = run.read_json("environment.json")
    return build_table(run, facts["ranks"], paper_config(), facts["scale"])


def _finish_rank(
    run: RunDirectory,
    config: Config,
    rank: int,
    console: Console,
    command_line: Sequence[str],
    worker: Worker,
) -> None:
    """Train one rank in its own run directory, and answer with each of its checkpoints."""
    folder = run.path / rank_folder(rank)
    config = replace(
        config,
        adapter=replace(config.adapter, rank=rank),
        run=replace(
            config.run, directory=str(folder), name=f"{config.run.name}-{rank_folder(rank)}"
        ),
    )
    one = RunDirectory(folder)
    if one.read_json("environment.json").get("mode") != single.MODE:
        remove_unbegun(folder)
        console.rule(f"rank {rank}")
        single.single(
            config, console=console, command_line=command_line, run_dir=folder, worker=worker
        )
    elif one.status()["state"] != "finished":
        console.rule(f"rank {rank}, resumed")
        started = time.monotonic()
        with exclusive(one):
            preparation = prepare(config, console)
            single.go_on(one, config, preparation, console, started=started, worker=worker)
    run.write_status("running", stage=EVALUATION, rank=rank)
    with exclusive(one), after_training(one, "the answers", "fedrx evaluate"):
        _answer_with_checkpoints(one, config, console, worker)


def _answer_with_checkpoints(
    run: RunDirectory, config: Config, console: Console, worker: Worker
) -> None:
    """Answer the same held-out admissions with the earlier checkpoints, as a run's end does."""
    known = Evaluation.read(run)
    summary = run.read_json("summary.json")
    way = (summary["checkpoints"][-1]["name"], config.evaluation)
    if known is None or known.facts.way[:2] != way:
        # Somebody has evaluated another checkpoint, or in another way: the table needs its own.
        summary = evaluate_run(run, console=console, worker=worker)
        known = Evaluation.read(run)
    names = [
        checkpoint["name"]
        for checkpoint in summary["checkpoints"]
        if model_of(summary, checkpoint) not in summary["metrics"]
    ]
    if known is None or not names:
        return
    with Meter(console, "answers", len(names) * known.facts.samples) as meter:
        evaluation = evaluate_answers(
            worker.session(config),
            open_hospitals(config).hospitals,
            config,
            {name: run.load_checkpoint(name).b for name in names},
            progress=lambda model, done, of: meter.update(names.index(model) * of + done, model),
        )
    found = replace(
        evaluation,
        facts=known.facts,
        metrics={name: evaluation.metrics[name] for name in names},
        predictions=[row for row in evaluation.predictions if row.model in names],
    )
    known.beside(found).write(run, summary)
    write_report(run)
