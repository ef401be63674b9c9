"""A learning curve that costs no privacy: the loss of each checkpoint on made-up admissions.

It is measured after training, with what every round has released already, on admissions of the
synthetic source that no hospital has: nothing of a hospital is read for it, so no epsilon is spent.
"""

from dataclasses import replace

from common.config import Config
from common.data.prepare import load_samples
from common.data.samples import Admission
from common.data.synthetic.source import PATH
from common.model.session import Session
from common.records.summary import PublicCurve
from common.rundir import RunDirectory
from common.training.loop import validation_loss
from sim.answers.held_out import encoded
from sim.process.progress import SILENT, Console, Meter

FEWEST_PATIENTS = 10
"""The synthetic source writes no fewer."""


def public_admissions(config: Config) -> tuple[tuple[Admission, ...], int]:
    """Return ``evaluation.public-validation`` made-up admissions and their source's seed.

    A run on synthetic data trains on patients of another seed.
    """
    count, seed = config.evaluation.public_validation, config.data.synthetic_seed + 1
    patients = max(FEWEST_PATIENTS, count)
    data = replace(config.data, path=PATH, synthetic_patients=patients, synthetic_seed=seed)
    return load_samples(data).admissions[:count], seed


def public_curve(
    run: RunDirectory, session: Session, config: Config, *, console: Console = SILENT
) -> PublicCurve:
    """Measure every checkpoint of a run; the adapter's values are put back afterwards.

    Args:
        run: Whose checkpoints.
        session: Open session of the run's backbone and A.
        config: Of the run; ``evaluation.public-validation`` is above 0.
        console: Where progress is shown.
    """
    admissions, seed = public_admissions(config)
    samples = encoded(admissions, session, config)
    names, losses, unit = run.checkpoint_names(), [], "round"
    with session.adapter.restored(), Meter(console, "public curve", len(names)) as meter:
        for done, name in enumerate(names, start=1):
            checkpoint = run.load_checkpoint(name)
            step, at_round = checkpoint.facts.step, checkpoint.facts.round
            unit = "step" if step else "round"
            session.adapter.load(checkpoint.b)
            found = validation_loss(session, samples)
            losses.append((step or at_round, found.mean))
            meter.update(done, name)
    return PublicCurve(samples=len(samples), seed=seed, unit=unit, losses=tuple(losses))
