"""What a run directory says of the run: what kind it is, what it reads."""

from typing import Literal

from pydantic import ConfigDict, Field

from common.records import OpenRecord, Record

SCHEMA = 1
"""Version of all files of a run directory, in its run.json."""
Mode = Literal["federation", "single", "paper", "sweep", "generalise", "audit", "flower"]
"""How a run is made; ``flower`` by plain ``flwr run``, which alone can start it again."""
Direction = Literal["down", "up"]
State = Literal["started", "running", "finished", "failed", "interrupted"]


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


Settings = dict[str, bool | int | float | str]
"""A configuration, by dotted key."""


class RunRecord(Record):
    """run.json: what kind of run a directory holds, and what it takes to go on with it."""

    absent_when_none = ("layout",)
    schema_version: int = SCHEMA
    mode: Mode
    resumable: bool
    """Whether ``fedrx resume`` goes on with it."""
    config: Settings = {}
    """As the run began."""
    inputs: Inputs = Inputs()
    scale: str = ""
    """Of a paper run."""
    ranks: tuple[int, ...] = ()
    """Of a paper run: each has a run of its own inside."""
    best: bool = False
    """Of a paper run: whether the best settings found here have a run inside too."""
    cells: tuple[str, ...] = ()
    """Of a sweep, or of generalise: the folders of its runs."""
    layout: Layout | None = None
    """Of a federation."""

    @property
    def has_model(self) -> bool:
        """Whether it trains one model, with checkpoints and answers of its own."""
        return self.mode in ("federation", "single", "flower")


class Status(OpenRecord):
    """status.json: how far a run has come."""

    state: State
    updated: str = ""
    """UTC."""
    stage: str = ""
    round: int | None = None
    step: int | None = None
    rank: int | None = None
    """Of a paper run: which run inside is at work."""
    lists: str = ""
    cells: int | None = None
    """Of a sweep, or of generalise: how many of its runs are finished."""
    seconds: float | None = None
    error: str = ""
    """One line, of a run that failed."""


class Resumption(Record):
    """When a run was gone on with, and by what."""

    time: str
    """UTC."""
    command_line: tuple[str, ...]
    source_digest: str


class Environment(OpenRecord):
    """environment.json: what a run was begun with, and each time that it was gone on with."""

    source_digest: str = ""
    resumed: tuple[Resumption, ...] = ()


class WorkerFacts(Record):
    """One process that trains hospitals of a federation: a file of ``workers/``."""

    backbone_loads: int
    threads: int
    tokens: int
    training_seconds: float
    peak_device_bytes: int | None


class StepLine(Record):
    """One optimizer step of a hospital, a line of its steps.jsonl."""

    round: int
    step: int
    loss: float | None
    seconds: float


class Metric(OpenRecord):
    """One event of metrics.jsonl; a label of another version stays as it is."""

    name: str
    value: int | float | str | None
    """None where privacy tells none; a text is a reason."""
    round: int | None = None
    hospital: str | None = None
    """None for all of them together."""
    step: int | None = None
    """Of a single run, in the place of a round."""
    gradient_norm: float | None = None
    learning_rate: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    time: float

    @property
    def unit(self) -> Literal["round", "step"]:
        """What the run counts."""
        return "round" if self.step is None else "step"

    @property
    def place(self) -> int:
        """The round, or step, of the event."""
        return (self.round if self.step is None else self.step) or 0

    @property
    def number(self) -> float | None:
        """The value, if it is a number."""
        return None if isinstance(self.value, str) else self.value


class WireLine(Record):
    """One message, a line of wire.jsonl; what another version adds stays as it is."""

    model_config = ConfigDict(extra="allow")

    absent_when_none = ("unknown",)
    direction: Direction
    hospital: str
    round: int
    kind: str
    tensors: tuple[str, ...]
    scalars: tuple[str, ...]
    unknown: int | None = None
    """Names that no message has."""
    bytes: int
    """Of the tensors."""


class SavedFacts(OpenRecord):
    """facts.json of a checkpoint: where it stands, and what a resumed process goes on with."""

    round: int = 0
    step: int = 0
    """Of a single run, in the place of a round."""
    b_sha256: str = ""
    b_norm: float = 0.0
    seconds: float = 0.0
    """Of training, until it was written."""
    hospitals: tuple[str, ...] = ()
    """Those that were ever admitted."""
    known: int = 0
    federation_size: int = Field(default=0, validation_alias="of", serialization_alias="of")
    """How many hospitals there are, by their own account."""
    paces: dict[str, dict[str, int | float]] = {}
    """The slowest exchange of each kind of message."""
    config: Settings = {}
    inputs: dict[str, str] = {}


class HospitalSizes(OpenRecord):
    """What may be said of a hospital: its name, and how much of what it has."""

    name: str
    patients: int = 0
    samples: int = 0
    train: int = 0
    validation: int = 0
    test: int = 0
    groups: dict[str, int] = {}
    """Patients by what they were dealt by."""


class DataFacts(OpenRecord):
    """data.json: hashes, counts and sizes, never rows."""

    source: str = ""
    file_hashes: dict[str, str] = {}
    counts: dict[str, object] = {}
    hospitals: tuple[HospitalSizes, ...] = ()
