"""What judges and reviewers say of a run's lists."""

from common.records import OpenRecord, Record


class Counts(OpenRecord):
    """Judgements by what came of them, and what asking for them took."""

    judges: tuple[str, ...] = ()
    asked: int = 0
    scored: int = 0
    unscored: int = 0
    not_asked: int = 0
    repaired: int = 0
    problems: dict[str, int] = {}
    """Why there is no score."""
    escaped_texts: int = 0
    calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    calls_without_usage: int = 0
    lost_input_tokens_at_most: int = 0
    lost_output_tokens_at_most: int = 0
    cost_usd: float = 0.0


class Appropriateness(OpenRecord):
    """Suitable drugs over all drugs of one model's lists."""

    mean: float | None = None
    interval: tuple[float, float] | None = None
    scored: int = 0
    unscored: int = 0
    not_asked: int = 0
    unanswered: int = 0
    empty: int = 0
    suitable: int = 0
    unsuitable: int = 0


class Agreement(OpenRecord):
    """How far people, or judges, agree; None where nothing was marked twice."""

    alpha: float | None = None
    """Krippendorff's, of judges."""
    alpha_drugs: float | None = None
    """The same of reviewers."""
    alpha_overall: float | None = None
    unanimous: float | None = None
    drugs: int = 0


class Judged(OpenRecord):
    """summary.json's ``judge``, and inside it what one judge alone says."""

    model: str = ""
    server: str = ""
    temperature: float = 0.0
    repeats: int = 1
    source: str = ""
    agreement_stated: bool = False
    complete: bool = True
    judgements: Counts = Counts()
    appropriateness: dict[str, Appropriateness] = {}
    """By model."""
    judges: dict[str, "Judged"] = {}
    """By name; a run of an earlier version has one judge, and not here."""
    agreement: Agreement = Agreement()
    flip_rate: float | None = None
    served_by: tuple[str, ...] = ()
    usage: Counts = Counts()
    """Of all invocations."""
    cost_usd: float = 0.0
    invocation: Counts = Counts()
    """The last one."""


class Estimate(Record):
    """What judging would ask and cost."""

    lists: int
    judgements: int
    calls: int
    cached: int
    input_tokens: int
    """Of one try per list."""
    output_tokens: int
    cost_usd: float
    most_usd: float
    """If every list needed its repair and every reply took all its tokens."""
    spent_usd: float
    max_cost_usd: float
    server: str
    source: str


class ReviewedModel(OpenRecord):
    """What the reviewers say of one model's lists."""

    format_followed: float | None = None
    similarity: dict[str, float | None] | None = None
    """To the true lists: Jaccard and F1."""
    similarity_after_review: dict[str, float | None] | None = None
    kept_share: float | None = None
    overall: float | None = None
    lists_reviewed: int = 0
    drugs: dict[str, int] = {}
    """By mark."""
    added: int = 0


class AgainstJudge(OpenRecord):
    """The reviewers' majority against the judge's."""

    drugs: int = 0
    agree: float | None = None
    alpha: float | None = None
    keep_suitable: int = 0
    keep_unsuitable: int = 0
    remove_suitable: int = 0
    remove_unsuitable: int = 0


class Reviewed(OpenRecord):
    """summary.json's ``review``."""

    packet: str = ""
    reviewers: tuple[str, ...] = ()
    cases: int = 0
    level: str = ""
    models: dict[str, ReviewedModel] = {}
    agreement: Agreement = Agreement()
    judge: AgainstJudge | None = None
    escaped_texts: int = 0
