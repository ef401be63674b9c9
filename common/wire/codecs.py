"""How tensors are written on the wire: exactly, or smaller with what was lost sent later.

- ``fp32``: as they are.
- ``bf16``: the upper 16 bits, rounded to nearest even, as an int16 view (numpy has no bf16).
- ``int8``: blocks of 256 values, each with one fp32 scale (the largest magnitude over 127). A
  tensor is one int8 array: its values, then the bytes of its scales.

With a lossy codec a hospital sends its change of the global tensors and not the tensors, and both
sides carry what rounding lost over to their next message (error feedback; Seide et al. 2014,
Karimireddy et al. 2019, arXiv 1901.09847), so that rounding loses nothing for good over
accepted messages. A reply that is lost or refused takes its update with it; what is carried over is
its rounding alone.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Tensors = dict[str, Array]

BLOCK = 256
_SCALE = np.dtype("<f4")


def is_lossy(codec: str) -> bool:
    """Return whether a codec rounds.

    >>> is_lossy("fp32"), is_lossy("int8")
    (False, True)
    """
    return codec != "fp32"


def wire_layout(codec: str, shape: tuple[int, ...]) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """Return dtype and shape that a tensor of ``shape`` has on the wire.

    >>> wire_layout("int8", (16, 32))
    (dtype('int8'), (520,))
    """
    if codec == "int8":
        size = math.prod(shape)
        return np.dtype("i1"), (size + _SCALE.itemsize * math.ceil(size / BLOCK),)
    return np.dtype({"fp32": "<f4", "bf16": "<i2"}[codec]), tuple(shape)


def encode(codec: str, value: Array) -> Array:
    """Write one finite fp32 tensor in the wire layout."""
    value = np.ascontiguousarray(value, dtype="<f4")
    if codec == "fp32":
        return value
    if codec == "bf16":
        bits = value.view("<u4")
        rounded = bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))
        return (rounded >> 16).astype("<u2").view("<i2")
    blocks = math.ceil(value.size / BLOCK)
    padded = np.zeros(blocks * BLOCK, dtype="<f4")
    padded[: value.size] = value.ravel()
    rows = padded.reshape(blocks, BLOCK)
    scales = (np.abs(rows).max(axis=1) / 127).astype(_SCALE)
    steps = np.where(scales > 0, scales, 1)
    levels = np.clip(np.rint(rows / steps[:, None]), -127, 127).astype("i1")
    return np.concatenate([levels.ravel()[: value.size], scales.view("i1")])


def decode(codec: str, wire: Array, shape: tuple[int, ...]) -> Array:
    """Read one tensor of ``shape`` (fp32) back from its wire layout."""
    if codec == "fp32":
        return wire
    if codec == "bf16":
        return (wire.view("<u2").astype("<u4") << 16).view("<f4")
    size = math.prod(shape)
    scales = np.frombuffer(wire[size:].tobytes(), dtype=_SCALE)
    each = np.repeat(scales, BLOCK)[:size]
    return (wire[:size].astype("<f4") * each).reshape(shape)


def compress(codec: str, tensors: Tensors, carried: Mapping[str, Array]) -> tuple[Tensors, Tensors]:
    """Write tensors with what earlier messages owe, and return what this one owes.

    Returns:
        The wire arrays, and the new debt (empty for ``fp32``).
    """
    if not is_lossy(codec):
        return {key: encode(codec, value) for key, value in tensors.items()}, {}
    owed = {key: value + carried.get(key, np.float32(0)) for key, value in tensors.items()}
    wire = {key: encode(codec, value) for key, value in owed.items()}
    left = {key: value - decode(codec, wire[key], value.shape) for key, value in owed.items()}
    return wire, left
