"""A hospital's local work, free of Flower: B in, B out."""

from collections.abc import Callable
from dataclasses import dataclass

from client.proximal import Proximal
from common.config import Config
from common.model.session import Session
from common.training.budget import steps_in_all, steps_of_round
from common.training.gradients import BatchGradient, GradientSource
from common.training.hospital_data import HospitalData
from common.training.loop import StepReport, train, validation_loss
from common.training.optimiser import TrainState
from common.wire.contract import Tensors


@dataclass(frozen=True, kw_only=True)
class LocalResult:
    """What one local update gives."""

    b: Tensors
    """What the round sends: updated matrices (fp32) by wire key."""
    metrics: dict[str, float]
    """``weight`` (training samples), ``train-loss`` (mean per label token), ``steps``,
    ``seconds``; none of these where the gradient source tells no loss."""
    tokens: int = 0
    """Packed tokens that were trained on, for the hospital's own machine; 0 where it tells none."""


@dataclass(frozen=True)
class LocalRound:
    """What one hospital's round begins at."""

    session: Session
    hospital: HospitalData
    b: Tensors
    """The global B."""
    state: TrainState
    """Updated in place."""
    config: Config
    server_round: int
    on_step: Callable[[StepReport], None] | None = None


def update(task: LocalRound, source: GradientSource | None = None) -> LocalResult:
    """Train one hospital for one round, starting from the global B.

    A private ``source`` tells no loss, nor has the result metrics.
    """
    session, hospital, config = task.session, task.hospital, task.config
    session.adapter.load(task.b)
    session.adapter.start_round(task.server_round)
    samples = 0 if source is not None else len(hospital.train)
    if config.federation.strategy == "fedprox":
        source = Proximal(
            source=source or BatchGradient(hospital.train, config.train, hospital.name),
            anchor_P=session.adapter.flat.clone(),
            mu=config.federation.proximal_mu,
        )
    metrics = train(
        session,
        hospital.train,
        config.train,
        task.state,
        steps=steps_of_round(config, samples, task.server_round).value,
        schedule_steps=steps_in_all(config, samples).value,
        stream=hospital.name,
        on_step=task.on_step,
        source=source,
    )
    sent = session.adapter.spec.scheme.shapes(task.server_round, session.adapter.state())
    if metrics.loss is None:
        return LocalResult(b=sent, metrics={})
    return LocalResult(
        b=sent,
        tokens=metrics.tokens,
        metrics={
            "weight": float(samples),
            "train-loss": metrics.loss.mean,
            "steps": float(metrics.steps),
            "seconds": metrics.seconds,
        },
    )


def evaluate(session: Session, hospital: HospitalData, b: Tensors) -> dict[str, float]:
    """Return the mean validation loss per label token and its weight (label tokens)."""
    session.adapter.load(b)
    loss = validation_loss(session, hospital.validation)
    return {"loss": loss.mean, "weight": float(loss.tokens)}
