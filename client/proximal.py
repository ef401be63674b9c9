"""FedProx (Li et al., 2020, arXiv 1812.06127): local training is pulled to the global B."""

from dataclasses import dataclass

from torch import Tensor

from common.model.session import Session
from common.training.gradients import GradientSource, StepLoss


@dataclass(frozen=True, kw_only=True)
class Proximal:
    """Another source's gradient plus that of ``mu / 2 * |b - anchor|^2``.

    The pull depends on public values alone, so it may be added to a private gradient.
    """

    source: GradientSource
    anchor_P: Tensor
    mu: float

    def __call__(self, session: Session, step: int) -> StepLoss:
        """Overwrite ``session.adapter.flat_grad``; the loss told is without the pull."""
        result = self.source(session, step)
        adapter = session.adapter
        adapter.flat_grad.add_(adapter.flat - self.anchor_P, alpha=self.mu)
        return result
