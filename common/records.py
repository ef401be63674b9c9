"""Records: what the JSON files of a run hold, each kind as one pydantic model.

A file keeps its keys; what reads it back gets a typed value or one clear line. The version of all
of them is that of the run directory (``run.json``).
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from common.errors import UserError


class Record(BaseModel):
    """One kind of record: frozen, and no key more than it declares."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, ser_json_inf_nan="constants"
    )

    absent_when_none: ClassVar[tuple[str, ...]] = ()
    """Keys that a file lacks where their value is None."""

    @classmethod
    def read(cls, content: str | bytes | Mapping[str, Any], *, what: str) -> Self:
        """Return the record that JSON holds.

        Args:
            content: JSON text, or what it holds.
            what: Names the file in the message.

        Raises:
            UserError: if it is no JSON or not such a record; the value is never quoted.
        """
        try:
            if isinstance(content, Mapping):
                return cls.model_validate(content)
            return cls.model_validate_json(content)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False, include_context=False)[0]
            place = ".".join(str(part) for part in first["loc"]) or "it"
            raise UserError(
                f"{what}: {place}: {first['msg']}",
                allowed=f"{cls.__name__} as fedrx writes it",
                fix="use the file as it was written",
            ) from None

    def as_json(self) -> dict[str, Any]:
        """Return the record as JSON values, under the keys of the file."""
        content = self.model_dump(mode="json", by_alias=True)
        for key in self.absent_when_none:
            if content[key] is None:
                del content[key]
        return content


SCHEMA = 1
"""Version of all files of a run directory, in its run.json."""
Mode = Literal["federation", "single", "paper", "sweep", "audit", "flower"]
"""How a run is made; ``flower`` by plain ``flwr run``, which alone can start it again."""


class Inputs(Record):
    """What a run reads, by sha256: a resumed one must read the same."""

    samples: str = ""
    backbone: str = ""
    a: str = ""


class Layout(Record):
    """What a federation's server must know of backbone and adapter, as its launcher found them."""

    backbone: str
    """Its fingerprint, as hospitals load it and ask it."""
    shapes: dict[str, tuple[int, ...]]
    """Of all that the server holds, by wire key."""
    trainable_parameters: int


class RunRecord(Record):
    """run.json: what kind of run a directory holds, and what it takes to go on with it."""

    absent_when_none = ("layout",)
    schema_version: int = SCHEMA
    mode: Mode
    resumable: bool
    """Whether ``fedrx resume`` goes on with it."""
    config: dict[str, bool | int | float | str] = {}
    """By dotted key, as the run began."""
    inputs: Inputs = Inputs()
    scale: str = ""
    """Of a paper run."""
    ranks: tuple[int, ...] = ()
    """Of a paper run: each has a run of its own inside."""
    best: bool = False
    """Of a paper run: whether the best settings found here have a run inside too."""
    cells: tuple[str, ...] = ()
    """Of a sweep: the folders of its runs."""
    layout: Layout | None = None
    """Of a federation."""

    @classmethod
    def of_environment(cls, facts: Mapping[str, Any]) -> Self:
        """Return the record of a run made before there was run.json, from its environment.json."""
        mode = facts.get("mode", "audit")  # the one kind that did not say what it was
        known = {key: facts[key] for key in ("config", "inputs", "scale", "ranks") if key in facts}
        resumable = mode not in ("audit", "flower")
        return cls.read({"mode": mode, "resumable": resumable, **known}, what="environment.json")


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


class DtypeFacts(Record):
    """The arithmetic, and why this one."""

    value: str
    reason: str


class Scaling(Record):
    """How a single run's steps fit the samples that are there, in figures and in words."""

    train_samples: int
    steps: int
    steps_per_epoch: int
    epochs: float
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

    def interval(self, name: str) -> tuple[float, float] | None:
        """Return the interval of a figure, where there is one."""
        low, high = self.intervals.get(name, (None, None))
        return None if low is None or high is None else (low, high)


class PartialRecord(Record):
    """A kind of record whose file has the keys that were given, and no others."""

    def as_json(self) -> dict[str, Any]:
        """Return the keys that were given."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)


class PublicCurve(Record):
    """The loss of a run's checkpoints on made-up admissions that no hospital has."""

    samples: int
    seed: int
    """Of the synthetic source."""
    unit: str
    """What checkpoints count: ``round`` or ``step``."""
    losses: tuple[tuple[int, float], ...]
    """Rounds (or steps) and mean cross-entropy per answer token, in nats."""


class Summary(PartialRecord):
    """summary.json of a run that trains; what a kind of run does not have is not in its file."""

    mode: Mode | None = None
    trainable_parameters: int = 0
    adapter: AdapterFacts | None = None
    backbone: BackboneFacts | None = None
    hospitals: tuple[HospitalFacts, ...] = ()
    rounds: int = 0
    privacy: dict[str, Any] | None = None
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
    dtype: DtypeFacts | None = None
    source: str = ""
    metrics: dict[str, Figures] = {}
    """By model: ``fedrx``, an earlier checkpoint, the untrained backbone, the baselines."""
    evaluation: dict[str, Any] | None = None
    judge: dict[str, Any] | None = None
    review: dict[str, Any] | None = None

    def having(self, **values: Any) -> Self:
        """Return the summary with these values in the place of its own."""
        return type(self).model_validate({**self.as_json(), **values})


class PaperRow(Record):
    """One row of the paper's table."""

    rank: int
    steps: int
    output_rate: float
    accuracy: float
    appropriateness: float


class Here(Readings):
    """What a checkpoint of ours has found."""

    checkpoint: str
    steps: int
    appropriateness: float | None
    validation_loss: float | None
    b_norm: float


class Row(Record):
    """One row of the table: the paper's, ours, or both."""

    rank: int
    paper: PaperRow | None
    here: Here | None


class BestRow(Readings):
    """What a checkpoint of the best settings found here gives, in one way to make lists."""

    lists: str
    """``scored`` or ``formulary``."""
    checkpoint: str
    steps: int
    prauc: float | None
    """Of rankings; none of written lists."""


class RankRun(Record):
    """The run of one rank."""

    rank: int
    folder: str
    scale: str
    trainable_parameters: int
    b_sha256: str
    validation_loss: tuple[float | None, ...]
    seconds: float


class PaperTable(Record):
    """summary.json of a paper run."""

    scale: str
    differences: tuple[str, ...]
    """Configuration keys, paper -> here."""
    rows: tuple[Row, ...]
    others: dict[str, Readings]
    """Untrained backbone and baselines."""
    runs: tuple[RankRun, ...]
    best: tuple[BestRow, ...] = ()
    """Beside the paper's settings, the best ones found here."""


Json = str | float | bool | None | tuple[float | str, ...]


class AuditSummary(Record):
    """summary.json of an audit."""

    plan: dict[str, str | int | float | bool]
    findings: tuple[dict[str, Json], ...]
    passed: bool
    not_covered: str
    seconds: float


class MembershipRecord(Record):
    """membership.json: whether a run's patients can be told from others."""

    claim: str
    source: str
    references: int
    findings: tuple[dict[str, Json], ...]
    passed: bool
    seconds: float


class Parameters(Record):
    """Values of a backbone and of the two matrices."""

    backbone: int
    a: int
    b: int


class AdapterShape(Record):
    """What is to be trained."""

    mode: str
    rank: int
    targets: tuple[str, ...]


class Recomputation(DtypeFacts):
    """What the backward pass computes again, and why."""

    total_bytes: dict[str, int]
    """Of each choice."""


class Workers(Record):
    """How many there are, and why; more than one only on a CPU, where they share the memory."""

    value: int
    reason: str


class MeasuredTime(Record):
    """What training takes on a card that was measured."""

    card: str
    seconds_per_step: float
    hours: float
    """Of all steps of all hospitals, one after the other."""
    source: str


class PlanRecord(PartialRecord):
    """What a run will need."""

    backbone: str
    adapter: AdapterShape
    parameters: Parameters
    batch_tokens: int
    device: str
    dtype: DtypeFacts
    recompute: Recomputation
    memory_bytes: dict[str, int]
    """By part with ``total``: the peak of a training step of one worker with the chosen
    recomputation."""
    generation_bytes: int
    card_bytes: int
    card: str
    workers: Workers
    fits: bool
    spare_bytes: int
    bytes_per_round: int
    """Of training: down and up again, all hospitals that are asked."""
    steps: int
    """Of one hospital, in all, those of a personal B included."""
    steps_reason: str
    measured: tuple[MeasuredTime, ...] = ()
    """For a GPU."""
    privacy: dict[str, Any] | None = None
