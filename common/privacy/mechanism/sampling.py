"""Who takes part in a step: Poisson sampling of privacy units."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from common.privacy.mechanism.noise import NoiseSource
from common.privacy.plan import PrivacyPlan
from common.seeds import stream


@dataclass(frozen=True)
class Units:
    """A hospital's training samples, grouped into privacy units."""

    members: tuple[tuple[int, ...], ...]
    """For each unit, the indices of its samples."""

    def __len__(self) -> int:
        return len(self.members)

    def draw(self, plan: PrivacyPlan, noise: NoiseSource) -> list[tuple[int, ...]]:
        """Draw one step's units: each independently with the plan's sampling rate.

        The draw comes from the secret source: amplification by sampling holds only against those
        who do not know who was drawn, and an experiment's seed is known to the server.

        Returns:
            The sample indices of every unit drawn; empty is a valid draw.
        """
        chosen = noise.bernoulli(len(self.members), plan.sampling_rate)
        return [self.members[index] for index in np.flatnonzero(chosen)]


def group_units(patients: Sequence[Hashable], plan: PrivacyPlan, *, seed: int) -> Units:
    """Group samples into units.

    For the patient as unit, a patient with more than ``max_admissions_per_patient`` samples keeps
    a seeded choice of them, which depends on that patient's own number of samples alone. Order:
    first appearance.

    ``seed`` is of the choice among a patient's admissions.

    >>> plan = PrivacyPlan(clip_norm=1.0, noise_multiplier=None, sampling_rate=0.1, steps=1,
    ...     expected_batch=1, max_admissions_per_patient=2, delta=1e-5)
    >>> group_units(["a", "b", "a"], plan, seed=0).members
    ((0, 2), (1,))
    """
    if plan.unit == "admission":
        return Units(tuple((index,) for index in range(len(patients))))
    grouped: dict[Hashable, list[int]] = {}
    for index, patient in enumerate(patients):
        grouped.setdefault(patient, []).append(index)
    most = plan.max_admissions_per_patient
    return Units(tuple(_choose(members, most, seed) for members in grouped.values()))


def _choose(members: list[int], most: int, seed: int) -> tuple[int, ...]:
    if not 0 < most < len(members):
        return tuple(members)
    generator = stream(seed, "privacy", "admissions", len(members))
    kept = generator.choice(len(members), size=most, replace=False)
    return tuple(members[position] for position in sorted(kept.tolist()))
