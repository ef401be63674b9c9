"""What judging costs: an estimate before, a limit during, a sum after."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from math import ceil
from typing import Any

from common.config import JudgeConfig
from common.evaluation.judge.cache import Exchanges

_TEMPLATE_TOKENS = 16
"""Generous allowance for what a chat template puts around one message."""
_BYTES_PER_TOKEN = 3.5
"""Usual for English text with drug names; only for estimates."""


def cost_usd(config: JudgeConfig, input_tokens: float, output_tokens: float) -> float:
    """Return the price of one or many calls, in USD.

    >>> prices = JudgeConfig(input_usd_per_million=2.0, output_usd_per_million=8.0)
    >>> cost_usd(prices, 500_000, 250_000)
    3.0
    """
    millions = input_tokens * config.input_usd_per_million
    return (millions + output_tokens * config.output_usd_per_million) / 1e6


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
        config: Prices and limit.
        spent_usd: What earlier sessions spent on the same run.
    """

    def __init__(self, config: JudgeConfig, *, spent_usd: float) -> None:
        self._config, self.spent_usd = config, spent_usd
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
        worst_usd = cost_usd(self._config, charge.input_tokens, charge.output_tokens)
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
                self.spent_usd += cost_usd(self._config, charge.input_tokens, charge.output_tokens)
            self._in_flight_usd.remove(worst_usd)
            async with self._changed:
                self._changed.notify_all()

    def _fits(self, more_usd: float) -> bool:
        total = self.spent_usd + sum(self._in_flight_usd) + more_usd
        return not self._config.max_cost_usd or total <= self._config.max_cost_usd


def usage(made: Exchanges, config: JudgeConfig) -> dict[str, float]:
    """Return what all judging of a run has taken so far, over all invocations."""
    calls = made.by_key.values()
    found: dict[str, float] = {
        "calls": len(calls),
        "input_tokens": sum(call.input_tokens for call in calls),
        "output_tokens": sum(call.output_tokens for call in calls),
        "calls_without_usage": sum(not call.counted for call in calls),
        "lost_input_tokens_at_most": sum(call.input_tokens for call in made.unanswered),
        "lost_output_tokens_at_most": sum(call.output_tokens for call in made.unanswered),
    }
    input_tokens = found["input_tokens"] + found["lost_input_tokens_at_most"]
    output_tokens = found["output_tokens"] + found["lost_output_tokens_at_most"]
    return {**found, "cost_usd": cost_usd(config, input_tokens, output_tokens)}
