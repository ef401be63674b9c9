"""Clipping: what one unit may contribute.

Shapes: U units, P parameters (entries of B, all modules together).
"""

import torch
from torch import Tensor

_BLOCK = 64
_SMALLEST = torch.finfo(torch.float32).tiny


def unit_norms(gradients_UP: Tensor) -> Tensor:
    """Return each row's L2 norm in fp32, to 5e-7 relative.

    Norms of short blocks first, then the norm of these in fp64: one long fp32 sum of squares is
    2e-5 off at a million entries, which would let a unit exceed the clip norm by as much.

    >>> unit_norms(torch.full((1, 2**20), 2.0**-10)).item()
    1.0
    """
    units, width = gradients_UP.shape
    whole = width - width % _BLOCK
    blocks_UB = torch.linalg.vector_norm(
        gradients_UP[:, :whole].view(units, whole // _BLOCK, _BLOCK), dim=2
    )
    rest_U1 = torch.linalg.vector_norm(gradients_UP[:, whole:], dim=1, keepdim=True)
    parts_UB = torch.cat([blocks_UB, rest_U1], dim=1)
    return torch.linalg.vector_norm(parts_UB, dim=1, dtype=torch.float64).float()


def clip_coefficients(norms_U: Tensor, clip_norm: float) -> Tensor:
    """Return c_u = min(1, C / n_u), and 0 for a unit whose norm is not a finite number.

    A norm so large that C / n_u is no normal fp32 number gets 0 as well: a denormal coefficient
    has lost the precision that the bound needs.

    >>> clip_coefficients(torch.tensor([0.5, 4.0, float("inf"), float("nan"), 0.0]), 2.0).tolist()
    [1.0, 0.5, 0.0, 0.0, 1.0]
    """
    coefficients = torch.clamp(clip_norm / norms_U, max=1.0)
    usable = torch.isfinite(norms_U) & (coefficients >= _SMALLEST)
    return torch.where(usable, coefficients, torch.zeros_like(coefficients))


def clipped_sum(gradients_UP: Tensor, clip_norm: float) -> Tensor:
    """Return sum_u c_u G_u.

    Formal guarantee: every summand has L2 norm at most C (1 + 1e-6), whatever ``gradients_UP``
    holds, and follows from that unit alone, so removing one unit moves the sum by at most that.

    Returns:
        fp64 vector of length P; zero for no unit. A sum in fp32 rounds by who else is in it: with
        4,096 units of one direction it moved by 1.0012 C.
    """
    gradients_UP = gradients_UP.float()
    norms_U = unit_norms(gradients_UP)
    coefficients_U = clip_coefficients(norms_U, clip_norm)
    refused = ~torch.isfinite(norms_U)
    # On a GPU asking would wait for all that it has yet to compute.
    if gradients_UP.device.type != "cpu" or bool(refused.any()):
        # 0 * inf is NaN: such a unit must leave the product, not be scaled by zero
        gradients_UP = gradients_UP.masked_fill(refused[:, None], 0.0)
    sum_P = gradients_UP.new_zeros(gradients_UP.shape[1], dtype=torch.float64)
    for coefficient, gradient_P in zip(coefficients_U, gradients_UP, strict=True):
        sum_P += coefficient * gradient_P
    return sum_P
