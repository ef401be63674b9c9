"""``fedrx generalise``: models of one, some and all hospitals on the held-out patients of each.

Every model is an ordinary run, a cell as in a sweep: each hospital alone, all of them, all but one,
and some. Patients stay where the configuration deals them; what a seed changes is A, the order of
data and who is asked.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import client.app
from common.config import Config, RunConfig
from common.configio import flatten, from_flat
from common.data.dataset import Dataset
from common.errors import UserError
from common.evaluation.answers import choose_cases
from common.evaluation.answers_file import read_answers
from common.evaluation.metrics import drug_map_of, f1_by_admission
from common.evaluation.transfer import Measured, Results, Trained, measured
from common.privacy.settings import plan_of, protects
from common.records import Record
from common.rundir import RunDirectory
from common.training.worker import Worker
from common.wire.cohort import hospital_names, trained_by
from server.strategies import check_strategy
from sim.answers.held_out import HeldOut
from sim.process.progress import SILENT, Console, Meter
from sim.report.transfer_page import transfer_parts, write_transfer_page
from sim.runs.cells import Cell, Cells
from sim.runs.lifecycle import Run, start_or_go_on
from sim.runs.preparation import with_absolute_paths

ALL, ALONE, WITHOUT = "all", "alone", "without"
SEEDS = ("train.seed", "adapter.seed", "federation.seed")
GENERALISE, PAGE = "generalise.json", "generalise.html"


class GeneraliseRecord(Record):
    """generalise.json."""

    source: str
    seeds: int
    f1: Measured
    """Of the lists."""
    loss: Measured
    """Nats per answer token."""

    @property
    def measures(self) -> dict[str, Measured]:
        """Both, by the name that people read."""
        return {"F1": self.f1, "loss": self.loss}


def groups(names: Sequence[str], place: int) -> dict[tuple[str, str], tuple[str, ...]]:
    """Return who trains the models of one seed, by kind and part of the cell.

    Between one and all but one, the hospitals are added one by one, beginning with another one in
    every seed.

    >>> [*groups(("a", "b", "c", "d"), 1).values()][-2:]
    [('a', 'b', 'c'), ('b', 'c')]
    """
    found = {(ALL, ""): tuple(names)} | {(ALONE, name): (name,) for name in names}
    if len(names) > 2:
        found |= {(WITHOUT, name): tuple(o for o in names if o != name) for name in names}
    order = [names[(place + step) % len(names)] for step in range(len(names))]
    for size in range(2, len(names) - 1):
        found[f"of-{size}", ""] = tuple(sorted(order[:size]))
    return found


def plan_models(config: Config, seeds: int) -> list[Cell]:
    """List the runs.

    Args:
        config: Of the run of all hospitals.
        seeds: How many of each; the first has the configuration's own seeds.

    Raises:
        UserError: with one hospital, or some of them left out already, or where the aggregation or
            the privacy of the run allows no model of fewer.
    """
    federation = config.federation
    if federation.hospitals < 2 or federation.only:
        only = f", federation.only={federation.only}" * bool(federation.only)
        raise UserError(
            f"federation.hospitals={federation.hospitals}{only}",
            allowed="two hospitals or more, all of which take part",
            fix="name another run or configuration",
        )
    cells = []
    for place in range(seeds):
        flat = flatten(config)
        flat |= {key: int(flat[key]) + place for key in SEEDS}
        for (arm, part), some in groups(hospital_names(federation.hospitals), place).items():
            only = "" if arm == ALL else ",".join(some)
            one = from_flat({**flat, "federation.only": only})
            check_strategy(one.federation)
            if protects(one):
                plan_of(one)
            # Ray pays where several hospitals train for long side by side.
            quick = len(some) == 1 or config.model.backbone == "tiny"
            run = RunConfig(name=arm, backend="in-process" if quick else config.run.backend)
            cells.append(
                Cell(arm=arm, seed=place, part=part, config=replace(one, run=run), federated=True)
            )
    return cells


def generalise(
    config: Config,
    folder: Path,
    *,
    seeds: int,
    console: Console = SILENT,
    command_line: Sequence[str],
    run: RunDirectory | None = None,
) -> Record:
    """Train what is not trained yet, and put everything into matrices, a curve and a page.

    Args:
        config: Of the run of all hospitals.
        folder: Where the runs, generalise.json and generalise.html are.
        seeds: How many models of each kind.
        console: Where progress and the table are shown.
        command_line: Stored in each run's environment.json.
        run: A finished run of ``config``: the first seed's model of all hospitals.

    Raises:
        UserError: see ``plan_models``; if a run in the folder is another.
        StageFailed: if the comparison fails, also where a run answered other cases.
    """
    record = run.record() if run else None
    if run and not (run.is_finished and record and record.mode == "federation"):
        raise UserError(
            f"{run.path} is no finished federation",
            allowed="a run of `fedrx federate` that is finished, or a configuration",
            fix="`fedrx resume` it, or name a configuration",
        )
    if run:
        run.load_checkpoint()  # what is wrong with it is said before others are trained
    cells = plan_models(config, seeds)
    trained = {cells[0].folder: run} if run else {}
    kind = Generalise(cells, trained=trained, config=config, seeds=seeds)
    return start_or_go_on(kind, folder, console=console, command_line=command_line).result


@dataclass(kw_only=True)
class Generalise(Cells):
    """Models of one, some and all hospitals, and what each is worth at every hospital."""

    mode = "generalise"
    file = GENERALISE

    config: Config
    """Of the run of all hospitals."""
    seeds: int

    def train(self, run: Run) -> GeneraliseRecord:
        """Do what is left of every model; return matrices and curve, by lists and by loss."""
        self.finish(run)
        # Cells in this process have opened it, under absolute paths.
        data = client.app.worker().data(with_absolute_paths(self.config))
        names = [hospital.name for hospital in data.hospitals]
        models = [
            Trained(tuple(trained_by(cell.config.federation) or names), cell.seed)
            for cell in self.cells
        ]
        return GeneraliseRecord(
            source=data.source,
            seeds=self.seeds,
            f1=measured(self._by_f1(data, models), names),
            loss=measured(self._by_loss(data, models, run.console), names),
        )

    def report(self, run: Run, result: GeneraliseRecord) -> None:
        """Write the page."""
        page, measures = run.directory.path / PAGE, result.measures
        write_transfer_page(page, result.source, result.seeds, measures)

    def show(self, run: Run, result: GeneraliseRecord) -> None:
        """Show what hospitals gain."""
        page = run.directory.path / PAGE
        run.console.say(*transfer_parts(result.measures), f"page: {page}")

    def _by_f1(self, data: Dataset, models: Sequence[Trained]) -> Results:
        settings, level = self.config.evaluation, self.config.data.normalisation
        cases = choose_cases(data.hospitals, samples=settings.samples, seed=settings.seed)
        drug_map, rows_RN = drug_map_of(self.config.data), []
        for run in self.runs.values():
            rows = {row.case: row for row in read_answers(run) if row.model == "fedrx"}
            if list(rows) != [case.name for case in cases]:
                raise UserError(
                    f"{run.path} answered other cases than its configuration names",
                    fix=f"fedrx evaluate {run.path}",
                )
            rows_RN.append(f1_by_admission(list(rows.values()), level=level, drug_map=drug_map))
        return Results(
            models=models,
            values_RN=np.array(rows_RN),
            patients_N=[case.cluster for case in cases],
            hospitals_N=[data.hospitals[case.hospital].name for case in cases],
            higher_is_better=True,
            resamples=settings.bootstrap,
            seed=settings.seed,
        )

    def _by_loss(self, data: Dataset, models: Sequence[Trained], console: Console) -> Results:
        settings, worker = self.config.evaluation, Worker()
        rows_RN, at = [], []
        with Meter(console, "losses", len(self.cells)) as meter:
            for done, cell in enumerate(self.cells, 1):
                session = worker.session(cell.config)  # A is another in every seed
                held_out = HeldOut.of(data.hospitals, session, self.config)
                b = self.runs[cell.folder].load_checkpoint().b
                rows_RN.append(held_out.losses(session, [b])[0])
                at = held_out.hospitals
                meter.update(done)
        return Results(
            models=models,
            values_RN=np.array(rows_RN),
            patients_N=range(len(at)),
            hospitals_N=at,
            higher_is_better=False,
            resamples=settings.bootstrap,
            seed=settings.seed,
        )
