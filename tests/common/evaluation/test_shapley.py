"""Shapley values against their definition over all orders, and against a game known by hand."""

import itertools

import numpy as np
import pytest

from common.evaluation.shapley import shapley


def over_all_orders(values: np.ndarray) -> np.ndarray:
    """What each player adds when it comes, a mean over every order of coming."""
    players = len(values).bit_length() - 1
    orders = list(itertools.permutations(range(players)))
    found = np.zeros((players, values.shape[1]))
    for order in orders:
        there = 0
        for player in order:
            found[player] += values[there | 1 << player] - values[there]
            there |= 1 << player
    return found / len(orders)


@pytest.mark.parametrize("players", [1, 2, 3, 5, 6])
def test_equals_the_mean_over_all_orders_and_adds_up(players):
    values = np.random.default_rng(players).standard_normal((2**players, 4))
    found = shapley(values)
    np.testing.assert_allclose(found, over_all_orders(values), atol=1e-12)
    np.testing.assert_allclose(found.sum(0), values[-1] - values[0], atol=1e-12)


def test_in_an_additive_game_everybody_gets_what_they_bring():
    worth = np.array([3.0, -1.0, 0.0, 2.5])
    subsets = range(2 ** len(worth))
    values = [[7 + sum(w for k, w in enumerate(worth) if s >> k & 1)] for s in subsets]
    np.testing.assert_allclose(shapley(np.array(values)).ravel(), worth, atol=1e-12)


@pytest.mark.parametrize("count", [0, 1, 3, 12, 512])
def test_values_that_are_not_those_of_all_subsets_are_refused(count):
    with pytest.raises(ValueError, match="not those of all subsets"):
        shapley(np.zeros((count, 1)))
