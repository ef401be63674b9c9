"""The release: (sum_u c_u G_u + sigma C xi) / D on a fixed grid."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import RunFailed
from common.privacy.mechanism.noise import NoiseSource, residue
from common.privacy.plan import PrivacyPlan

ARITHMETIC_SLACK = 2.0**-10
"""Relative growth of the sensitivity that fp32 may cause (rounding of the clip); the noise is
larger by as much."""
_FINEST_BITS = 22


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Where released values may lie, and how wide the noise is in steps of it."""

    step: float
    """A power of two: every released fp32 value is an integer multiple of it, exactly."""
    std_steps: float
    """Standard deviation of the discrete Gaussian in grid steps."""

    @property
    def std(self) -> float:
        """Standard deviation in the gradient's unit: at least sigma C / D."""
        return self.step * self.std_steps


def grid_for(plan: PrivacyPlan, parameters: int) -> Grid:
    """Return the grid for ``parameters`` entries: public, a function of the plan and P alone.

    Rounding the mean gradient to the grid before noise is added can move two neighbouring sums
    apart by a further step * sqrt(P); the standard deviation is sigma times the sensitivity with
    that and the arithmetic slack included.
    """
    step = 2.0 ** (math.floor(math.log2(plan.noise_std)) - _FINEST_BITS)
    sensitivity = plan.clip_norm * (1 + ARITHMETIC_SLACK) / plan.expected_batch
    rounded = sensitivity / step + math.sqrt(parameters)
    return Grid(step=step, std_steps=plan.sigma * rounded)


class GaussianMechanism:
    """Turns clipped sums into releases.

    Raises:
        UserError: if the plan is not calibrated.
        RunFailed: if the noise table's residue exceeds what the accounting kept back for it.
    """

    def __init__(self, plan: PrivacyPlan, parameters: int, noise: NoiseSource) -> None:
        self.plan, self.parameters, self.noise = plan, parameters, noise
        self.grid = grid_for(plan, parameters)
        self.residue = residue(self.grid.std_steps, parameters * plan.steps)
        if self.residue > plan.delta * 2.0**-40:
            raise RunFailed(f"noise residue {self.residue:.1e} is too large for delta {plan.delta}")

    def release(self, sum_P: Tensor) -> Tensor:
        """Return the noised mean gradient.

        Formal guarantee: one Gaussian mechanism of noise multiplier sigma on a sum of sensitivity
        C; the cast to fp32 and the caller's optimizer are post-processing.

        Raises:
            RunFailed: if the sum is not finite, which clipping excludes.
        """
        # Drawn before the sum is looked at: a GPU may still be computing it.
        noise_P = torch.from_numpy(self.noise.gaussian(self.parameters, self.grid.std_steps))
        if sum_P.shape != (self.parameters,) or not bool(torch.isfinite(sum_P).all()):
            raise RunFailed("privacy: the clipped sum is not finite or not of B's size")
        mean_P = sum_P.detach().to("cpu", torch.float64) / self.plan.expected_batch
        steps_P = torch.round(mean_P / self.grid.step).to(torch.int64) + noise_P
        return (steps_P.to(torch.float64) * self.grid.step).to(sum_P.device, torch.float32)
