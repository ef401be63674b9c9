"""Watching a hospital's private training from outside: what went in, what was drawn, what came out.

The loop under watch is the product's own and is changed in nothing: the watch stands between the
loop and the backbone (which patients' tokens pass), and between the source and its keystream
(which coins were tossed, which noise was handed out), and it copies B and the release after each
step. It holds records in memory only and is used on made-up patients.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.model.session import Session
from common.privacy.budget.guard import Guard
from common.privacy.budget.receipts import Receipt
from common.privacy.mechanism.noise import Integers, Keystream, NoiseSource
from common.tensor_files import Tensors
from common.text.batches import Encoded, PackedBatch
from common.training.loop import StepReport


class Toss(NamedTuple):
    """Coins that the secret source tossed at once."""

    probability: float
    outcome: np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(kw_only=True)
class Step:
    """What was seen of one step."""

    passes: list[PackedBatch] = field(default_factory=list)
    """What the backbone was shown, pass by pass."""
    mixed: int = 0
    """Most units that one pass held without keeping them apart."""
    tosses: list[Toss] = field(default_factory=list)
    """Coins of the secret source."""
    noise: list[Integers] = field(default_factory=list)
    """Integers that the secret source handed out, call by call."""
    before_P: Tensor = field(init=False)
    """B before the step."""
    release_P: Tensor = field(init=False)
    """The gradient that the optimizer was given."""
    charged: int = field(init=False)
    """Steps that the ledger held when the step was over."""

    @property
    def entered(self) -> set[int]:
        """The units whose records passed through the backbone."""
        return {unit for batch in self.passes for unit in batch.units}


@dataclass(kw_only=True)
class Watched:
    """One run of the loop, as it was seen."""

    units: tuple[int, ...]
    """The hospital's units, in the order in which the source keeps them."""
    steps: list[Step] = field(default_factory=list)
    sent: list[Tensors] = field(default_factory=list)
    """What each round hands out."""
    receipt: Receipt = field(init=False)
    """The hospital's receipt after the last round."""
    secret: bool = True
    """Whether every source said that its key comes from the operating system."""


@dataclass(kw_only=True)
class WatchedSession(Session):
    """A session that tells what passes through its backbone."""

    on_pass: Callable[[PackedBatch, bool], None]

    def hidden_states(self, batch: PackedBatch, *, apart: bool = False, **which: Any) -> Tensor:
        """Run the backbone, and tell."""
        self.on_pass(batch, apart)
        return super().hidden_states(batch, apart=apart, **which)


class WatchedNoise(NoiseSource):
    """A source that tells what it hands out; all of it comes from the source it stands for."""

    def __init__(self, source: NoiseSource, step: Step) -> None:
        self.source, self.step = source, step

    @property
    def keystream(self) -> Keystream:  # type: ignore[override]
        """The watched source's own."""
        return self.source.keystream

    def gaussian(self, count: int, std: float) -> Integers:
        """Hand out the source's integers, and keep a copy."""
        drawn = self.source.gaussian(count, std)
        self.step.noise.append(drawn.copy())
        return drawn

    def bernoulli(self, count: int, probability: float) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Hand out the source's coins, and keep a copy."""
        tossed = self.source.bernoulli(count, probability)
        self.step.tosses.append(Toss(probability, tossed.copy()))
        return tossed


class Watch:
    """Watches one hospital's rounds."""

    def __init__(self, session: Session, dataset: tuple[Encoded, ...]) -> None:
        values = {one.name: getattr(session, one.name) for one in fields(Session)}
        self.session = WatchedSession(**values, on_pass=self._on_pass)
        self.run = Watched(units=tuple(dict.fromkeys(sample.unit for sample in dataset)))
        self._guard: Guard | None = None
        self._now = Step()

    def over(self, guard: Guard) -> Guard:
        """Put the watch before a round's source; returns the same guard."""
        self.run.secret &= guard.source.noise.secret
        guard.source.noise = WatchedNoise(guard.source.noise, self._now)
        self._guard = guard
        return guard

    def starts(self) -> None:
        """Note B as a round begins; call it when the adapter is loaded."""
        self._now.before_P = self.session.adapter.flat.clone()

    def on_step(self, report: StepReport) -> None:
        """Close the record of a step."""
        assert self._guard is not None
        adapter = self.session.adapter
        self._now.release_P = adapter.flat_grad.detach().to("cpu", torch.float64)
        self._now.charged = self._guard.ledger.steps
        self.run.steps.append(self._now)
        self._now = Step()
        self._now.before_P = adapter.flat.clone()
        noise = self._guard.source.noise
        assert isinstance(noise, WatchedNoise)
        noise.step = self._now

    def _on_pass(self, batch: PackedBatch, apart: bool) -> None:
        self._now.passes.append(batch)
        self._now.mixed = max(self._now.mixed, 1 if apart else len(set(batch.units)))
