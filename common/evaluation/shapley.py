"""Shapley values, exactly: what each player adds to the value of all, over all orders of coming.

Subsets of K players are numbers below 2^K: bit k says whether player k is in it.
Source: Shapley, "A value for n-person games", 1953.

Shapes: K players, S = 2^K subsets, N cases.
"""

import math

import numpy as np
from numpy.typing import NDArray

MOST_PLAYERS = 8
"""With more the subsets are too many to make a model of each."""
Floats = NDArray[np.float64]


def shapley_matrix(players: int) -> Floats:
    """Return [K, S]: a subset's value, times this and summed, gives each player's.

    Player k's is the sum over subsets without k, of size n, of n! (K - n - 1)! / K! times what k
    adds to it.

    >>> shapley_matrix(2).tolist()
    [[-0.5, 0.5, -0.5, 0.5], [-0.5, -0.5, 0.5, 0.5]]
    """
    matrix_KS = np.zeros((players, 2**players))
    for subset in range(2**players):
        size = subset.bit_count()
        for player in range(players):
            if not subset >> player & 1:
                share = 1 / (players * math.comb(players - 1, size))
                matrix_KS[player, subset] -= share
                matrix_KS[player, subset | 1 << player] += share
    return matrix_KS


def shapley(values_SN: Floats) -> Floats:
    """Return [K, N] Shapley values, of each case by itself: they are linear in the values.

    Their sum over players is the value of all less that of none.

    Raises:
        ValueError: if there is no value for every subset of 1 to ``MOST_PLAYERS`` players, or the
            sums do not come out.

    >>> shapley(np.array([[0.0], [1.0], [3.0], [6.0]])).ravel().tolist()
    [2.0, 4.0]
    """
    players = len(values_SN).bit_length() - 1
    if not 1 <= players <= MOST_PLAYERS or len(values_SN) != 2**players:
        raise ValueError(f"{len(values_SN)} values are not those of all subsets")
    found_KN = shapley_matrix(players) @ values_SN
    if not np.allclose(found_KN.sum(0), values_SN[-1] - values_SN[0], rtol=1e-9, atol=1e-9):
        raise ValueError("the values of the players do not add up to that of all of them")
    return found_KN


def members(subset: int, names: tuple[str, ...]) -> tuple[str, ...]:
    """Return who is in a subset.

    >>> members(5, ("a", "b", "c"))
    ('a', 'c')
    """
    return tuple(name for place, name in enumerate(names) if subset >> place & 1)
