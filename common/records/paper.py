"""summary.json of a paper run."""

from common.records import PartialRecord, Record
from common.records.summary import Readings


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


class BestAnswers(PartialRecord):
    """best.json of a paper run: by the way to make lists; one that is not done yet has no key."""

    scored: tuple[BestRow, ...] = ()
    formulary: tuple[BestRow, ...] = ()


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
