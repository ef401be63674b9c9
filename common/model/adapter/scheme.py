"""What of an adapter a round trains and what it sends: the seam where another way of LoRA fits in.

To add one, add its name to ``adapter.mode`` in ``common.config`` and its scheme to
``common.model.adapter.spec.SCHEMES``. Everything else asks the scheme.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

A, B = "lora_A", "lora_B"
"""Matrices by the last part of their wire keys."""
T = TypeVar("T")


@dataclass(frozen=True)
class Scheme:
    """Trains and sends in every round all that it holds. Rounds count from 1.

    Args:
        held: The matrices that a run changes: the server keeps them, and sends them to every
            hospital in every message, so that one that comes late has what the others have. What
            is not held is drawn from its seed by every party, and stays.
    """

    held: tuple[str, ...]

    def trained(self, server_round: int) -> tuple[str, ...]:
        """Return the matrices that a round's training changes."""
        return self.held

    def sends(self, server_round: int) -> tuple[str, ...]:
        """Return the matrices that a hospital sends back: what the server aggregates."""
        return self.trained(server_round)

    def shapes(self, server_round: int, held: Mapping[str, T]) -> dict[str, T]:
        """Return the part of all held tensors (or their shapes, by wire key) that a round sends.

        >>> Scheme((A, B)).shapes(1, {"q.lora_A": (4, 9), "q.lora_B": (8, 4)})
        {'q.lora_A': (4, 9), 'q.lora_B': (8, 4)}
        """
        sent = self.sends(server_round)
        return {key: value for key, value in held.items() if part_of(key) in sent}

    def block(self, server_round: int) -> str:
        """Return a prefix for what optimizers and strategies keep over rounds.

        Empty where a round trains all that is held; else what is kept belongs to its part alone.
        """
        trained = self.trained(server_round)
        return "" if trained == self.held else "".join(f"{part}." for part in trained)


def part_of(key: str) -> str:
    """Return the matrix that a wire key names.

    >>> part_of("model.layers.0.self_attn.q_proj.lora_B")
    'lora_B'
    """
    return key.rpartition(".")[2]
