"""How many processes serve the hospitals of a simulation: by GPUs, or by cores, memory and work."""

import torch

from common.choice import Choice
from common.config import IN_PROCESS, Config
from common.limits import available_cpus, available_memory_bytes
from common.model.adapter.layout import adapter_spec
from common.model.backbone.load import BackboneShape
from common.model.footprint import Footprint, count_parameters, training_footprint
from common.model.memory import RECOMPUTE
from common.model.session import DTYPES, choose_dtype
from common.privacy.mechanism.gradients import private_bytes
from common.privacy.settings import is_private, plan_of

WORKER_START_SECONDS = 5.0
"""Of a core: Ray's process, the libraries, the backbone (measured on an AMD EPYC of 2026)."""
_STEP_SECONDS, _FLOPS_PER_SECOND = 0.03, 5e10
"""Of one core: what a step takes at least, and its arithmetic."""
_PASSES = 6
"""Operations by parameter and token: forward, backward, and what is computed again."""


def training_footprints(
    config: Config, shape: BackboneShape, *, device: str, value_bytes: int
) -> dict[str, Footprint]:
    """Return the memory of one worker's training step for each choice of recomputation.

    Args:
        config: What is trained, and how.
        shape: The backbone's sizes.
        device: ``cpu`` or ``cuda``.
        value_bytes: 2 for bf16, 4 for fp32.
    """
    train, adapter = config.train, adapter_spec(config.adapter)
    counts = count_parameters(shape, adapter)
    trained = counts.of(adapter.scheme.held)
    momentum = train.optimizer == "sgd" and train.momentum
    return {
        choice: training_footprint(
            shape,
            adapter,
            batch_tokens=train.batch_size * train.max_length,
            value_bytes=value_bytes,
            recompute=choice,
            optimizer="sgd-momentum" if momentum else train.optimizer,
            device=device,
            private_bytes=private_bytes(train.batch_size, trained) if is_private(config) else 0,
            weights=config.model.weights,
        )
        for choice in RECOMPUTE
    }


def planned_recompute(requested: str, footprints: dict[str, Footprint], memory: int) -> Choice[str]:
    """Return what a worker is expected to recompute in so many bytes of memory."""
    if requested != "auto":
        return Choice(requested, "train.recompute")
    for choice in ("none", "mlp", "all"):
        if footprints[choice].total <= memory:
            return Choice(choice, "the fastest that fits")
    return Choice("all", "nothing fits; this needs the least")


def training_seconds(config: Config, shape: BackboneShape, steps: int) -> float:
    """Return about how long one core trains, to an order of magnitude; samples count as full.

    Args:
        config: What is trained, and how.
        shape: The backbone's sizes.
        steps: Of all hospitals together.
    """
    samples = plan_of(config).expected_batch if is_private(config) else config.train.batch_size
    tokens = samples * config.train.accumulation * config.train.max_length
    parameters = count_parameters(shape, adapter_spec(config.adapter)).backbone
    return steps * (_STEP_SECONDS + _PASSES * parameters * tokens / _FLOPS_PER_SECOND)


def worth_starting(seconds: float) -> int:
    """Return how many workers save more time than starting them takes.

    The n-th shortens the training from ``seconds / (n - 1)`` to ``seconds / n``.

    >>> worth_starting(2), worth_starting(20), worth_starting(200)
    (1, 2, 6)
    """
    number = 1
    while seconds / (number * (number + 1)) >= WORKER_START_SECONDS:
        number += 1
    return number


def choose_workers(
    config: Config, shape: BackboneShape, *, steps: int, memory_bytes: int | None = None
) -> Choice[int]:
    """Return how many Ray actors serve the hospitals; the result does not depend on it.

    Args:
        config: Complete configuration.
        shape: The backbone's sizes.
        steps: Of all hospitals together.
        memory_bytes: What all workers may take on a CPU; default what is available now.
    """
    if config.run.backend == IN_PROCESS:
        return Choice(1, "this process alone (run.backend)")
    if config.federation.workers:
        return Choice(config.federation.workers, "federation.workers")
    gpus, hospitals = torch.cuda.device_count(), config.federation.hospitals
    if gpus and config.train.device != "cpu":
        return Choice(min(gpus, hospitals), f"one per GPU ({gpus})")
    memory = available_memory_bytes() if memory_bytes is None else memory_bytes
    dtype = DTYPES[choose_dtype(config.train.dtype, torch.device("cpu")).value]
    footprints = training_footprints(config, shape, device="cpu", value_bytes=dtype.itemsize)
    each = footprints[planned_recompute(config.train.recompute, footprints, memory).value].total
    cpus = available_cpus()
    fit = max(1, min(cpus, hospitals, memory // each))
    why = f"{cpus} CPUs, {hospitals} hospitals, {each / 1e9:.1f} of {memory / 1e9:.1f} GB each"
    seconds = training_seconds(config, shape, steps)
    worth = worth_starting(seconds)
    if worth < fit:
        return Choice(worth, f"{why}; more would not pay for their start in {seconds:.0f} s")
    return Choice(fit, why)
