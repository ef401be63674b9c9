"""The private gradient source: what the training loop asks in place of a batch gradient.

A unit's gradient must be a function of that unit alone. Units share a packed pass only where it is
kept apart (``common.privacy.mechanism.isolation``), and have passes of their own anywhere else.

Shapes: U units of one micro-batch, P trainable parameters.
"""

from collections.abc import Iterator, Sequence
from itertools import chain, groupby

import torch
from torch import Tensor

from common.model.session import LENGTHS_APART, Session
from common.privacy.mechanism.clipping import clipped_sum
from common.privacy.mechanism.isolation import check_backbone, choose_passes
from common.privacy.mechanism.noise import NoiseSource
from common.privacy.mechanism.release import GaussianMechanism
from common.privacy.mechanism.sampling import Units, group_units
from common.privacy.plan import PrivacyPlan
from common.text.batches import Encoded, pack
from common.training.gradients import StepLoss, add_unit_gradients


class PrivateGradient:
    """Poisson-sampled, clipped, noised gradients.

    Every call makes one release of ``plan``; the caller has charged the ledger for it.
    """

    def __init__(
        self,
        dataset: Sequence[Encoded],
        plan: PrivacyPlan,
        noise: NoiseSource,
        *,
        seed: int,
        micro_batch: int,
    ) -> None:
        self.dataset, self.plan, self.noise = dataset, plan, noise
        self.units: Units = group_units([sample.unit for sample in dataset], plan, seed=seed)
        self.micro_batch = micro_batch
        self.mechanism: GaussianMechanism | None = None

    def __call__(self, session: Session, step: int) -> StepLoss:
        """Release one gradient into ``session.adapter.flat_grad``; tells no loss and no count."""
        mechanism = self.mechanism_for(session)
        sum_P = self.clipped_sum(session, self.units.draw(self.plan, self.noise), step=step)
        session.adapter.flat_grad.copy_(mechanism.release(sum_P))
        return StepLoss(loss_sum=None, label_tokens=0, packed_tokens=0)

    def mechanism_for(self, session: Session) -> GaussianMechanism:
        """Return the mechanism for as many values as the adapter's round trains."""
        parameters = session.adapter.trainable_parameters
        if self.mechanism is None or self.mechanism.parameters != parameters:
            self.mechanism = GaussianMechanism(self.plan, parameters, self.noise)
        return self.mechanism

    def clipped_sum(
        self, session: Session, drawn: Sequence[tuple[int, ...]], *, step: int = 0
    ) -> Tensor:
        """Return sum_u c_u G_u over the drawn units, [P] fp64.

        A unit's gradient is the mean of its samples' gradients. Units stand in order, so at most
        one of them spans two micro-batches, and only its partial sum is carried. A draw is no pass
        over the data: where drugs are shuffled, each step has its own order.
        """
        check_backbone(session.spec)
        way = choose_passes(session).value
        adapter = session.adapter
        sum_P = torch.zeros_like(adapter.flat, dtype=torch.float64)
        carried_P: Tensor | None = None
        lengths = LENGTHS_APART if way == "apart" and sum_P.device.type == "cpu" else None
        passes = self._micro_batches(drawn, step, alone=way == "alone", lengths=lengths)
        for batch in passes:
            places = [place for place, _ in groupby(place for place, _, _ in batch)]
            rows = [places.index(place) for place, _, _ in batch]
            gradients_UP = torch.zeros(len(places), adapter.flat.numel(), device=sum_P.device)
            if carried_P is not None:
                gradients_UP[0] = carried_P
            # Copied before the pass: behind it, a copy to a GPU would wait for it.
            counts_U1 = torch.tensor([[len(drawn[place])] for place in places], device=sum_P.device)
            packed = pack([sample for _, _, sample in batch])
            add_unit_gradients(session, packed, rows, gradients_UP, apart=way == "apart")
            last_place, last_index, _ = batch[-1]
            if last_index == drawn[last_place][-1]:
                carried_P = None
            else:
                carried_P = gradients_UP[-1].clone()
                gradients_UP, counts_U1 = gradients_UP[:-1], counts_U1[:-1]
            sum_P += clipped_sum(gradients_UP.div_(counts_U1), self.plan.clip_norm)
        return sum_P

    def _micro_batches(
        self, drawn: Sequence[tuple[int, ...]], step: int, *, alone: bool, lengths: int | None
    ) -> Iterator[list[tuple[int, int, Encoded]]]:
        """Yield (unit's place, sample index, sample) in order of units, a pass at a time.

        Args:
            drawn: Sample indices of each unit.
            step: Of the training: samples are as it sees them.
            alone: Whether every unit has passes of its own.
            lengths: Most lengths of samples in a pass; None: any number.
        """
        entries = [[(place, index) for index in members] for place, members in enumerate(drawn)]
        for group in entries if alone else [list(chain.from_iterable(entries))]:
            batch: list[tuple[int, int, Encoded]] = []
            seen: set[int] = set()
            for place, index in group:
                sample = self.dataset[index].in_epoch(step)
                seen.add(len(sample.input_ids))
                if len(batch) == self.micro_batch or len(seen) > (lengths or len(group)):
                    yield batch
                    batch, seen = [], {len(sample.input_ids)}
                batch.append((place, index, sample))
            if batch:
                yield batch


def private_bytes(units: int, parameters: int) -> int:
    """Return what a private step holds beyond a plain one: unit gradients, and their sum in fp64.

    >>> private_bytes(4, 2_621_440) / 2**20
    60.0
    """
    return 4 * parameters * (units + 2)
