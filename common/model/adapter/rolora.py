"""RoLoRA: B and A alternate by round (Chen et al., 2025, arXiv 2502.01755).

With A frozen, averaging B is exact, and with B frozen averaging A is; so both are learned, and a
round sends the one that it trains.
"""

from common.model.adapter.scheme import A, B, Scheme


class RoLoRA(Scheme):
    """Trains and sends B in odd rounds, with A frozen, and A in even rounds, with B frozen.

    >>> [RoLoRA((A, B)).trained(number) for number in (1, 2, 3)]
    [('lora_B',), ('lora_A',), ('lora_B',)]
    """

    def trained(self, server_round: int) -> tuple[str, ...]:
        """Return the half of the adapter that a round trains and sends."""
        return (B,) if server_round % 2 else (A,)
