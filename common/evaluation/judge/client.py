"""One question to an OpenAI-compatible server: its dialect, when to try again, what came back.

openai's own retries are off: of the tries before an answer it tells the number alone, so one that
broke after it was sent, which the cost limit must charge, looks like one that was refused for free.
No redirect is followed, and nothing bound for loopback meets a proxy.
"""

import asyncio
import contextlib
import datetime
import email.utils
import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from common.config import JudgeConfig
from common.errors import RunFailed, UserError
from common.evaluation.judge.cache import Exchange, Exchanges, UnansweredCall, exchange_key
from common.evaluation.judge.cost import Meter, input_bound_tokens
from common.evaluation.judge.dialect import Dialect, dialects
from common.evaluation.judge.gate import Endpoint
from common.files import writable

FIRST_WAIT_SECONDS = 0.5
LONGEST_WAIT_SECONDS = 30.0
LONGEST_RETRY_AFTER_SECONDS = 300.0
_LONGEST_NAME = 200
_MOST_TOKENS = 10**9
"""No call takes as many: a larger count is none, and its price would not fit a number."""
_RETRIED_STATUS = frozenset({408, 409, 425, 429})
_REFUSED_STATUS = frozenset({400, 413, 422})
"""The server does not take this question; it may take others."""
_MEANINGS = {
    401: "refuses the API key",
    403: "refuses the API key",
    404: "knows no such model or path",
}


class Unavailable(Exception):
    """The server failed as often as it may; ``str()`` says how the last time."""


class Refused(Exception):
    """The server does not take this question, in any dialect.

    Args:
        status: The HTTP status; what the server said is not kept, it may quote the question.
    """

    def __init__(self, status: int) -> None:
        super().__init__(f"refused: status {status}")
        self.status = status


class _Failed(Exception):
    """One failed attempt.

    Args:
        how: What happened, without anything that the server said.
        status: The HTTP status, if there was one.
        complaint: What the server said, for choosing a dialect; never shown.
        wait_seconds: What Retry-After asks for.
    """

    def __init__(
        self, how: str, status: int = 0, complaint: str = "", wait_seconds: float | None = None
    ) -> None:
        super().__init__(how)
        self.status, self.complaint, self.wait_seconds = status, complaint, wait_seconds


@dataclass(frozen=True, kw_only=True)
class Clock:
    """What a client waits by."""

    now: Callable[[], float] = time.time
    """Seconds since 1970: Retry-After may be a date."""
    monotonic: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep


class JudgeClient:
    """Asks questions, with a shared pause when the server asks for one.

    Args:
        endpoint: From ``check_endpoint``.
        config: Timeouts and attempts.
        api_key: Empty for none.
        meter: Where every attempt is charged.
        exchanges: Where every answer is kept, and what a call that broke may have cost.
        clock: What it waits by.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        config: JudgeConfig,
        *,
        api_key: str,
        meter: Meter,
        exchanges: Exchanges,
        clock: Clock,
    ) -> None:
        import openai

        self._config, self._endpoint, self._meter = config, endpoint, meter
        self._exchanges, self._openai, self._clock = exchanges, openai, clock
        self._not_before = 0.0
        self._allowed = dialects(config)
        self._first_answer, self._failing = asyncio.Lock(), False
        self.kept = {
            judge: dialect
            for (server, judge), dialect in exchanges.dialects.items()
            if server == endpoint.named and dialect in self._allowed
        }
        """The dialects that judges have answered in."""
        try:
            http = openai.DefaultAsyncHttpxClient(
                trust_env=not endpoint.loopback, follow_redirects=False
            )
        except (ImportError, ValueError):
            raise UserError(
                "judge: the proxy that the environment names cannot be used",
                allowed="an http:// or https:// proxy",
                fix="set https_proxy, and unset all_proxy",
            ) from None
        self._client = openai.AsyncOpenAI(
            base_url=endpoint.url,
            api_key=api_key or "none",
            max_retries=0,
            timeout=config.timeout_seconds,
            http_client=http,
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._client.close()

    async def ask(self, judge: str, asked: Sequence[Mapping[str, str]], repeat: int) -> Exchange:
        """Ask one question until it is answered, and keep the answer.

        Until a judge has answered once, its questions go one by one: one finds the dialect for all.
        (Not so at a server that fails: that is sooner known side by side.)

        Raises:
            Refused: If the server does not take this question.
            Unavailable: If all attempts failed.
            CostLimit: If one more attempt could pass the limit.
            UserError: If the server refuses every call.
            RunFailed: If it asks for a long wait.
        """
        if judge not in self.kept and not self._failing:
            async with self._first_answer:
                if judge not in self.kept:
                    return await self._ask(judge, asked, repeat)
        return await self._ask(judge, asked, repeat)

    async def _ask(self, judge: str, asked: Sequence[Mapping[str, str]], repeat: int) -> Exchange:
        dialect, failures = self.kept.get(judge, self._allowed[0]), 0
        while True:
            while (left := self._not_before - self._clock.monotonic()) > 0:
                await self._clock.sleep(left)
            try:
                exchange = await self._attempt(dialect.body(judge, asked, self._config), repeat)
            except _Failed as failure:
                other = self._other(judge, dialect, failure)
                if other is None:
                    failures += 1
                    other = self._simpler(judge, dialect, failure, failures)
                    await self._back_off(failure, failures)
                dialect = other
            else:
                self.kept[judge] = dialect
                self._exchanges.put(exchange)
                if dialect != self._allowed[0]:
                    self._exchanges.speak(self._endpoint.named, judge, dialect)
                return exchange

    def _other(self, judge: str, dialect: Dialect, failure: _Failed) -> Dialect | None:
        """Return the dialect that avoids what was complained about; None: try again as it was.

        It is kept only if it is answered in: a complaint may mislead.
        """
        if failure.status in _REFUSED_STATUS | {500}:
            other = dialect.without(failure.complaint)
            if other in self._allowed:
                return other
            if other and judge not in self.kept:
                raise UserError(
                    f"judge server {self._endpoint.named} refuses the JSON schema",
                    fix="--set judge.response-format=auto",
                ) from None
        if failure.status in _REFUSED_STATUS:
            raise Refused(failure.status) from None
        return None

    def _simpler(self, judge: str, dialect: Dialect, failure: _Failed, failures: int) -> Dialect:
        """Before the last try leave the schema out: some servers break at it without saying so."""
        plain = replace(dialect, schema=False)
        last = failures == self._config.attempts - 1
        broken = failure.status == 500 and judge not in self.kept
        return plain if last and broken and plain in self._allowed else dialect

    async def _back_off(self, failure: _Failed, failures: int) -> None:
        """Wait before the next try: all calls, if the server asks for it, else this one.

        Raises:
            Unavailable: If there were enough.
            RunFailed: If the server asks for a long wait.
        """
        wait = failure.wait_seconds or 0.0
        if wait > LONGEST_RETRY_AFTER_SECONDS:
            raise RunFailed(
                f"judge server: {failure}, and asks to wait {wait:.0f} s; run the same command "
                "again later, it goes on where it stopped"
            ) from None
        self._not_before = max(self._not_before, self._clock.monotonic() + wait)
        if failures == self._config.attempts:
            self._failing = True
            raise Unavailable(str(failure)) from None
        if failure.wait_seconds is None:
            seconds = min(FIRST_WAIT_SECONDS * 2 ** (failures - 1), LONGEST_WAIT_SECONDS)
            await self._clock.sleep(seconds)

    async def _attempt(self, body: Mapping[str, Any], repeat: int) -> Exchange:
        """Make one call; what it took is charged, or what it may have taken."""
        openai = self._openai
        async with self._meter.call(body, self._config.max_output_tokens) as charge:
            exchange = None
            try:
                # openai's timeout is per read: a server that drips would never meet it.
                async with asyncio.timeout(self._config.timeout_seconds):
                    # As extra_body, openai sends the schema as it is, without walking it.
                    raw = await self._client.chat.completions.with_raw_response.create(
                        model=body["model"],
                        messages=body["messages"],
                        extra_body={
                            k: v for k, v in body.items() if k not in ("model", "messages")
                        },
                    )
                exchange = self._read(raw.text, body, repeat)
                charge.input_tokens = exchange.input_tokens
                charge.output_tokens = exchange.output_tokens
                return exchange
            except (openai.APITimeoutError, TimeoutError):
                raise _Failed("no answer in time") from None
            except openai.APIConnectionError as error:
                unheard = ("ConnectError", "ConnectTimeout")
                charge.due = type(error.__cause__).__name__ not in unheard
                raise _Failed("closed connection" if charge.due else "no connection") from None
            except openai.APIStatusError as error:
                charge.due = False
                status = error.status_code
                if status < 500 and status not in _RETRIED_STATUS | _REFUSED_STATUS:
                    raise self._closed(status) from None
                raise _Failed(
                    f"status {status}",
                    status,
                    # As it is, escapes and all: only words are looked for.
                    error.message if error.body is None else json.dumps(error.body, default=str),
                    retry_after_seconds(error.response.headers, now=self._clock.now()),
                ) from None
            finally:
                if exchange is None and charge.due:
                    self._exchanges.put(
                        UnansweredCall(
                            input_tokens=charge.input_tokens, output_tokens=charge.output_tokens
                        )
                    )

    def _closed(self, status: int) -> UserError:
        where = f"judge server {self._endpoint.named}"
        if 300 <= status < 400:
            return UserError(
                f"{where} redirects elsewhere (status {status}); redirects are not followed",
                fix="set judge.base-url to the address that answers itself",
            )
        return UserError(
            f"{where} {_MEANINGS.get(status, 'refuses the call')} (status {status})",
            fix="check judge.base-url (it usually ends in /v1), judge.model and the variable named "
            "by judge.api-key-env",
        )

    def _read(self, text: str, body: Mapping[str, Any], repeat: int) -> Exchange:
        """Read a completion without trusting its shape; without content the text is empty."""
        try:
            document = json.loads(text.removeprefix("\ufeff"))
        except (ValueError, RecursionError):
            document = None
        choices = document.get("choices", 0) if isinstance(document, dict) else 0
        if not isinstance(choices, list | None):
            raise _Failed("an answer that is no chat completion")
        choices = choices or [{}]
        choice = choices[0] if isinstance(choices[0], dict) else {}
        cut = choice.get("finish_reason") == "length"
        usage = document.get("usage")
        usage = usage if isinstance(usage, dict) else {}
        counts = [usage.get("prompt_tokens"), usage.get("completion_tokens")]
        counted = all(type(count) is int and 0 <= count <= _MOST_TOKENS for count in counts)
        if not counted:
            counts = [input_bound_tokens(body), self._config.max_output_tokens]
        return Exchange(
            key=exchange_key(self._endpoint.named, body, repeat),
            text=_text(choice.get("message"), cut=cut),
            cut=cut,
            served_by=writable(str(document.get("model", "")))[0][:_LONGEST_NAME],
            input_tokens=counts[0] or 0,
            output_tokens=counts[1] or 0,
            counted=counted,
        )


def retry_after_seconds(headers: Mapping[str, str], *, now: float) -> float | None:
    """Return how long Retry-After (seconds or an HTTP date) asks to wait; None without it.

    Args:
        headers: Of the answer.
        now: Seconds since 1970.

    >>> retry_after_seconds({"retry-after": "1.5"}, now=0.0)
    1.5
    """
    value = headers.get("retry-after", "").strip()
    with contextlib.suppress(ValueError):
        seconds = float(value)
        return max(0.0, seconds) if seconds < float("inf") else None
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        moment = email.utils.parsedate_to_datetime(value)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=datetime.UTC)
        return max(0.0, moment.timestamp() - now)
    return None


def _text(message: Any, *, cut: bool) -> str:
    """Return what a message says: a text, or parts of one; if empty, what counts as its reasoning.

    A server that finds no end of the thought sends all of it as reasoning, the answer included; a
    thought that was cut off holds drafts alone.

    >>> _text({"content": [{"text": "a"}, {"text": "b"}]}, cut=False)
    'ab'
    """
    found = message if isinstance(message, dict) else {}
    for key in ("content", *(() if cut else ("reasoning_content", "reasoning"))):
        value = found.get(key)
        parts = value if isinstance(value, list) else [{"text": value}]
        texts = [part.get("text") for part in parts if isinstance(part, dict)]
        text = "".join(text for text in texts if isinstance(text, str))
        if text.strip():
            return text
    return ""
