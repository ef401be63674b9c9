"""Cross-entropy only where there is a label, without the [T, V] logits.

Shapes: N labelled tokens, D hidden width, V vocabulary, S segments, C chunk of tokens.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.model.kernels.elementwise import TORCH, Kernels
from common.model.kernels.rows import Parts

# Logits of one chunk, in bytes of fp32: large enough for full-speed products. A GPU reads the whole
# head for every chunk, which takes as long as the product with 300 rows.
_CHUNK_BYTES = {"cpu": 2**26, "cuda": 2**29}


class LossSum(NamedTuple):
    """A sum of token losses and the number of tokens, so that sums of sums stay exact."""

    loss_sum: float
    tokens: int

    @property
    def mean(self) -> float:
        """Loss per token in nats; NaN without tokens.

        >>> LossSum(6.0, 3).mean
        2.0
        """
        return self.loss_sum / self.tokens if self.tokens else float("nan")


def weighted_cross_entropy(
    hidden_ND: Tensor,
    head_VD: Tensor,
    labels_N: Tensor,
    weights_N: Tensor,
    kernels: Kernels = TORCH,
    parts: Parts = None,
) -> tuple[Tensor, Tensor]:
    """Return sum_n w_n CE_n, and the token losses.

    The logits of a chunk live only while its loss and its gradient are computed, both in the
    forward pass; the head is frozen, so its gradient does not exist.

    Args:
        hidden_ND: Hidden states at the tokens that predict a label.
        head_VD: Frozen language-model head.
        labels_N: Token ids.
        weights_N: fp32 weight of each token.
        kernels: Who does the elementwise work.
        parts: Rows with products of their own (`common.model.kernels.rows`).

    Returns:
        The weighted sum (fp32 scalar, differentiable in ``hidden_ND``) and CE [N] in fp32.
    """
    total, losses_N = _cross_entropy(hidden_ND, head_VD, labels_N, weights_N, kernels, parts)
    return total, losses_N


def _chunks(parts: tuple[int, ...], size: int) -> Iterator[slice]:
    for start, stop in itertools.pairwise(parts):
        for first in range(start, stop, size):
            yield slice(first, min(first + size, stop))


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        labels_N: Tensor,
        weights_N: Tensor,
        kernels: Kernels,
        parts: Parts,
    ) -> tuple[Tensor, Tensor]:
        wants_gradient = ctx.needs_input_grad[0]
        d_hidden_ND = torch.empty_like(hidden_ND) if wants_gradient else None
        losses_N = torch.empty(len(labels_N), dtype=torch.float32, device=hidden_ND.device)
        limit = _CHUNK_BYTES[hidden_ND.device.type]
        chunk = max(1, limit // (4 * head_VD.shape[0]))
        for part in _chunks(parts or (0, len(labels_N)), chunk):
            logits_CV = hidden_ND[part] @ head_VD.T
            losses_N[part] = kernels.losses(
                logits_CV,
                labels_N[part, None],
                weights_N[part, None] if wants_gradient else None,
            )
            if d_hidden_ND is not None:
                d_hidden_ND[part] = logits_CV @ head_VD
        if d_hidden_ND is not None:
            ctx.save_for_backward(d_hidden_ND)
        ctx.mark_non_differentiable(losses_N)
        return (losses_N * weights_N).sum(), losses_N

    @staticmethod
    def backward(ctx: Any, d_total: Tensor, _d_losses: Tensor) -> tuple[Tensor | None, ...]:
        (d_hidden_ND,) = ctx.saved_tensors
        return d_hidden_ND * d_total.to(d_hidden_ND.dtype), None, None, None, None, None


# torch's stubs leave Function.apply untyped.
_cross_entropy: Any = _CrossEntropy.apply
