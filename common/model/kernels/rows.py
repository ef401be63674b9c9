"""Products by part: each part's rows meet a matrix in a call of their own.

A library chooses its kernel, and with it the order of a sum, by the number of rows. So a row of a
packed product depends, in its last bits, on how many other rows there are; a row of a part's own
product does not. ``parts`` are P + 1 row offsets, or None for one product of all rows.

Shapes: T rows, K summed, N columns.
"""

import itertools

import torch
from torch import Tensor

Parts = tuple[int, ...] | None


def product(x_TK: Tensor, right_KN: Tensor, parts: Parts, bias_N: Tensor | None = None) -> Tensor:
    """Return ``x right + bias``, [T, N].

    >>> x, right = torch.arange(6.0).view(3, 2), torch.eye(2)
    >>> torch.equal(product(x, right, (0, 1, 3)), x)
    True
    """
    if parts is None or len(parts) == 2:
        return x_TK @ right_KN if bias_N is None else torch.addmm(bias_N, x_TK, right_KN)
    out_TN = x_TK.new_empty(len(x_TK), right_KN.shape[1])
    for start, stop in itertools.pairwise(parts):
        part, into = x_TK[start:stop], out_TN[start:stop]
        if bias_N is None:
            torch.mm(part, right_KN, out=into)
        else:
            torch.addmm(bias_N, part, right_KN, out=into)
    return out_TN


def add_product(
    total_TN: Tensor, x_TK: Tensor, right_KN: Tensor, parts: Parts, alpha: float = 1.0
) -> None:
    """Add ``alpha x right`` to ``total``, in its memory."""
    for start, stop in itertools.pairwise(parts or (0, len(x_TK))):
        total_TN[start:stop].addmm_(x_TK[start:stop], right_KN, alpha=alpha)
