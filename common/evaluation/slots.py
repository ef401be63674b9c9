"""The key/value cache of batched generation: one slot per sequence, none of them padded.

transformers writes into it while it runs: a whole prompt into one slot, or one token per slot.

Shapes: B occupied slots, G key/value heads, L cache columns, E head width, T prompt tokens.
"""

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache, DynamicLayer, PreTrainedModel

if TYPE_CHECKING:
    from common.model.backbone.load import BackboneShape


class SlotLayer(DynamicLayer):
    """One layer's keys and values of all slots, [slots, G, L, E] each."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        self.filled = 0
        """Columns of the longest sequence under way, counted before a pass."""
        self._prompt_slot: int | None = None
        self._lengths_B = torch.empty(0)

    def expect_prompt(self, slot: int) -> None:
        """Next comes one whole prompt, to be written into a slot."""
        self._prompt_slot, self.filled = slot, 0

    def expect_tokens(self, lengths_B: Tensor, longest: int) -> None:
        """Next comes one token per slot, to be written behind ``lengths_B`` columns."""
        self._prompt_slot, self.filled = None, longest
        self._lengths_B = lengths_B

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store what a pass adds, [1, G, T, E] or [B, G, 1, E]; return what it attends to."""
        self.filled += key_states.shape[2]
        if self._prompt_slot is not None:
            self.keys[self._prompt_slot, :, : self.filled] = key_states[0]
            self.values[self._prompt_slot, :, : self.filled] = value_states[0]
            return key_states, value_states
        slots_B = torch.arange(len(key_states), device=key_states.device)
        self.keys[slots_B, :, self._lengths_B] = key_states[:, :, 0]
        self.values[slots_B, :, self._lengths_B] = value_states[:, :, 0]
        here = slice(None, len(key_states)), slice(None), slice(None, self.filled)
        return self.keys[here], self.values[here]

    def get_seq_length(self) -> int:
        """Return how many columns the sequences under way fill."""
        return self.filled


class SlotCache(Cache):
    """Keys and values of all slots, as the cache that transformers asks for.

    Args:
        shape: The backbone's.
        slots: Sequences side by side.
        columns: Longest prompt and continuation together.
        like: Has the cache's dtype and device.
    """

    def __init__(self, shape: "BackboneShape", *, slots: int, columns: int, like: Tensor) -> None:
        size = (shape.layers, 2, slots, shape.kv_heads, columns, shape.head_dim)
        # Zeros, not empty: a weight of 0 times a stray NaN would be NaN.
        self._kv = torch.zeros(size, dtype=like.dtype, device=like.device)
        self._slot_layers = [SlotLayer(keys, values) for keys, values in self._kv]
        super().__init__(layers=self._slot_layers)

    def expect_prompt(self, slot: int) -> None:
        """Next comes one whole prompt, to be written into a slot."""
        for layer in self._slot_layers:
            layer.expect_prompt(slot)

    def expect_tokens(self, lengths_B: Tensor, longest: int) -> None:
        """Next comes one token per slot, to be written behind ``lengths_B`` columns."""
        for layer in self._slot_layers:
            layer.expect_tokens(lengths_B, longest)

    def fill(self, layer: int, k_TGE: Tensor, v_TGE: Tensor, slot_T: Tensor, at_T: Tensor) -> None:
        """Write what one layer made of packed prompts into their slots, from column 0 on."""
        self._kv[layer, 0][slot_T, :, at_T] = k_TGE
        self._kv[layer, 1][slot_T, :, at_T] = v_TGE

    def move(self, source: int, target: int) -> None:
        """Copy one slot over another."""
        self._kv[:, :, target] = self._kv[:, :, source]


def cache_argument(model: PreTrainedModel) -> str:
    """Return what this transformers calls the cache of ``model.forward``.

    ``past_key_values`` until 5.23, ``cache`` from 5.24 on.
    """
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
