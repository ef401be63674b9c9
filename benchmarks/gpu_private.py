"""Private steps on a card, and what isolates their patients; for `gpu_paper_run.py`."""

import importlib.util
import time
from typing import Any

import numpy as np
import torch
from gpu_measure import patched, train_times
from torch import Tensor

from common.choice import Choice
from common.model.session import Session
from common.privacy.mechanism import gradients
from common.privacy.mechanism.noise import NoiseSource, Words
from common.privacy.plan import PrivacyPlan
from common.text.batches import Encoded, pack
from common.training.gradients import add_unit_gradients


class UnsecretWords:
    """In the place of a ``Keystream`` where its ciphers are not installed: as many words."""

    secret = False

    def __init__(self) -> None:
        self._draw = np.random.default_rng(0)

    def words(self, count: int) -> Words:
        """Return the next ``count`` uniform words."""
        return self._draw.integers(2**64, size=count, dtype=np.uint64)


class UnsecretNoise(NoiseSource):
    """Noise of ``UnsecretWords``: it takes its time and protects nobody."""

    def __init__(self) -> None:
        self.keystream: Any = UnsecretWords()


def private(session: Session, data: list[Encoded], steps: int, *, one_pass: bool) -> dict[str, Any]:
    """Time private steps in which everybody takes part, from the draw to the optimizer.

    With a pass for each patient, or with one that keeps them apart. ``noise_seconds`` are the
    host's for a step's noise by itself.
    """
    plan = PrivacyPlan(
        clip_norm=1.0,
        noise_multiplier=1.0,
        sampling_rate=1.0,
        steps=1000,
        expected_batch=len(data),
        max_admissions_per_patient=1,
        delta=1e-5,
    )
    ciphers = importlib.util.find_spec("cryptography") is not None
    noise = NoiseSource() if ciphers else UnsecretNoise()
    source = gradients.PrivateGradient(data, plan, noise, seed=0, micro_batch=len(data))
    way = Choice("apart" if one_pass else "alone", "to be measured")
    with patched(gradients, "choose_passes", lambda _session: way):
        found = train_times(session, data, steps, source)
    mechanism = source.mechanism_for(session)
    before = time.perf_counter()
    noise.gaussian(mechanism.parameters, mechanism.grid.std_steps)
    return {
        **found,
        "noise_seconds": time.perf_counter() - before,
        "noise_words": "AES-256-CTR" if ciphers else "numpy's: cryptography is not installed",
    }


def unit_gradients(session: Session, group: list[Encoded], *, apart: bool = True) -> Tensor:
    """Return the gradients of one pass, a row for each sample."""
    width = session.adapter.flat.numel()
    rows_UP = torch.zeros(len(group), width, device=session.torch_device)
    add_unit_gradients(session, pack(group), range(len(group)), rows_UP, apart=apart)
    return rows_UP


def isolation(session: Session, data: list[Encoded]) -> dict[str, float]:
    """Return how far a patient's gradient moves, relative to it, at the most of all patients.

    ``apart``: with others in one pass that keeps them apart, first in one order, then in the other.
    ``again``: when its own pass is repeated (kernels that add in any order). ``shared``: in a pass
    that does not keep them apart.
    """
    generator = torch.Generator(session.torch_device).manual_seed(2)
    session.adapter.flat.normal_(0.0, 0.01, generator=generator)
    alone = [unit_gradients(session, [sample])[0] for sample in data]

    def farthest(rows_UP: Tensor) -> float:
        pairs = zip(rows_UP, alone, strict=True)
        return max(float((row_P - own_P).norm() / own_P.norm()) for row_P, own_P in pairs)

    found = {
        "apart": farthest(unit_gradients(session, data)),
        "apart, turned": farthest(unit_gradients(session, data[::-1]).flip(0)),
        "again": farthest(torch.cat([unit_gradients(session, [sample]) for sample in data])),
        "shared": farthest(unit_gradients(session, data, apart=False)),
    }
    session.adapter.flat.zero_()
    return found
