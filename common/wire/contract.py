"""The wire contract: of the model B alone, and allow-listed scalars; both sides check.

A message to a hospital holds one ArrayRecord with the B matrices and one ConfigRecord of
allow-listed scalars. The reply holds one ArrayRecord with the same keys and one MetricRecord of
allow-listed scalars. A never travels: both sides draw it from its seed and compare fingerprints
in a ``query`` message before round 1.

Other adapter schemes than FA-LoRA hold more (``common.model.adapter.scheme``): then a message to a
hospital has all that the scheme holds, and a reply what its round sends, and no other key. "B"
stands for either below.
"""

import io
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from common.errors import FedrxError, RunFailed
from common.records.run import Direction, WireLine
from common.wire.codecs import decode, is_lossy, wire_layout
from common.wire.figures import fault_of, rounded
from common.wire.identity import NONCE, SIGNATURE

Tensors = dict[str, np.ndarray[Any, Any]]
Shapes = Mapping[str, tuple[int, ...]]

ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"

TO_HOSPITAL = frozenset({"round"})
TRAIN_REPLY = frozenset({"round", "weight", "train-loss", "steps", "seconds"})
EVALUATE_REPLY = frozenset({"round", "weight", "loss"})
FIGURES = frozenset({"train-loss", "loss", "seconds"})
"""What a hospital measures: it travels rounded (``common.wire.figures``)."""
PRIVATE_TRAIN_REPLY = frozenset({"round", "weight", "steps"})
"""With privacy on: the weight is a constant, and steps are those that the ledger has charged."""
PUBLIC_WEIGHT = 1.0
"""With privacy on a hospital's number of samples is private, so all hospitals weigh the same."""
_HANDSHAKE = frozenset(
    {
        *("hospital", "of", "a-sha256", "backbone-sha256", "source-sha256"),
        *("device", "dtype", "dtype-reason", "attention", "attention-reason"),
    }
)
HANDSHAKE_REPLY = _HANDSHAKE | {"patients", "samples", "train-samples", "validation-samples"}
PRIVATE_HANDSHAKE_REPLY = _HANDSHAKE | {"privacy-plan-sha256"}
"""With privacy on no count leaves a hospital; what is compared is the plan."""
LARGEST_B = 1e9
"""No training moves a value of B so far; sums of such values and their squares stay finite."""
LARGEST_SCALAR = 1e15
"""Sums and products of such numbers stay finite."""
_SERIALISATION = "numpy.ndarray"
"""Flower's name for the .npy format, the only one that is read."""
_LONGEST_HEADER_BYTES = 256


LONGEST_QUOTE, LONGEST_REASON = 100, 300
"""Characters of foreign text that reach a log; of a reason Flower's own frame takes 100."""
_SIGNED = frozenset({NONCE, SIGNATURE})
_SCALARS = (
    TO_HOSPITAL | TRAIN_REPLY | EVALUATE_REPLY | HANDSHAKE_REPLY | PRIVATE_HANDSHAKE_REPLY | _SIGNED
)


class ContractError(FedrxError):
    """A message that breaks the wire contract; the text says how, never any value of it."""


@dataclass(frozen=True, kw_only=True)
class Fingerprints:
    """What must be equal on all sides before anything is trained (sha256, hexadecimal)."""

    a: str
    backbone: str
    source: str

    def check(self, hospital: str, theirs: "Fingerprints") -> None:
        """Compare with a hospital's.

        Raises:
            RunFailed: naming the hospital, what differs, and both values.
        """
        for name, ours in asdict(self).items():
            value = asdict(theirs)[name]
            if value != ours:
                raise RunFailed(
                    f"{hospital}: {name} fingerprint differs: server {ours}, {hospital} {value}; "
                    "fix: give both sides the same FedRx version, backbone, prompts and adapter "
                    "settings"
                )


def to_record(wire: Tensors) -> ArrayRecord:
    """Pack arrays in their wire layout (``common.wire.codecs``), keys sorted."""
    return ArrayRecord({key: Array(np.ascontiguousarray(wire[key])) for key in sorted(wire)})


def check_arrays(record: ArrayRecord, shapes: Shapes, codec: str = "fp32") -> Tensors:
    """Unpack an ArrayRecord that must hold exactly the keys of ``shapes``.

    Returns:
        The matrices in fp32.

    Raises:
        ContractError: for an unknown or missing key, a key that is not a B, a wrong shape or
            dtype, NaN or infinity.
    """
    for key in record:
        if key not in shapes:
            kind = "is not a B matrix" if not key.endswith("lora_B") else "is unknown"
            raise ContractError(f"key {shortened(key)!r} {kind}")
    missing = sorted(set(shapes) - set(record))
    if missing:
        raise ContractError(f"key {missing[0]!r} is missing ({len(missing)} in all)")
    tensors: Tensors = {}
    for key, shape in shapes.items():
        array, (dtype, layout) = record[key], wire_layout(codec, shape)
        if array.dtype != dtype.name:
            raise ContractError(f"{key}: dtype {shortened(array.dtype)}, expected {dtype.name}")
        if tuple(array.shape) != layout:
            found = shortened(str(tuple(array.shape)))
            raise ContractError(f"{key}: shape {found}, expected {layout}")
        try:
            value = _unpacked(array, dtype, layout)
        except ContractError as error:
            raise ContractError(f"{key}: {error}") from None
        tensors[key] = _finite(key, decode(codec, value, shape))
    return tensors


def _unpacked(array: Array, dtype: np.dtype[Any], layout: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Read an array's .npy data without allocating anything that its header asks for."""
    size = dtype.itemsize * math.prod(layout)
    head = len(array.data) - size
    if array.stype != _SERIALISATION or not array.data.startswith(np.lib.format.MAGIC_PREFIX):
        raise ContractError("its data cannot be read")
    if not 0 < head <= _LONGEST_HEADER_BYTES:
        raise ContractError(f"its data is not {dtype.name} of shape {layout}")
    header = io.BytesIO(array.data[:head])
    try:
        np.lib.format.read_magic(header)
        found = np.lib.format.read_array_header_1_0(header)
    except Exception:  # the header is a Python literal: broken ones fail in many ways
        raise ContractError("its data cannot be read") from None
    if found != (layout, False, dtype) or header.tell() != head:
        raise ContractError(f"its data is not {dtype.name} of shape {layout}")
    return np.frombuffer(array.data, dtype=dtype, offset=head).reshape(layout).copy()


def _finite(key: str, value: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if not np.isfinite(value).all():
        raise ContractError(f"{key}: holds NaN or infinity")
    if value.size and np.abs(value).max() > LARGEST_B:
        raise ContractError(f"{key}: holds a value beyond {LARGEST_B:g}")
    return value


def only_record(content: RecordDict, kind: str) -> Any:
    """Return the single record of one kind (``array``, ``metric`` or ``config``).

    Raises:
        ContractError: if there is none or more than one.
    """
    records = list(getattr(content, f"{kind}_records").values())
    if len(records) != 1:
        raise ContractError(f"{len(records)} {kind} records, expected 1")
    return records[0]


def check_scalars(record: Mapping[str, Any], allowed: frozenset[str]) -> dict[str, Any]:
    """Return a record's values if its keys are exactly ``allowed`` and its numbers are small.

    Raises:
        ContractError: naming the key.
    """
    unknown, missing = sorted(set(record) - allowed), sorted(allowed - set(record))
    if unknown or missing:
        if unknown:
            raise ContractError(f"scalar {shortened(unknown[0])!r} is not allowed")
        raise ContractError(f"no scalar {missing[0]!r}")
    for key, value in record.items():
        if not isinstance(value, str | int | float):
            raise ContractError(f"scalar {key!r} is not a scalar")
        if isinstance(value, float) and not math.isfinite(value):
            raise ContractError(f"scalar {key!r} is not finite")
        if isinstance(value, int | float) and abs(value) > LARGEST_SCALAR:
            raise ContractError(f"scalar {key!r} is beyond {LARGEST_SCALAR:g}")
    return dict(record)


@dataclass(frozen=True, kw_only=True)
class Update:
    """One hospital's checked reply to a train message."""

    hospital: str
    b: Tensors
    weight: float
    metrics: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Due:
    """What the scalars of an honest train reply are known to be, without privacy."""

    weight: float
    """The training samples that the hospital told in its handshake."""
    steps: int
    """What it was asked for."""


def train_message(wire: Tensors, *, server_round: int) -> RecordDict:
    """Build the content of a train or evaluate message from the B matrices' wire arrays."""
    return RecordDict({ARRAYS: to_record(wire), CONFIG: ConfigRecord({"round": server_round})})


def read_message(content: RecordDict, shapes: Shapes, codec: str = "fp32") -> tuple[Tensors, int]:
    """Check what the server sent, on the hospital's side.

    Returns:
        The B matrices (fp32) and the round.

    Raises:
        ContractError: if anything but B and the allow-listed scalars is inside.
    """
    _check_kinds(content, arrays=True, metrics=False, configs=True)
    scalars = check_scalars(only_record(content, "config"), TO_HOSPITAL)
    b = check_arrays(only_record(content, "array"), shapes, codec)
    if type(scalars["round"]) is not int:
        raise ContractError("scalar 'round' is not an integer")
    return b, scalars["round"]


def train_reply(
    wire: Tensors, metrics: Mapping[str, float], *, private: bool = False
) -> RecordDict:
    """Build the content of a reply to a train message from wire arrays."""
    allowed = PRIVATE_TRAIN_REPLY if private else TRAIN_REPLY
    return RecordDict({ARRAYS: to_record(wire), METRICS: _metric_record(metrics, allowed)})


def evaluate_reply(metrics: Mapping[str, float]) -> RecordDict:
    """Build the content of a reply to an evaluate message: scalars only."""
    return RecordDict({METRICS: _metric_record(metrics, EVALUATE_REPLY)})


def _metric_record(metrics: Mapping[str, float], allowed: frozenset[str]) -> MetricRecord:
    scalars = check_scalars(metrics, allowed)
    return MetricRecord(
        {key: rounded(value) if key in FIGURES else value for key, value in scalars.items()}
    )


def read_train_reply(
    content: RecordDict,
    shapes: Shapes,
    *,
    hospital: str,
    server_round: int,
    charged: tuple[int, int] | None = None,
    due: Due | None = None,
    codec: str = "fp32",
    base: Tensors | None = None,
) -> Update:
    """Check a hospital's reply, on the server's side.

    With privacy the weight is 1 and the steps are within ``charged``, what the hospital's ledger
    may show; without it both are what was ``due``. With a lossy codec a change of ``base`` came.

    Raises:
        ContractError: for anything but this round's B, allow-listed finite scalars, a weight that
            is a finite positive number, figures that are rounded, and what was due.
    """
    _check_kinds(content, arrays=True, metrics=True, configs=False)
    allowed = TRAIN_REPLY if charged is None else PRIVATE_TRAIN_REPLY
    metrics = _checked_metrics(content, allowed, server_round)
    if charged is not None:
        _check_private(metrics, *charged)
    if due is not None:
        _check_due(metrics, due)
    b = check_arrays(only_record(content, "array"), shapes, codec)
    if is_lossy(codec) and base is not None:
        b = {key: _finite(key, base[key] + change) for key, change in b.items()}
    return Update(hospital=hospital, b=b, weight=metrics["weight"], metrics=metrics)


def read_evaluate_reply(
    content: RecordDict, *, server_round: int, most_tokens: int
) -> dict[str, float]:
    """Check a hospital's reply to an evaluate message.

    Raises:
        ContractError: as for ``read_train_reply``; arrays are not allowed at all.
    """
    _check_kinds(content, arrays=False, metrics=True, configs=False)
    metrics = _checked_metrics(content, EVALUATE_REPLY, server_round)
    weight = metrics["weight"]
    if weight > most_tokens or weight != int(weight):
        raise ContractError(f"weight is not a whole number of tokens up to {most_tokens}")
    return metrics


def shortened(text: str, limit: int = LONGEST_QUOTE) -> str:
    r"""Return a foreign text as one printable line of at most so many characters.

    >>> shortened("two\n\x1blines"), len(shortened("x" * 1_000_000))
    ('two lines', 100)
    """
    printable = "".join(c if c.isprintable() else " " for c in text[: 2 * limit])
    line = " ".join(printable.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def describe(
    message: Message,
    tensors: Collection[str],
    *,
    direction: Direction,
    hospital: str,
    server_round: int,
    kind: str,
) -> WireLine:
    """Return what wire.jsonl records of a message: tensor names, scalar names and bytes.

    What arrives is not checked yet: of names that no message has, only the number is told.
    """
    content = message.content
    arrays = list(content.array_records.values())
    scalars = [*content.metric_records.values(), *content.config_records.values()]
    names = [key for record in arrays for key in record]
    labels = [key for record in scalars for key in record]
    unknown = sum(name not in tensors for name in names)
    unknown += sum(label not in _SCALARS for label in labels)
    return WireLine(
        direction=direction,
        hospital=hospital,
        round=server_round,
        kind=kind,
        tensors=tuple(sorted(name for name in names if name in tensors)),
        scalars=tuple(sorted(label for label in labels if label in _SCALARS)),
        unknown=unknown or None,
        bytes=sum(len(array.data) for record in arrays for array in record.values()),
    )


def _check_kinds(content: RecordDict, *, arrays: bool, metrics: bool, configs: bool) -> None:
    expected = {"array": arrays, "metric": metrics, "config": configs}
    for kind, wanted in expected.items():
        count = len(getattr(content, f"{kind}_records"))
        if count != int(wanted):
            raise ContractError(f"{count} {kind} records, expected {int(wanted)}")


def _checked_metrics(
    content: RecordDict, allowed: frozenset[str], server_round: int
) -> dict[str, float]:
    """Return a reply's scalars: floats alone, and what was measured as precisely as is shown."""
    metrics = check_scalars(only_record(content, "metric"), allowed)
    for key, value in metrics.items():
        fault = "is not a float" if type(value) is not float else ""
        if key in FIGURES:
            fault = fault or fault_of(value)
        if fault:
            raise ContractError(f"scalar {key!r} {fault}")
    if metrics["round"] != server_round:
        raise ContractError(f"answers round {metrics['round']}, expected {server_round}")
    if not metrics["weight"] > 0:
        raise ContractError("weight is not a finite positive number")
    return metrics


def _check_due(metrics: Mapping[str, float], due: Due) -> None:
    if metrics["weight"] != due.weight:
        raise ContractError(f"weight is not {due.weight:g}, the training samples that it told")
    if metrics["steps"] != due.steps:
        raise ContractError(f"steps are not the {due.steps} that it was asked for")


def _check_private(metrics: Mapping[str, float], least: int, most: int) -> None:
    if metrics["weight"] != PUBLIC_WEIGHT:
        raise ContractError(f"weight is not {PUBLIC_WEIGHT:g}: with privacy on all weigh the same")
    steps = metrics["steps"]
    if isinstance(steps, bool) or not least <= steps <= most or steps != int(steps):
        raise ContractError(
            f"steps charged are not a whole number from {least} to {most}: "
            "its ledger has lost entries, or belongs to another run"
        )
