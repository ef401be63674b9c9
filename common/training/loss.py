"""Cross-entropy only where there is a label, without the [T, V] logits.

Shapes: N labelled tokens, D hidden width, V vocabulary, S segments, C chunk of tokens.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

# Logits of one chunk, in bytes of fp32: large enough for full-speed products.
_CHUNK_BYTES = 2**26
# Rows of a chunk that a CPU works on at a time, so that their softmax stays in its cache.
_CPU_ROWS_BYTES = 2**21


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
    hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor, weights_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Return sum_n w_n CE_n, and the token losses.

    The logits of a chunk live only while its loss and its gradient are computed, both in the
    forward pass; the head is frozen, so its gradient does not exist.

    Args:
        hidden_ND: Hidden states at the tokens that predict a label.
        head_VD: Frozen language-model head.
        labels_N: Token ids.
        weights_N: fp32 weight of each token.

    Returns:
        The weighted sum (fp32 scalar, differentiable in ``hidden_ND``) and CE [N] in fp32.
    """
    total, losses_N = _cross_entropy(hidden_ND, head_VD, labels_N, weights_N)
    return total, losses_N


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        labels_N: Tensor,
        weights_N: Tensor,
    ) -> tuple[Tensor, Tensor]:
        wants_gradient = ctx.needs_input_grad[0]
        d_hidden_ND = torch.empty_like(hidden_ND) if wants_gradient else None
        losses_N = torch.empty(len(labels_N), dtype=torch.float32, device=hidden_ND.device)
        row_bytes = 4 * head_VD.shape[0]
        chunk = max(1, _CHUNK_BYTES // row_bytes)
        for start in range(0, len(labels_N), chunk):
            part = slice(start, start + chunk)
            logits_CV = hidden_ND[part] @ head_VD.T
            on_cpu = logits_CV.device.type == "cpu"
            rows = max(1, _CPU_ROWS_BYTES // row_bytes) if on_cpu else chunk
            for place in range(0, len(logits_CV), rows):
                some = slice(start + place, min(start + place + rows, start + len(logits_CV)))
                losses_N[some] = _losses_and_gradient(
                    logits_CV[place : place + rows],
                    labels_N[some, None],
                    weights_N[some, None] if wants_gradient else None,
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
        return d_hidden_ND * d_total.to(d_hidden_ND.dtype), None, None, None


def _losses_and_gradient(logits_RV: Tensor, labels_R1: Tensor, weights_R1: Tensor | None) -> Tensor:
    """Return the rows' losses; with weights, the gradient takes the logits' place."""
    wide_RV = logits_RV.float()
    softmax_RV = wide_RV.softmax(1)
    # The log-sum-exp, read off where the softmax is largest and so cannot have underflown.
    peak_R1, where_R1 = softmax_RV.max(1, keepdim=True)
    lse_R1 = wide_RV.gather(1, where_R1) - peak_R1.log()
    losses_R = (lse_R1 - wide_RV.gather(1, labels_R1)).squeeze(1)
    if weights_R1 is not None:
        softmax_RV.scatter_add_(1, labels_R1, -torch.ones_like(weights_R1))
        torch.mul(softmax_RV, weights_R1, out=wide_RV)
        logits_RV.copy_(wide_RV)
    return losses_R


# torch's stubs leave Function.apply untyped.
_cross_entropy: Any = _CrossEntropy.apply
