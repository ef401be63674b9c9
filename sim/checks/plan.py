"""``fedrx plan``: parameters, memory against the card, bytes on the wire, steps; nothing is run.

From shapes alone: no weights are read, and data only where the number of steps depends on it.
"""

import math
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from common.choice import Choice
from common.config import Config, FederationConfig
from common.data.dataset import open_hospitals
from common.limits import total_memory_bytes
from common.model.adapter.layout import adapter_spec
from common.model.backbone.known_shapes import shape_of
from common.model.backbone.load import BackboneShape
from common.model.footprint import (
    adapted_sizes,
    count_parameters,
    generation_bytes,
)
from common.model.session import choose_dtype, device_kind
from common.privacy.forecast import forecast, lines
from common.privacy.settings import delta_note, plan_of, protects
from common.training.budget import checkpoint_steps, steps_in_all, steps_of_round
from common.wire.codecs import wire_layout
from common.wire.cohort import check_only, sampled
from server.strategies import check_strategy
from sim.flower.worker_count import choose_workers, planned_recompute, training_footprints

PAPER_CARD_BYTES = 48_000_000_000
"""RTX 6000 Ada, 48 GB: the paper's card."""


def plan(config: Config, *, card_bytes: int | None = None) -> dict[str, Any]:
    """Return what a run will need.

    Args:
        config: Complete configuration.
        card_bytes: Memory to fit into; default the GPU's that is here, else 48 GB; with
            ``train.device = "cpu"`` this machine's.

    Returns:
        ``parameters`` {backbone, a, b}, ``memory_bytes`` by part with ``total`` (the peak of a
        training step of one worker with the chosen recomputation), ``workers`` {value, reason}
        (more than one only on a CPU, where they share the memory), ``recompute`` {value, reason,
        total_bytes of each choice}, ``generation_bytes``, ``card_bytes``, ``fits``,
        ``spare_bytes``, ``bytes_per_round`` (of training: down and up again, all hospitals that
        are asked),
        ``steps`` (of one hospital, in all) and, with privacy, ``privacy``.

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
    trained = counts.b + (counts.a if adapter.mode == "lora" else 0)
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
    workers = Choice(1, "one node, or one worker per GPU")
    if device == "cpu" and federation.hospitals > 1:
        workers = choose_workers(config, shape, memory_bytes=card.value)
    # The answers come after the rounds, from one process.
    needed = max(workers.value * peak.total, answering)
    samples = _train_samples(config)
    steps = steps_in_all(config, samples.value)
    checkpoint_steps(config, steps.value)
    if federation.hospitals > 1:
        check_strategy(federation)
        check_only(federation)
        steps_of_round(config, samples.value, 1)
    found = {
        "backbone": config.model.backbone,
        "adapter": {"mode": adapter.mode, "rank": adapter.rank, "targets": list(adapter.targets)},
        "parameters": {"backbone": counts.backbone, "a": counts.a, "b": counts.b},
        "batch_tokens": train.batch_size * train.max_length,
        "device": device,
        "dtype": dtype.as_dict(),
        "recompute": {
            **chosen.as_dict(),
            "total_bytes": {choice: one.total for choice, one in footprints.items()},
        },
        "memory_bytes": peak.as_dict(),
        "generation_bytes": answering,
        "card_bytes": card.value,
        "card": card.reason,
        "workers": workers.as_dict(),
        "fits": needed <= card.value,
        "spare_bytes": card.value - needed,
        "bytes_per_round": 2 * asked_hospitals(federation) * message_bytes(config, shape),
        "steps": steps.value,
        "steps_reason": f"{steps.reason}; {samples.reason}" if samples.reason else steps.reason,
    }
    if protects(config):
        target = config.privacy.target_epsilon
        outlook = forecast(plan_of(config), trained, target_epsilon=target)
        found["privacy"] = outlook | {"delta_note": delta_note(config)}
    return found


def asked_hospitals(federation: FederationConfig) -> int:
    """Return how many hospitals a round asks: a share of them, rounded up, or the one named."""
    return 1 if federation.only else sampled(federation.fraction, federation.hospitals)


def message_bytes(config: Config, shape: BackboneShape) -> int:
    """Return the bytes of the tensors in one message, as ``federation.codec`` writes them."""
    adapter = adapter_spec(config.adapter)
    sizes = adapted_sizes(shape, adapter)
    tensors = [(sizes[name][1], adapter.rank) for name in adapter.targets]
    if adapter.mode == "lora":
        tensors += [(adapter.rank, sizes[name][0]) for name in adapter.targets]
    layouts = [wire_layout(config.federation.codec, tensor) for tensor in tensors]
    return shape.layers * sum(dtype.itemsize * math.prod(wire) for dtype, wire in layouts)


def show_plan(console: Console, found: dict[str, Any]) -> None:
    """Print a plan as people read it."""
    counts, parts = found["parameters"], found["memory_bytes"]
    console.print(
        f"{found['backbone']}: {counts['backbone']:,} parameters; A {counts['a']:,} (frozen), "
        f"B {counts['b']:,}",
        highlight=False,
        markup=False,
    )
    table = Table(
        title=f"memory of one worker at the peak of a step of {found['batch_tokens']:,} tokens"
    )
    table.add_column("part")
    table.add_column("GB", justify="right")
    for name, size in parts.items():
        table.add_row(name, f"{size / 1e9:.2f}", end_section=name == "holes")
    console.print(table)
    totals = ", ".join(
        f"{choice} {size / 1e9:.1f}" for choice, size in found["recompute"]["total_bytes"].items()
    )
    chosen = found["recompute"]
    console.print(f"recompute {chosen['value']} ({chosen['reason']}); GB by choice: {totals}")
    workers = found["workers"]
    if workers["value"] > 1:
        together = workers["value"] * parts["total"] / 1e9
        console.print(
            f"{workers['value']} workers ({workers['reason']}): {together:.1f} GB together",
            highlight=False,
        )
    verdict = "fits" if found["fits"] else "does not fit"
    console.print(
        f"{verdict} {found['card']}: {found['spare_bytes'] / 1e9:+.1f} GB to spare; answering "
        f"takes {found['generation_bytes'] / 1e9:.1f} GB",
        style="green" if found["fits"] else "red",
        highlight=False,
    )
    console.print(
        f"{found['steps']:,} steps ({found['steps_reason']}); "
        f"{found['bytes_per_round'] / 1e6:.1f} MB on the wire to train a round, up and down "
        "(validation sends B down once more)",
        highlight=False,
    )
    if "privacy" in found:
        for line in (*lines(found["privacy"]), found["privacy"]["delta_note"]):
            console.print(line, highlight=False, markup=False)


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
