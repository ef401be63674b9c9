"""Parameters and memory of a training step by part, from shapes alone.

Every part is a formula over the shape but two, which were measured: what a process holds before
the backbone, and what the allocator loses to holes.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from common.errors import SettingError
from common.model.adapter.scheme import A, B
from common.model.adapter.spec import AdapterSpec, check_rank
from common.model.backbone.load import BackboneShape
from common.model.kernels.nf4 import NF4_BLOCK, NF4_SCALES
from common.model.memory import RECOMPUTE, saved_bytes_per_token_layer

# Resident before the backbone is loaded: interpreter and libraries; on a GPU its context.
_RUNTIME_BYTES = {"cpu": 410 * 2**20, "cuda": 700 * 2**20}
# A torch that is built for CUDA loads its libraries on a machine without a GPU too.
_CUDA_BUILD_BYTES = 280 * 2**20
# What the allocator loses between allocations. On the GPU a share of what comes and goes. On the
# CPU a multiple of a layer's working buffers, as far as glibc keeps freed ones in its heap (below
# 32 MiB; larger ones go back at once): measured on the embedded backbone over 512 to 4,096 tokens
# in bf16 with each choice of recomputation, and at 1,024 and 2,048 in fp32 with none and all. The
# peak of one and the same step varied by up to a quarter.
_GPU_HOLES = 0.005
_CPU_HOLES = 5
_LARGEST_KEPT_BYTES = 2**25
# Logits of one chunk of the loss, in fp32 (`common.training.loss`).
_CHUNK_BYTES = {"cpu": 2**26, "cuda": 2**29}
# Buffers of the MLP's and of the hidden width that live at the peak of the backward pass; on a GPU
# measured on Llama-3.1-8B's shape (benchmarks/results/gpu_paper_run.json).
_WORKING_BUFFERS = {"cpu": (4, 6), "cuda": (3, 4)}
_STATE_TENSORS = {"sgd": 0, "sgd-momentum": 1, "adamw": 2}


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Numbers of values."""

    backbone: int
    a: int
    b: int

    def of(self, parts: Iterable[str]) -> int:
        """Count the values of some of the adapter's matrices (``common.model.adapter.scheme``)."""
        return sum({A: self.a, B: self.b}[part] for part in parts)


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes at the peak of a training step."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    """What the forward pass keeps for the backward pass, and one layer computed again."""
    working: int
    """Buffers of the layer that is being computed."""
    logits: int
    runtime: int
    holes: int

    @property
    def total(self) -> int:
        """All parts."""
        return sum(vars(self).values())

    def as_dict(self) -> dict[str, int]:
        """Return the parts and their total, for JSON."""
        return {**vars(self), "total": self.total}


def count_parameters(shape: BackboneShape, adapter: AdapterSpec) -> Parameters:
    """Count the backbone's, A's and B's values.

    >>> from common.model.backbone.known_shapes import KNOWN_SHAPES
    >>> llama_8b = KNOWN_SHAPES["meta-llama/Llama-3.1-8B-Instruct"]
    >>> count_parameters(llama_8b, AdapterSpec(rank=32))
    Parameters(backbone=8030261248, a=8388608, b=5242880)
    """
    sizes = adapted_sizes(shape, adapter)
    layer = sum(wide * high for wide, high in sizes.values()) + 2 * shape.hidden
    embeddings = shape.vocabulary * shape.hidden * (1 if shape.tied else 2)
    targets = [sizes[name] for name in adapter.targets]
    return Parameters(
        backbone=shape.layers * layer + embeddings + shape.hidden,
        a=shape.layers * adapter.rank * sum(wide for wide, _ in targets),
        b=shape.layers * adapter.rank * sum(high for _, high in targets),
    )


def adapted_sizes(shape: BackboneShape, adapter: AdapterSpec) -> dict[str, tuple[int, int]]:
    """Return (input, output) width of each linear module of a layer.

    Raises:
        UserError: If a target is none of them, or too narrow for an orthonormal A.
    """
    sizes = _projections(shape)
    for name in adapter.targets:
        if name not in sizes:
            raise SettingError(
                f"adapter.targets: no layer has {name}",
                allowed=", ".join(sizes),
                fix="set adapter.targets",
            )
        check_rank(adapter, name, sizes[name][0])
    return sizes


def training_footprint(
    shape: BackboneShape,
    adapter: AdapterSpec,
    *,
    batch_tokens: int,
    value_bytes: int,
    recompute: str,
    optimizer: str,
    device: str,
    private_bytes: int = 0,
    weights: str = "bf16",
) -> Footprint:
    """Return the memory of a training step on a packed batch.

    Args:
        shape: The backbone's sizes.
        adapter: What is attached.
        batch_tokens: Packed tokens of one micro-batch.
        value_bytes: 2 for bf16, 4 for fp32.
        recompute: ``none``, ``mlp``, ``half`` or ``all``.
        optimizer: ``sgd``, ``sgd-momentum`` or ``adamw``.
        device: ``cpu`` or ``cuda``.
        private_bytes: What differential privacy holds beside the gradient.
        weights: ``bf16`` (in ``value_bytes``), ``fp8`` or ``nf4``.
    """
    counts = count_parameters(shape, adapter)
    held = counts.of(adapter.scheme.held)
    saved = {
        choice: batch_tokens
        * saved_bytes_per_token_layer(shape, adapter, value_bytes=value_bytes, recompute=choice)
        for choice in RECOMPUTE
    }
    # What is computed again is held for one layer at a time.
    again = {"none": 0.0, "mlp": saved["none"] - saved["mlp"]}
    activations = shape.layers * saved[recompute] + again.get(recompute, saved["none"])
    # Backward through the MLP: buffers of its width; norms, residual and projections.
    wide, narrow = _WORKING_BUFFERS[device]
    buffers = [batch_tokens * value_bytes * shape.intermediate] * wide
    buffers += [batch_tokens * value_bytes * shape.hidden] * narrow
    if weights == "nf4":  # the largest weight, dequantised for a product
        buffers.append(value_bytes * max(w * h for w, h in _projections(shape).values()))
    working = sum(buffers)
    # Hidden states at the labels, their gradient, and one chunk of logits.
    labelled = 3 * batch_tokens * shape.hidden * value_bytes
    logits = labelled + _CHUNK_BYTES[device] * value_bytes / 4
    if device == "cuda":
        holes = _GPU_HOLES * (activations + working)
        # The chunk is gone when the layers' backward begins.
        logits = max(0, logits - working)
    else:
        holes = _CPU_HOLES * sum(min(buffer, _LARGEST_KEPT_BYTES) for buffer in buffers)
    return Footprint(
        weights=weights_bytes(shape, adapter, value_bytes=value_bytes, weights=weights),
        adapter=4 * held + value_bytes * counts.of({A, B} - set(adapter.scheme.held)),
        gradients=4 * held + private_bytes,
        optimizer=4 * held * _STATE_TENSORS[optimizer],
        activations=int(activations),
        working=working,
        logits=int(logits),
        runtime=_runtime_bytes(device),
        holes=int(holes),
    )


def weights_bytes(
    shape: BackboneShape, adapter: AdapterSpec, *, value_bytes: int, weights: str
) -> int:
    """Return what the frozen backbone takes.

    Args:
        shape: The backbone's sizes.
        adapter: What is attached.
        value_bytes: 2 for bf16, 4 for fp32.
        weights: ``bf16`` (in ``value_bytes``); ``fp8``: a byte for each weight of a layer's
            projections, and a scale in fp32 for each of their outputs; ``nf4``: half a byte, and
            scales of blocks.
    """
    whole = count_parameters(shape, adapter).backbone * value_bytes
    if weights not in ("fp8", "nf4"):
        return whole
    smaller = 0
    for wide, high in _projections(shape).values():
        blocks = math.ceil(wide * high / NF4_BLOCK)
        nf4 = math.ceil(wide * high / 2) + blocks + 4 * math.ceil(blocks / NF4_SCALES)
        smaller += nf4 if weights == "nf4" else wide * high + 4 * high
    projections = sum(wide * high for wide, high in _projections(shape).values())
    return whole - shape.layers * (projections * value_bytes - smaller)


def generation_bytes(
    shape: BackboneShape,
    adapter: AdapterSpec,
    *,
    sequences: int,
    columns: int,
    value_bytes: int,
    device: str,
    weights: str = "bf16",
) -> int:
    """Return the memory of answering: weights, merged copies of the targets, and the cache.

    Args:
        shape: The backbone's sizes.
        adapter: What is folded into copies of its targets.
        sequences: Answers generated together.
        columns: Longest prompt and answer, in tokens.
        value_bytes: 2 for bf16, 4 for fp32.
        device: ``cpu`` or ``cuda``.
        weights: ``bf16`` (in ``value_bytes``), ``fp8`` or ``nf4``.
    """
    sizes = _projections(shape)
    copies = sum(wide * high for name, (wide, high) in sizes.items() if name in adapter.targets)
    cache = 2 * shape.kv_heads * shape.head_dim * sequences * columns
    frozen = weights_bytes(shape, adapter, value_bytes=value_bytes, weights=weights)
    return frozen + shape.layers * (copies + cache) * value_bytes + _runtime_bytes(device)


def _projections(shape: BackboneShape) -> dict[str, tuple[int, int]]:
    """(input, output) width of each linear module of a layer."""
    heads, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return {
        "q_proj": (shape.hidden, heads),
        "k_proj": (shape.hidden, keys),
        "v_proj": (shape.hidden, keys),
        "o_proj": (heads, shape.hidden),
        "gate_proj": (shape.hidden, shape.intermediate),
        "up_proj": (shape.hidden, shape.intermediate),
        "down_proj": (shape.intermediate, shape.hidden),
    }


def _runtime_bytes(device: str) -> int:
    built_for_cuda = torch.version.cuda is not None
    return _RUNTIME_BYTES[device] + _CUDA_BUILD_BYTES * (device == "cpu" and built_for_cuda)
