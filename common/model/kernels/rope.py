"""Rotary frequencies that depend on a sequence's length, computed for each sequence alone.

transformers takes the length of the whole pass (and with ``dynamic`` keeps it for later passes),
so a packed or batched neighbour would change a token's result. Here every sequence gets what a
pass of its own through a fresh model gives.

Shapes: B rows, T tokens of a row, E head width.
"""

import itertools
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

FIXED = ("default", "linear", "yarn", "llama3")
"""Kinds whose frequencies are constants of the configuration."""
BY_LENGTH = ("dynamic", "longrope")
"""Kinds whose frequencies follow the length."""


class SequenceRope(nn.Module):
    """transformers' rotary embedding, asked for one sequence at a time."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosine and sine, [B, T, E].

        Args:
            x: Anything of the wanted device and dtype.
            position_ids: [B, T]; a sequence begins where a row begins and where a 0 stands.
        """
        rows = [self._row(x[:1], positions_T) for positions_T in position_ids]
        cosines, sines = zip(*rows, strict=True)
        return torch.stack(cosines), torch.stack(sines)

    def _row(self, x: Tensor, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        zeros = (positions_T == 0).nonzero().flatten().tolist()
        bounds = sorted({0, *zeros, len(positions_T)})
        parts = []
        for start, stop in itertools.pairwise(bounds):
            # A fresh module each time: the base remembers the longest pass that it has seen.
            fresh = type(self.base)(config=self.base.config).to(x.device)
            parts.append(fresh(x, positions_T[None, start:stop]))
        cosines, sines = zip(*parts, strict=True)
        return torch.cat(cosines, 1)[0], torch.cat(sines, 1)[0]


def install(model: "LlamaForCausalLM") -> None:
    """Give a model of a kind ``BY_LENGTH`` frequencies by sequence; others stay as they are."""
    if model.config.rope_parameters["rope_type"] in BY_LENGTH:
        model.model.rotary_emb = SequenceRope(model.model.rotary_emb)
