"""How long a step takes on cards that were measured, for ``fedrx plan``.

Every row is a call of ``benchmarks/gpu_paper_run.py`` on Llama-3.1-8B's shape with random weights,
4 x 2048 tokens and no recomputation; its source is named. A card that is not here is not guessed.
"""

from dataclasses import dataclass

from common.model.backbone.known_shapes import KNOWN_SHAPES
from common.model.backbone.load import BackboneShape


@dataclass(frozen=True, kw_only=True)
class MeasuredCard:
    """Training speed of one card."""

    name: str
    """As torch names it."""
    tokens_per_second: dict[str, float]
    """By format of the frozen weights, arithmetic in bf16."""
    private: dict[str, float]
    """The same of a private step's clipped sums, all patients in one pass; noise comes on top."""
    source: str


CARDS = (
    MeasuredCard(
        name="NVIDIA H200",
        tokens_per_second={"bf16": 19_989.0, "fp8": 28_876.0},
        private={"bf16": 19_103.0},
        source="benchmarks/results/gpu_paper_run.json, torch 2.11",
    ),
)
MEASURED_SHAPE = KNOWN_SHAPES["meta-llama/Llama-3.1-8B-Instruct"]


def seconds_per_step(
    card: MeasuredCard,
    shape: BackboneShape,
    *,
    tokens: float,
    weights: str,
    recompute: str,
    private: bool,
) -> float | None:
    """Return the expected seconds of an optimizer step; None for what was not measured.

    Args:
        card: From ``CARDS``.
        shape: The backbone's: only the measured one has figures.
        tokens: Of all micro-batches of a step.
        weights: Format of the frozen weights.
        recompute: As chosen for this memory.
        private: Whether every patient has a gradient of its own.

    >>> sizes = {"tokens": 8192, "recompute": "none", "private": False}
    >>> round(seconds_per_step(CARDS[0], MEASURED_SHAPE, weights="bf16", **sizes), 2)
    0.41
    >>> seconds_per_step(CARDS[0], MEASURED_SHAPE, weights="nf4", **sizes)
    """
    speeds = card.private if private else card.tokens_per_second
    if shape != MEASURED_SHAPE or recompute != "none" or weights not in speeds:
        return None
    return tokens / speeds[weights]
