"""What judging costs: an estimate before, a limit during, a sum after."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from math import ceil
from typing import Any

from common.evaluation.judge.cache import Exchanges

_TEMPLATE_TOKENS = 16
"""Generous allowance for what a chat template puts around one message."""
_BYTES_PER_TOKEN = 3.5
"""Usual for English text with drug names; only for estimates."""


@dataclass(frozen=True, kw_only=True)
class Prices:
    """USD per million tokens."""

    input_usd: float
    output_usd: float

    def cost_usd(self, input_tokens: float, output_tokens: float) -> float:
        """Return the price of one or many calls.

        >>> Prices(input_usd=2.0, output_usd=8.0).cost_usd(500_000, 250_000)
        3.0
        """
        return (input_tokens * self.input_usd + output_tokens * self.output_usd) / 1e6


def input_bound_tokens(body: Mapping[str, Any]) -> int:
    """Return what a prompt can take at most: a token spells at least one byte."""
    texts = [message["content"] for message in body["messages"]]
    schema = json.dumps(body.get("response_format", ""))
    size = sum(len(text.encode()) + _TEMPLATE_TOKENS for text in texts)
    return size + len(schema.encode()) + _TEMPLATE_TOKENS


def estimated_tokens(size_bytes: int) -> int:
    """Return about how many tokens a text of this size takes.

    >>> estimated_tokens(350)
    100
    """
    return ceil(size_bytes / _BYTES_PER_TOKEN)


class CostLimit(Exception):
    """The next call could cost more than is left."""


@dataclass
class Charge:
    """The worst case of one call until what it really took is known."""

    input_tokens: int
    output_tokens: int
    due: bool = True
    """False once the server refused the call without working on it."""


class Meter:
    """Keeps spending and everything in flight, at its worst, within a limit.

    Args:
        prices: USD per million tokens.
        limit_usd: 0 for none.
        spent_usd: What earlier sessions spent on the same run.
    """

    def __init__(self, prices: Prices, *, limit_usd: float, spent_usd: float) -> None:
        self._prices, self._limit_usd = prices, limit_usd
        self.spent_usd = spent_usd
        self._in_flight_usd: list[float] = []
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def call(self, body: Mapping[str, Any], output_bound: int) -> AsyncIterator[Charge]:
        """Reserve one call's worst case; the block sets the charge to what it took.

        Waits while calls in flight hold what this one needs.

        Raises:
            CostLimit: If nothing is in flight, and the call could still pass the limit.
        """
        charge = Charge(input_bound_tokens(body), output_bound)
        worst_usd = self._prices.cost_usd(charge.input_tokens, charge.output_tokens)
        async with self._changed:
            while not self._fits(worst_usd):
                if not self._in_flight_usd:
                    raise CostLimit
                await self._changed.wait()
            self._in_flight_usd.append(worst_usd)
        try:
            yield charge
        finally:
            if charge.due:
                self.spent_usd += self._prices.cost_usd(charge.input_tokens, charge.output_tokens)
            self._in_flight_usd.remove(worst_usd)
            async with self._changed:
                self._changed.notify_all()

    def _fits(self, more_usd: float) -> bool:
        total = self.spent_usd + sum(self._in_flight_usd) + more_usd
        return not self._limit_usd or total <= self._limit_usd


def usage(made: Exchanges, prices: Prices) -> dict[str, Any]:
    """Return what all judging of a run has taken so far, over all invocations."""
    calls = made.by_key.values()
    input_tokens = sum(exchange.input_tokens for exchange in calls)
    output_tokens = sum(exchange.output_tokens for exchange in calls)
    lost_input_tokens = sum(call.input_tokens for call in made.lost)
    lost_output_tokens = sum(call.output_tokens for call in made.lost)
    return {
        "calls": len(calls),
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "calls_without_usage": sum(not exchange.counted for exchange in calls),
        "lost_input_tokens_at_most": lost_input_tokens,
        "lost_output_tokens_at_most": lost_output_tokens,
        "cost_usd": prices.cost_usd(
            input_tokens + lost_input_tokens, output_tokens + lost_output_tokens
        ),
    }
