"""``fedrx plan``: parameters, memory against the card, bytes on the wire, steps; nothing is run.

From shapes alone: no weights are read, and data only where the number of steps depends on it.
"""

import math
from collections.abc import Collection
from functools import partial

import torch

from common.choice import Choice
from common.config import Config
from common.data.dataset import open_hospitals
from common.limits import total_memory_bytes
from common.model.adapter.layout import adapter_spec
from common.model.adapter.scheme import A, B
from common.model.backbone.known_shapes import shape_of
from common.model.backbone.load import BackboneShape
from common.model.footprint import (
    adapted_sizes,
    count_parameters,
    generation_bytes,
)
from common.model.session import choose_dtype, device_kind
from common.privacy.forecast import forecast
from common.privacy.settings import delta_note, is_private, plan_of, protects
from common.records.checks import (
    AdapterShape,
    MeasuredTime,
    Parameters,
    PlanRecord,
    Recomputation,
)
from common.training.budget import checkpoint_steps, steps_in_all, steps_of_round
from common.wire.codecs import wire_layout
from common.wire.cohort import asked, check_only
from server.strategies import check_strategy
from sim.checks.measured_cards import CARDS, seconds_per_step
from sim.flower.worker_count import choose_workers, planned_recompute, training_footprints

PAPER_CARD_BYTES = 48_000_000_000
"""RTX 6000 Ada, 48 GB: the paper's card."""
OWN_STEPS = "and as many of the hospital's own B, adapter.personal"
PARTS = {
    "weights": "the frozen backbone",
    "adapter": "the trained matrices in fp32, and the frozen A",
    "gradients": "of the trained matrices; with privacy of each patient apart",
    "optimizer": "its state: momentum, or adamw's two moments",
    "activations": "what the forward pass keeps for the backward pass",
    "working": "buffers of the layer that is being computed",
    "logits": "hidden states at the answers, and a chunk of scores of the vocabulary",
    "runtime": "Python, PyTorch and their libraries",
    "holes": "what the allocator cannot use",
    "total": "",
}


def plan(config: Config, *, card_bytes: int | None = None) -> PlanRecord:
    """Return what a run will need.

    Args:
        config: Complete configuration.
        card_bytes: Memory to fit into; default the GPU's that is here, else 48 GB; with
            ``train.device = "cpu"`` this machine's.

    Raises:
        UserError: If the backbone's shape or the data cannot be found, a value is not allowed, or
            several hospitals could not do this together.
    """
    shape, adapter = shape_of(config.model.backbone), adapter_spec(config.adapter)
    train, federation = config.train, config.federation
    device = "cpu" if device_kind(train.device) == "cpu" else "cuda"
    card = _card(card_bytes, device)
    dtype = _dtype(train.dtype, device)
    value_bytes = 2 if dtype.value == "bf16" else 4
    counts = count_parameters(shape, adapter)
    rounds = range(1, federation.rounds + 1)
    trained = max(counts.of(adapter.scheme.trained(number)) for number in rounds)
    footprints = training_footprints(config, shape, device=device, value_bytes=value_bytes)
    chosen = planned_recompute(train.recompute, footprints, card.value)
    peak = footprints[chosen.value]
    answering = generation_bytes(
        shape,
        adapter,
        sequences=config.evaluation.batch_size,
        # A prompt has half of the length at most.
        columns=train.max_length // 2 + config.evaluation.max_new_tokens,
        value_bytes=value_bytes,
        device=device,
        weights=config.model.weights,
    )
    samples = _train_samples(config)
    steps = steps_in_all(config, samples.value)
    workers = Choice(1, "one node, or one worker per GPU")
    if device == "cpu" and federation.hospitals > 1:
        steps_of_all = steps.value * federation.hospitals
        workers = choose_workers(config, shape, steps=steps_of_all, memory_bytes=card.value)
    # The answers come after the rounds, from one process.
    needed = max(workers.value * peak.total, answering)
    checkpoint_steps(config, steps.value)
    if federation.hospitals > 1:
        check_strategy(federation)
        check_only(federation)
        steps_of_round(config, samples.value, 1)
    found = PlanRecord(
        backbone=config.model.backbone,
        adapter=AdapterShape(mode=adapter.mode, rank=adapter.rank, targets=adapter.targets),
        parameters=Parameters(backbone=counts.backbone, a=counts.a, b=counts.b),
        batch_tokens=train.batch_size * train.max_length,
        device=device,
        dtype=dtype,
        recompute=Recomputation(
            value=chosen.value,
            reason=chosen.reason,
            total_bytes={choice: one.total for choice, one in footprints.items()},
        ),
        memory_bytes=peak.as_dict(),
        generation_bytes=answering,
        card_bytes=card.value,
        card=card.reason,
        workers=workers,
        fits=needed <= card.value,
        spare_bytes=card.value - needed,
        bytes_per_round=asked(federation) * exchange_bytes(config, shape),
        steps=steps.value * (1 + trains_own(config)),
        steps_reason="; ".join(
            filter(None, (steps.reason, OWN_STEPS * trains_own(config), samples.reason))
        ),
    )
    if device == "cuda":
        times = measured_times(config, shape, chosen.value, steps.value)
        found = found.model_copy(update={"measured": times})
    if not protects(config):
        return found
    outlook = forecast(plan_of(config), trained, target_epsilon=config.privacy.target_epsilon)
    outlook = outlook.model_copy(update={"delta_note": delta_note(config)})
    return found.model_copy(update={"privacy": outlook})


def measured_times(
    config: Config, shape: BackboneShape, recompute: str, steps: int
) -> tuple[MeasuredTime, ...]:
    """Return the time of a step, and of all steps, on cards that were measured.

    With a measured card at hand it alone. Samples count as full; a private step's are those that
    its plan expects. With a personal B, which is not private, its steps are in the hours.

    Args:
        config: Complete configuration.
        shape: The backbone's.
        recompute: As chosen.
        steps: Of one hospital, without those of a personal B.
    """
    train, here = config.train, torch.cuda.is_available() and torch.cuda.get_device_name(0)
    plain = float(train.batch_size * train.accumulation)
    samples = plan_of(config).expected_batch if is_private(config) else plain
    cards = [card for card in CARDS if card.name == here] or list(CARDS)
    times = []
    for card in cards:
        of_step = partial(
            seconds_per_step, card, shape, weights=config.model.weights, recompute=recompute
        )
        seconds = of_step(tokens=samples * train.max_length, private=is_private(config))
        own = of_step(tokens=plain * train.max_length, private=False)
        if seconds is not None:
            both = seconds + (own or 0.0) * trains_own(config)
            hours = steps * config.federation.hospitals * both / 3600
            times.append(
                MeasuredTime(
                    card=card.name, seconds_per_step=seconds, hours=hours, source=card.source
                )
            )
    return tuple(times)


def trains_own(config: Config) -> bool:
    """Return whether every hospital trains a B of its own beside; a single node does not."""
    return config.adapter.personal and config.federation.hospitals > 1


def exchange_bytes(config: Config, shape: BackboneShape) -> int:
    """Return the bytes of a round's tensors to one hospital and back, mean over the rounds."""
    scheme, rounds = adapter_spec(config.adapter).scheme, config.federation.rounds
    up = sum(message_bytes(config, shape, scheme.sends(n)) for n in range(1, rounds + 1))
    return message_bytes(config, shape, scheme.held) + round(up / rounds)


def message_bytes(config: Config, shape: BackboneShape, parts: Collection[str]) -> int:
    """Return the bytes of the tensors in one message, as ``federation.codec`` writes them."""
    adapter = adapter_spec(config.adapter)
    widths = [adapted_sizes(shape, adapter)[name] for name in adapter.targets]
    tensors = [(high, adapter.rank) for _, high in widths if B in parts]
    tensors += [(adapter.rank, wide) for wide, _ in widths if A in parts]
    layouts = [wire_layout(config.federation.codec, tensor) for tensor in tensors]
    return shape.layers * sum(dtype.itemsize * math.prod(wire) for dtype, wire in layouts)


def _card(asked: int | None, device: str) -> Choice[int]:
    if asked is not None:
        return Choice(asked, f"{asked / 1e9:.0f} GB")
    if device == "cpu":
        size = total_memory_bytes()
        return Choice(size, f"this machine's {size / 1e9:.0f} GB")
    if torch.cuda.is_available():
        size = torch.cuda.get_device_properties(0).total_memory
        return Choice(size, f"{torch.cuda.get_device_name(0)}, {size / 1e9:.0f} GB")
    return Choice(PAPER_CARD_BYTES, "a 48 GB card (none is here)")


def _dtype(requested: str, device: str) -> Choice[str]:
    if requested == "auto" and device == "cuda":
        return Choice("bf16", "GPUs that hold 8 B parameters compute in bf16")
    return choose_dtype(requested, torch.device(device))


def _train_samples(config: Config) -> Choice[int]:
    """Training samples of the largest hospital, where the steps depend on them."""
    if config.train.steps or not config.train.epochs:
        return Choice(0, "")
    if config.data.train_samples and config.data.path == "synthetic":
        samples = config.data.train_samples
        return Choice(samples, f"if there are {samples:,} training samples, as data.train-samples")
    samples = max(len(one.train) for one in open_hospitals(config).hospitals)
    return Choice(samples, f"{samples:,} training samples counted")
