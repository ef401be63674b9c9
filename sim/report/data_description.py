"""What ``fedrx data prepare`` and ``fedrx data describe`` do, for the command line to call.

No patient's row leaves these functions: what they return and show are counts and shares.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.config import Config, TextConfig
from common.data.dataset import open_hospitals
from common.data.partition import ATTRIBUTES, Hospital
from common.data.prepare import prepare_source, table_digest
from common.data.protocols import ASKED
from common.data.samples import Admission, Counts, ProtocolCounts, SampleTable
from common.data.skew import Skew, drug_skew
from common.errors import UserError
from common.model.backbone import embedded, tiny
from common.model.backbone.tokenizer import read_tokenizer
from common.records.run import HospitalSizes
from common.seeds import stream
from common.text.batches import encode
from common.text.known import LeftOut, together
from common.user_cache import fedrx_cache
from sim.report.html import Block

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_TOKENISED = 2000
"""Token lengths are read from a seeded choice of at most so many samples."""
FEW_SAMPLES = 5
MOST_GROUPS = 4
_UNLIMITED_TOKENS = 1 << 30

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class TokenLengths:
    """Lengths in tokens of a choice of samples, nothing dropped, and what a limit would drop."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    max_length: int
    longer: int
    """Samples of the choice that lose at least one whole item at ``max_length``."""
    left_out: LeftOut
    """Items of the choice's prompts."""
    dropped_drugs: int

    @property
    def total(self) -> tuple[int, ...]:
        """Prompt and answer together."""
        return tuple(map(sum, zip(self.prompt, self.answer, strict=True)))


class SourceCounts(Counts):
    """What was counted, and of what."""

    absent_when_none = ("protocol", "digest")
    source: str
    digest: str | None = None
    """Of the sample table."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """Everything that the text, the JSON and the page of ``describe`` show."""

    counts: SourceCounts
    scheme: str
    sizes: tuple[HospitalSizes, ...]
    skew: Skew
    hospitals: tuple[Hospital, ...]
    backbone: str
    lengths: TokenLengths | None
    reason: str
    """Why there are none."""

    def as_json(self) -> dict[str, object]:
        """Return what ``--json`` prints."""
        return {
            **self.counts.as_json(),
            "partition": {
                "scheme": self.scheme,
                "hospitals": [one.as_json() for one in self.sizes],
                "skew": self.skew.observed,
                "null_skew": self.skew.null,
                "p_value": self.skew.p_value,
            },
            "tokens": _tokens(self.lengths, self.backbone, self.reason),
        }


def prepare(
    config: Config, *, cache_dir: Path | None = None, progress: Progress | None = None
) -> SourceCounts:
    """Prepare (or find) the cached sample table of ``data.path`` and return its counts.

    Raises:
        UserError: Tables that cannot be used as they are; nothing is left in the cache then.
    """
    found = prepare_source(config.data, cache_dir=cache_dir, progress=progress)
    counts, digest = found.prepared.counts, table_digest(found.prepared)
    return SourceCounts(**dict(counts), source=found.source, digest=digest)


def describe(
    config: Config, *, cache_dir: Path | None = None, progress: Progress | None = None
) -> Description:
    """Count, deal to hospitals, and measure skew and lengths.

    Raises:
        UserError: Tables that cannot be used, or a hospital that would be empty.
    """
    say = progress or (lambda _: None)
    opened = open_hospitals(config, cache_dir=cache_dir, progress=progress)
    table, hospitals = opened.samples, opened.hospitals
    sizes = [sizes_of(one) for one in hospitals]
    if config.partition.scheme in ATTRIBUTES:
        groups = _group_counts(table, hospitals, config.partition.scheme)
        pairs = zip(sizes, groups, strict=True)
        sizes = [one.model_copy(update={"groups": own}) for one, own in pairs]
    skew = drug_skew([one.admissions for one in hospitals], seed=config.partition.seed)
    say("counting tokens")
    tokenizer, reason = local_tokenizer(config.model.backbone, cache_dir or fedrx_cache())
    lengths = None
    if tokenizer is not None:
        lengths = token_lengths(
            table.admissions,
            tokenizer,
            text=config.text,
            max_length=config.train.max_length,
            seed=config.evaluation.seed,
        )
    dropped = {**table.counts.dropped, **_missing_drops(hospitals)}
    return Description(
        counts=SourceCounts(**{**dict(table.counts), "dropped": dropped}, source=table.source),
        scheme=config.partition.scheme,
        sizes=tuple(sizes),
        skew=skew,
        hospitals=hospitals,
        backbone=config.model.backbone,
        lengths=lengths,
        reason=reason,
    )


def token_lengths(
    admissions: Sequence[Admission],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    text: TextConfig,
    max_length: int,
    seed: int,
) -> TokenLengths:
    """Measure prompts and answers, whole and at ``max_length``.

    Args:
        admissions: All samples; at most ``MOST_TOKENISED`` of them are read.
        tokenizer: The backbone's.
        text: What the model is asked.
        max_length: Tokens that a sample may have.
        seed: Of the choice.
    """
    chosen: Sequence[Admission] = admissions
    if len(admissions) > MOST_TOKENISED:
        draw = stream(seed, "describe", "token-lengths")
        places = np.sort(draw.choice(len(admissions), MOST_TOKENISED, replace=False))
        chosen = [admissions[place] for place in places]
    whole, cut = (
        [encode(one, tokenizer, text=text, max_length_tokens=limit) for one in chosen]
        for limit in (_UNLIMITED_TOKENS, max_length)
    )
    return TokenLengths(
        prompt=tuple(one.answer_start for one in whole),
        answer=tuple(one.label_tokens for one in whole),
        max_length=max_length,
        longer=sum(any(one.left_out) or one.dropped_drugs > 0 for one in cut),
        left_out=together(one.left_out for one in cut),
        dropped_drugs=sum(one.dropped_drugs for one in cut),
    )


def local_tokenizer(backbone: str, cache_dir: Path) -> tuple["PreTrainedTokenizerBase | None", str]:
    """Return the backbone's tokenizer if it is on this machine, else None and the reason."""
    if backbone == "tiny":
        return tiny.tiny_tokenizer(), ""
    name = str(cache_dir / embedded.FOLDER) if backbone == "embedded" else backbone
    if backbone == "embedded" and not Path(name).is_dir():
        return None, "the embedded backbone is not in the cache yet"
    try:
        return read_tokenizer(name, backbone), ""
    except UserError as error:
        if isinstance(error.__cause__, OSError):
            return None, f"the tokenizer of {backbone} is not on this machine"
        return None, error.what


def count_blocks(data: SourceCounts) -> list[Block]:
    """Return what ``prepare`` counted, for a terminal and a page."""
    drugs = data.drugs_per_sample
    reasons = {
        name: ", ".join(
            f"{reason.split('.', 1)[1].replace('_', ' ')} {count:,}"
            for reason, count in data.dropped.items()
            if reason.startswith(f"{name}.") and count
        )
        for name in data.rows_out
    }
    measured = (
        f"Measured on or before admission: height {data.height:,}, weight {data.weight:,}, "
        f"both {data.height_and_weight:,}, neither {data.no_height_no_weight:,}."
    )
    nulls = ", ".join(f"{column} {number:,}" for column, number in data.null_spelled.items())
    if nulls:
        measured += f" NULL spelled as text (NA, None, \\N ...) and read as NULL: {nulls}."
    return [
        Block(
            note=f"{data.samples:,} samples of {data.patients:,} patients (source: "
            f"{data.source}); {drugs.mean:.2f} drugs each, {drugs.min} to {drugs.max}."
        ),
        Block(
            title="Rows read and left out",
            note=measured,
            headers=("table", "rows in", "rows out", "left out because"),
            rows=tuple(
                (name, f"{number:,}", f"{data.rows_out[name]:,}", reasons[name])
                for name, number in data.rows.items()
            ),
            text_cells=True,
        ),
    ]


def description_blocks(description: Description) -> list[Block]:
    """Return what ``describe`` found, for a terminal and a page."""
    hospitals, skew, lengths = description.sizes, description.skew, description.lengths
    headers: tuple[str, ...] = ("name", "patients", "samples", "train", "validation", "test")
    rows = [[str(getattr(one, key)) for key in headers] for one in hospitals]
    if any(one.groups for one in hospitals):
        headers = (*headers, "groups (patients)")
        rows = [[*row, _groups(one.groups)] for row, one in zip(rows, hospitals, strict=True)]
    blocks = count_blocks(description.counts)
    if description.counts.protocol:
        blocks.append(_protocol_block(description.counts.protocol))
    small = [
        f"{one.name} ({one.validation} validation, {one.test} test)"
        for one in hospitals
        if min(one.validation, one.test) < FEW_SAMPLES
    ]
    if small:
        note = (
            f"Fewer than {FEW_SAMPLES} validation or test samples: {', '.join(small)}. Losses and "
            "figures of so few patients say little: use fewer hospitals, or larger "
            "data.validation-fraction and data.test-fraction."
        )
        blocks.append(Block(note=note, warning=True))
    note = (
        f"skew (mean Jensen-Shannon divergence of drugs, bits): {skew.observed:.3f}; "
        f"by chance {skew.null:.3f} (p {skew.p_value:.2f})"
    )
    title = f"Hospitals: partition by {description.scheme}"
    blocks.append(
        Block(
            title=title,
            note=note,
            headers=("hospital", *headers[1:]),
            rows=tuple(map(tuple, rows)),
            text_cells=len(headers) > 6,
        )
    )
    note = description.reason
    if lengths:
        other = other_items(lengths.left_out.beyond_diagnoses())
        note = (
            f"{description.backbone}: prompt {np.mean(lengths.prompt):.0f} on average, "
            f"answer {np.mean(lengths.answer):.0f}, longest sample {max(lengths.total):,}; "
            f"{lengths.longer:,} of {len(lengths.total):,} longer than "
            f"train.max-length {lengths.max_length:,}: whole items dropped: "
            f"{lengths.left_out.diagnoses:,} diagnoses, {lengths.dropped_drugs:,} drugs"
            + "".join(f", {number:,} {kind}" for kind, number in other.items())
        )
    return [*blocks, Block(title="Tokens", note=note)]


def other_items(left_out: Mapping[str, int]) -> dict[str, int]:
    """Return what prompts leave out beside diagnoses, in words for people.

    >>> other_items({"visits": 2, "ordered": 1})
    {'earlier visits (the oldest)': 2, 'early orders': 1}
    """
    words = {
        "visits": "earlier visits (the oldest)",
        "ordered": "early orders",
        "labs": "laboratory results",
    }
    return {words.get(kind, kind): number for kind, number in left_out.items()}


def _protocol_block(protocol: ProtocolCounts) -> Block:
    """Return what a protocol counted."""
    note = f"{protocol.name}: {ASKED[protocol.name]}."
    if protocol.absent:
        note += f" Not there, and done without: {', '.join(protocol.absent)}."
    counted = protocol.counted.items()
    rows = tuple((key.replace("_", " "), f"{number:,}") for key, number in counted)
    return Block(title="Protocol", note=note, headers=("counted", ""), rows=rows, text_cells=True)


def _groups(groups: dict[str, int]) -> str:
    shown = [f"{name} {number}" for name, number in list(groups.items())[:MOST_GROUPS]]
    rest = len(groups) - len(shown)
    return ", ".join([*shown, *([f"{rest} others"] if rest else [])])


def _group_counts(
    table: SampleTable, hospitals: Sequence[Hospital], scheme: str
) -> list[dict[str, int]]:
    """Count each hospital's patients by what they were dealt by: that of the first admission."""
    attribute = ATTRIBUTES[scheme]
    first: dict[int, str] = {}
    for one in table.admissions:
        first.setdefault(one.patient, getattr(one, attribute))
    return [
        dict(Counter(first[p] for p in {a.patient for a in one.admissions}).most_common())
        for one in hospitals
    ]


def sizes_of(hospital: Hospital) -> HospitalSizes:
    """Return what may be said of a hospital."""
    return HospitalSizes(
        name=hospital.name,
        patients=hospital.patients,
        samples=hospital.samples,
        train=len(hospital.train),
        validation=len(hospital.validation),
        test=len(hospital.test),
    )


def _missing_drops(hospitals: Sequence[Hospital]) -> dict[str, int]:
    drops: dict[str, int] = {}
    for one in hospitals:
        for reason, number in one.dropped.items():
            drops[f"samples.{reason}"] = drops.get(f"samples.{reason}", 0) + number
    return drops


def _tokens(lengths: TokenLengths | None, backbone: str, reason: str) -> dict[str, object]:
    if lengths is None:
        return {"backbone": backbone, "samples": 0, "reason": reason}
    return {
        "backbone": backbone,
        "samples": len(lengths.total),
        "prompt": _spread(lengths.prompt),
        "answer": _spread(lengths.answer),
        "total": _spread(lengths.total),
        "max_length": lengths.max_length,
        "longer_than_max_length": lengths.longer,
        "dropped_diagnoses": lengths.left_out.diagnoses,
        "dropped_drugs": lengths.dropped_drugs,
        **({"left_out": other} if (other := lengths.left_out.beyond_diagnoses()) else {}),
    }


def _spread(values: Sequence[int]) -> dict[str, float | int]:
    return {
        "mean": float(np.mean(values)),
        "median": float(np.median(values)),
        "min": min(values),
        "max": max(values),
    }
