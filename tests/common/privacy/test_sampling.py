"""Poisson sampling of units (specification test 7, first half)."""

import itertools
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from common.privacy.mechanism.gradients import PrivateGradient
from common.privacy.mechanism.noise import NoiseSource
from common.privacy.mechanism.sampling import Units, group_units
from common.seeds import stream
from common.training.gradients import StepLoss

Q = 0.2
UNITS, STEPS = 40, 20_000


def draws(draw_step) -> np.ndarray:
    """Membership matrix [steps, units] of a sampler that returns unit numbers."""
    table = np.zeros((STEPS, UNITS), dtype=bool)
    for step in range(STEPS):
        table[step, draw_step(step)] = True
    return table


def is_poisson(table: np.ndarray) -> bool:
    """Inclusion rate, pairwise independence, independence of steps, binomial batch sizes.

    The bounds are six standard deviations: some 1e-5 false alarms over 860 statistics.
    """
    steps, units = table.shape
    rates = table.mean(0)
    spread = np.sqrt(Q * (1 - Q) / steps)
    if np.abs(rates - Q).max() > 6 * spread:
        return False
    pairs = [
        np.corrcoef(table[:, a], table[:, b])[0, 1]
        for a, b in itertools.combinations(range(units), 2)
    ]
    if np.abs(pairs).max() > 6 / np.sqrt(steps):
        return False
    # the mean correlation is far more sensitive than any single one to fixed batch sizes
    if abs(np.mean(pairs)) > 6 / np.sqrt(steps * len(pairs)):
        return False
    lagged = [np.corrcoef(table[1:, u], table[:-1, u])[0, 1] for u in range(units)]
    if np.abs(lagged).max() > 6 / np.sqrt(steps):
        return False
    sizes = np.bincount(table.sum(1), minlength=units + 1)
    expected = stats.binom.pmf(np.arange(units + 1), units, Q) * steps
    common = expected > 10
    return (
        stats.chisquare(
            sizes[common], expected[common] * sizes[common].sum() / expected[common].sum()
        ).pvalue
        > 1e-6
    )


def test_draws_are_poisson(make_plan) -> None:
    plan, source = make_plan(sampling_rate=Q), NoiseSource()
    units = Units(tuple((index,) for index in range(UNITS)))
    assert is_poisson(draws(lambda _: [unit[0] for unit in units.draw(plan, source)]))


def test_the_check_rejects_shuffled_fixed_size_and_repeated_draws() -> None:
    rng = np.random.default_rng(0)
    size = int(Q * UNITS)
    fixed_size = draws(lambda _: rng.choice(UNITS, size, replace=False))
    order = rng.permutation(UNITS)
    shuffled = draws(lambda step: np.roll(order, -size * step)[:size])
    one_coin = draws(lambda _: np.arange(UNITS)[rng.random() < Q :] if rng.random() < Q else [])
    half_rate = draws(lambda _: np.flatnonzero(rng.random(UNITS) < Q / 2))
    for table in (fixed_size, shuffled, one_coin, half_rate):
        assert not is_poisson(table)


def test_rate_one_takes_everyone_and_an_empty_draw_is_possible(make_plan) -> None:
    units = Units(((0, 2), (1,)))
    assert units.draw(make_plan(sampling_rate=1.0), NoiseSource()) == [(0, 2), (1,)]
    assert units.draw(make_plan(sampling_rate=1e-12), NoiseSource()) == []
    assert Units(()).draw(make_plan(), NoiseSource()) == []


def test_a_patient_is_one_unit_with_a_bounded_number_of_admissions(make_plan) -> None:
    patients = [*["a"] * 20, "b", *["c"] * 3]
    units = group_units(patients, make_plan(), seed=0)
    assert [len(members) for members in units.members] == [4, 1, 3]
    for members, name in zip(units.members, "abc", strict=True):
        assert {patients[index] for index in members} == {name}
        assert len(set(members)) == len(members)
    everything = group_units(patients, make_plan(max_admissions_per_patient=0), seed=0)
    assert [len(members) for members in everything.members] == [20, 1, 3]
    single = group_units(patients, make_plan(unit="admission"), seed=0)
    assert single.members == tuple((index,) for index in range(24))


def test_a_patients_admissions_do_not_depend_on_other_patients(make_plan) -> None:
    def chosen(patients: list[str], name: str) -> list[int]:
        units = group_units(patients, make_plan(), seed=5).members
        first = patients.index(name)
        (members,) = [m for m in units if patients[m[0]] == name]
        return [index - first for index in members]

    alone = chosen(["x"] * 9, "x")
    assert chosen([*["w"] * 7, *["x"] * 9, *["y"] * 11], "x") == alone
    # the mutant: one generator that all patients share in turn
    shared, fresh = np.random.default_rng(5), np.random.default_rng(5)
    shared.choice(7, 4, replace=False)
    assert set(shared.choice(9, 4, replace=False)) != set(fresh.choice(9, 4, replace=False))


class Drawn(PrivateGradient):
    """The real source, except that it notes who is drawn in place of computing gradients."""

    def clipped_sum(self, session: Any, drawn: Any, *, step: int = 0) -> torch.Tensor:
        self.last = [self.dataset[member].unit for unit in drawn for member in unit]
        return torch.zeros(session.adapter.trainable_parameters)


class Everyone(Drawn):
    """The mutant: no sampling, while the accounting claims its amplification."""

    def __call__(self, session: Any, step: int) -> StepLoss:
        sum_P = self.clipped_sum(session, list(self.units.members))
        session.adapter.flat_grad.copy_(self.mechanism_for(session).release(sum_P))
        return StepLoss(loss_sum=None, label_tokens=0, packed_tokens=0)


class DrawnOnce(Drawn):
    """The mutant: one draw for all steps."""

    def __call__(self, session: Any, step: int) -> StepLoss:
        self.drawn = getattr(self, "drawn", None) or self.units.draw(self.plan, self.noise)
        self.clipped_sum(session, self.drawn)
        return StepLoss(loss_sum=None, label_tokens=0, packed_tokens=0)


@pytest.mark.slow
def test_every_step_of_the_source_takes_a_poisson_draw(make_plan, samples_of) -> None:
    samples = samples_of([4] * UNITS, range(UNITS))
    adapter = SimpleNamespace(trainable_parameters=1, flat_grad=torch.zeros(1))
    session: Any = SimpleNamespace(adapter=adapter)

    def table(kind: type[Drawn]) -> np.ndarray:
        plan = make_plan(sampling_rate=Q)
        source = kind(samples, plan, NoiseSource(), seed=0, micro_batch=4)

        def step(number: int) -> list[int]:
            source(session, number)
            return source.last

        return draws(step)

    assert is_poisson(table(Drawn))
    with np.errstate(invalid="ignore"):
        assert not is_poisson(table(Everyone))
        assert not is_poisson(table(DrawnOnce))


def drawn_with_seeds_set(make_plan, samples_of, kind: type[Drawn]) -> list[list[int]]:
    """Who enters 30 steps, with every seed that a server can know set beforehand."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    adapter = SimpleNamespace(trainable_parameters=1, flat_grad=torch.zeros(1))
    session: Any = SimpleNamespace(adapter=adapter)
    plan = make_plan(sampling_rate=0.5)
    source = kind(samples_of([4] * UNITS, range(UNITS)), plan, NoiseSource(), seed=0, micro_batch=4)
    seen = []
    for step in range(30):
        source(session, step)
        seen.append(source.last)
    return seen


class PublicSeed(Drawn):
    """The mutant: Poisson draws, flawless but for their seed, which the server knows."""

    def __call__(self, session: Any, step: int) -> StepLoss:
        chosen = stream(0, "poisson", step).random(len(self.units)) < self.plan.sampling_rate
        self.clipped_sum(session, [self.units.members[i] for i in np.flatnonzero(chosen)])
        return StepLoss(loss_sum=None, label_tokens=0, packed_tokens=0)


class GlobalSeed(Drawn):
    """The mutant: torch's own generator."""

    def __call__(self, session: Any, step: int) -> StepLoss:
        chosen = torch.rand(len(self.units)).numpy() < self.plan.sampling_rate
        self.clipped_sum(session, [self.units.members[i] for i in np.flatnonzero(chosen)])
        return StepLoss(loss_sum=None, label_tokens=0, packed_tokens=0)


def test_the_draw_is_secret(make_plan, samples_of) -> None:
    """Amplification holds only against those who do not know who was drawn.

    Two sources with every seed alike agree on 1,200 fair coins with probability 2^-1200.
    """

    def repeats(kind: type[Drawn]) -> bool:
        first = drawn_with_seeds_set(make_plan, samples_of, kind)
        return first == drawn_with_seeds_set(make_plan, samples_of, kind)

    assert not repeats(Drawn)
    for mutant in (PublicSeed, GlobalSeed):
        assert repeats(mutant)
