"""summary.json of a run that trains."""

from collections.abc import Collection
from typing import Any, Self

from pydantic import ConfigDict

from common.choice import Choice
from common.records import OpenRecord, PartialRecord, Record
from common.records.judged import Judged, Reviewed
from common.records.privacy import Privacy
from common.records.run import Mode, Settings


class AdapterFacts(Record):
    """What was trained."""

    mode: str
    rank: int
    alpha: float
    targets: tuple[str, ...]


class BackboneFacts(Record):
    """What it was trained on."""

    name: str
    fingerprint: str = ""


class HospitalFacts(Record):
    """One hospital; with privacy on none tells its size."""

    name: str
    patients: int | None = None
    samples: int | None = None


class WireTotals(Record):
    """All messages of a run together."""

    tensors: tuple[str, ...]
    bytes_up: int
    bytes_down: int


class KernelFacts(Record):
    """The attention kernel, and why this one."""

    kernel: str
    reason: str


class Scaling(Record):
    """How a single run's steps fit the samples that are there, in figures and in words.

    With privacy on no number of samples is told, nor what follows from it.
    """

    train_samples: int | None
    steps: int
    steps_per_epoch: int | None
    epochs: float | None
    checkpoint_steps: tuple[int, ...]
    notes: tuple[str, ...]


class CheckpointFacts(Record):
    """One checkpoint of a single run."""

    name: str
    step: int
    b_sha256: str
    b_norm: float
    seconds: float
    validation_loss: float | None


class Readings(Record):
    """What the paper's table shows of one model's answers."""

    output_rate: float | None = None
    accuracy_over_predicted: float | None = None
    accuracy_over_true: float | None = None
    f1: float | None = None
    jaccard: float | None = None


class Estimate(Record):
    """A figure with its interval, where it has one."""

    value: float | None
    low: float | None
    high: float | None


class OfHospital(OpenRecord):
    """One model's answers on the admissions of one hospital."""

    samples: int
    f1: float | None


class Figures(Readings):
    """The answers of one model on held-out admissions; further figures stay as they are."""

    model_config = ConfigDict(extra="allow")

    level: str = ""
    samples: int = 0
    patients: int = 0
    precision: float | None = None
    recall: float | None = None
    length_ratio: float | None = None
    oov_rate: float | None = None
    intervals: dict[str, tuple[float | None, float | None]] = {}
    by_hospital: dict[str, OfHospital] = {}
    prauc: Estimate | None = None

    def interval(self, name: str) -> tuple[float, float] | None:
        """Return the interval of a figure, where there is one."""
        low, high = self.intervals.get(name, (None, None))
        return None if low is None or high is None else (low, high)


class PublicCurve(Record):
    """The loss of a run's checkpoints on made-up admissions that no hospital has."""

    samples: int
    seed: int
    """Of the synthetic source."""
    unit: str
    """What checkpoints count: ``round`` or ``step``."""
    losses: tuple[tuple[int, float], ...]
    """Rounds (or steps) and mean cross-entropy per answer token, in nats."""


class Evaluated(OpenRecord):
    """How the answers came about; ``common.evaluation.answers_file`` knows all of it."""

    samples: int = 0
    constrained: bool = False
    settings: Settings = {}
    dropped_diagnoses: int = 0
    left_out: dict[str, int] | None = None
    generation: dict[str, object] = {}
    checkpoint: str = ""
    device: str = ""
    dtype: str = ""
    answers_sha256: str | None = None


class Summary(PartialRecord):
    """summary.json of a run that trains; what a kind of run does not have is not in its file."""

    mode: Mode | None = None
    trainable_parameters: int = 0
    adapter: AdapterFacts | None = None
    backbone: BackboneFacts | None = None
    hospitals: tuple[HospitalFacts, ...] = ()
    rounds: int = 0
    privacy: Privacy | None = None
    scaling: Scaling | None = None
    checkpoints: tuple[CheckpointFacts, ...] = ()
    b_sha256: str = ""
    """Empty until all training is done and summed up."""
    wire: WireTotals | None = None
    overhead_seconds_per_hospital_round: float | None = None
    backbone_loads: int = 0
    workers: int = 0
    validation_loss: tuple[float | None, ...] = ()
    public_validation: PublicCurve | None = None
    seconds: float = 0.0
    training_seconds: float | None = None
    tokens_per_second: float | None = None
    """Packed tokens that one worker trains on in a second of its own; None where it is not told."""
    start_seconds: dict[str, float] = {}
    """Of a federation on Ray: by phase, until the first message to train."""
    peak_rss_bytes: int = 0
    peak_device_bytes: int | None = None
    device: str = ""
    attention: KernelFacts | None = None
    dtype: Choice[str] | None = None
    source: str = ""
    metrics: dict[str, Figures] = {}
    """By model: ``fedrx``, an earlier checkpoint, the untrained backbone, the baselines."""
    evaluation: Evaluated | None = None
    judge: Judged | None = None
    review: Reviewed | None = None

    def having(self, **values: Any) -> Self:
        """Return the summary with these values in the place of its own."""
        return type(self).model_validate({**self.as_json(), **values})

    def without(self, keys: Collection[str]) -> Self:
        """Return the summary without some of its keys."""
        return type(self).model_validate({k: v for k, v in self.as_json().items() if k not in keys})
