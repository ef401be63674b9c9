"""One call to an OpenAI-compatible server: what is sent, what came back, and when to try again.

openai's own retries are off: waits, the Retry-After header and the cost of a broken call are
handled here, in one place. No redirect is followed, and nothing bound for loopback meets a proxy.
"""

import asyncio
import contextlib
import datetime
import email.utils
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from common.config import JudgeConfig
from common.errors import RunFailed, UserError
from common.evaluation.judge.cost import Meter, input_bound_tokens
from common.evaluation.judge.gate import Endpoint
from common.evaluation.judge.rubric import SCHEMA

FIRST_WAIT_SECONDS = 0.5
LONGEST_WAIT_SECONDS = 30.0
LONGEST_RETRY_AFTER_SECONDS = 300.0
_LONGEST_NAME = 200
_RETRIED_STATUS = frozenset({408, 409, 425, 429})
_MEANINGS = {
    401: "refuses the API key",
    403: "refuses the API key",
    404: "knows no such model or path",
}


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """What this server understands of the chat-completions interface."""

    schema: bool
    """It takes ``response_format``."""
    limit_key: str = "max_tokens"

    def body(
        self, model: str, messages: Sequence[Mapping[str, str]], config: JudgeConfig
    ) -> dict[str, Any]:
        """Return everything that is sent."""
        body: dict[str, Any] = {
            "model": model,
            "messages": [dict(message) for message in messages],
            "temperature": config.temperature,
            self.limit_key: config.max_output_tokens,
        }
        if self.schema:
            body["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "verdicts", "strict": True, "schema": dict(SCHEMA)},
            }
        return body

    def without(self, complaint: str, *, fixed_schema: bool) -> "Dialect | None":
        """Return the dialect that avoids what a 400 or 422 complains about; None if unknown."""
        if self.limit_key == "max_tokens" and "max_completion_tokens" in complaint:
            return replace(self, limit_key="max_completion_tokens")
        if self.schema and not fixed_schema and _names_schema(complaint):
            return replace(self, schema=False)
        return None


def dialects(config: JudgeConfig) -> list[Dialect]:
    """Return every dialect that these settings allow, the preferred one first."""
    schemas = {"auto": (True, False), "json-schema": (True,), "none": (False,)}
    return [
        Dialect(schema=schema, limit_key=key)
        for key in ("max_tokens", "max_completion_tokens")
        for schema in schemas[config.response_format]
    ]


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a server answered."""

    text: str
    cut: bool
    served_by: str
    """The model's name as the server gives it: it may be more exact than the one asked for."""
    input_tokens: int
    output_tokens: int
    counted: bool


class Unsupported(Exception):
    """The server asks for another dialect."""

    def __init__(self, dialect: Dialect) -> None:
        super().__init__("the server asks for another dialect")
        self.dialect = dialect


class Unavailable(Exception):
    """The server failed as often as it may; ``str()`` says how the last time."""


class _Again(Exception):
    """One failed attempt.

    Args:
        how: What happened, without anything that the server said.
        wait_seconds: What Retry-After asks for.
    """

    def __init__(self, how: str, wait_seconds: float | None = None) -> None:
        super().__init__(how)
        self.wait_seconds = wait_seconds


class JudgeClient:
    """Sends bodies, with a shared pause when the server asks for one.

    Args:
        endpoint: From ``check_endpoint``.
        config: Timeouts and attempts.
        api_key: Empty for none.
        meter: Where every attempt is charged.
        lost: Called with the worst-case tokens of a call that broke after it was sent.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        config: JudgeConfig,
        *,
        api_key: str,
        meter: Meter,
        lost: Callable[[int, int], None],
    ) -> None:
        import openai

        self._config, self._endpoint, self._meter = config, endpoint, meter
        self._lost = lost
        self._not_before = 0.0
        self._openai = openai
        self._client = openai.AsyncOpenAI(
            base_url=endpoint.url,
            api_key=api_key or "none",
            max_retries=0,
            timeout=config.timeout_seconds,
            http_client=openai.DefaultAsyncHttpxClient(
                trust_env=not endpoint.loopback, follow_redirects=False
            ),
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._client.close()

    async def send(self, body: Mapping[str, Any], dialect: Dialect) -> Reply:
        """Send one body until it is answered.

        Raises:
            Unsupported: If the server wants another dialect.
            Unavailable: If all attempts failed.
            CostLimit: If one more attempt could pass the limit.
            UserError: If the server refuses the call as such.
        """
        how = ""
        for attempt in range(self._config.attempts):
            await self._pause()
            try:
                return await self._attempt(body, dialect)
            except _Again as failure:
                how = str(failure)
                wait = failure.wait_seconds
                if wait is not None and wait > LONGEST_RETRY_AFTER_SECONDS:
                    raise RunFailed(
                        f"judge server: {how}, and asks to wait {wait:.0f} s; run the same command "
                        "again later, it goes on where it stopped"
                    ) from None
                if wait is not None:
                    self._not_before = max(self._not_before, time.monotonic() + wait)
                elif attempt + 1 < self._config.attempts:
                    await asyncio.sleep(min(FIRST_WAIT_SECONDS * 2**attempt, LONGEST_WAIT_SECONDS))
        raise Unavailable(how)

    async def _pause(self) -> None:
        while (left := self._not_before - time.monotonic()) > 0:
            await asyncio.sleep(left)

    async def _attempt(self, body: Mapping[str, Any], dialect: Dialect) -> Reply:
        reply = None
        async with self._meter.call(body, self._config.max_output_tokens) as charge:
            try:
                with self._failures(dialect, charge_off=lambda: setattr(charge, "due", False)):
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
                    reply = self._read(raw.text, body)
                    charge.input_tokens = reply.input_tokens
                    charge.output_tokens = reply.output_tokens
                    return reply
            finally:
                if reply is None and charge.due:
                    self._lost(charge.input_tokens, charge.output_tokens)

    @contextlib.contextmanager
    def _failures(self, dialect: Dialect, charge_off: Callable[[], None]) -> Iterator[None]:
        """Translate every failure of one attempt; those that cost nothing are charged off."""
        openai = self._openai
        try:
            yield
        except openai.APITimeoutError:
            raise _Again("no answer in time") from None
        except TimeoutError:
            raise _Again("no answer in time") from None
        except openai.APIConnectionError as error:
            if type(error.__cause__).__name__ in ("ConnectError", "ConnectTimeout"):
                charge_off()
                raise _Again("no connection") from None
            raise _Again("closed connection") from None
        except openai.APIStatusError as error:
            charge_off()
            self._refusal(error.status_code, _complaint(error), dialect, error.response.headers)

    def _refusal(
        self, status: int, complaint: str, dialect: Dialect, headers: Mapping[str, str]
    ) -> None:
        if status >= 500 or status in _RETRIED_STATUS:
            raise _Again(f"status {status}", retry_after_seconds(headers)) from None
        if status in (400, 422):
            fixed = self._config.response_format == "json-schema"
            other = dialect.without(complaint, fixed_schema=fixed)
            if other:
                raise Unsupported(other) from None
        where = f"judge server {self._endpoint.named}"
        if 300 <= status < 400:
            raise UserError(
                f"{where} redirects elsewhere (status {status}); redirects are not followed",
                fix="set judge.base-url to the address that answers itself",
            ) from None
        raise UserError(
            f"{where} {_MEANINGS.get(status, 'refuses the call')} (status {status})",
            fix="check judge.base-url (it usually ends in /v1), judge.model and the variable named "
            "by judge.api-key-env",
        ) from None

    def _read(self, text: str, body: Mapping[str, Any]) -> Reply:
        """Read a completion without trusting its shape; without content the text is empty."""
        try:
            document = json.loads(text)
        except (ValueError, RecursionError):
            document = None
        choices = document.get("choices", 0) if isinstance(document, dict) else 0
        if not isinstance(choices, list | None):
            raise _Again("an answer that is no chat completion")
        choices = choices or [{}]
        choice = choices[0] if isinstance(choices[0], dict) else {}
        message = choice.get("message")
        content = message.get("content") if isinstance(message, dict) else None
        usage = document.get("usage")
        usage = usage if isinstance(usage, dict) else {}
        counts = [usage.get("prompt_tokens"), usage.get("completion_tokens")]
        counted = all(type(count) is int and count >= 0 for count in counts)
        if not counted:
            counts = [input_bound_tokens(body), self._config.max_output_tokens]
        return Reply(
            text=content if isinstance(content, str) else "",
            cut=choice.get("finish_reason") == "length",
            served_by=str(document.get("model", ""))[:_LONGEST_NAME],
            input_tokens=counts[0] or 0,
            output_tokens=counts[1] or 0,
            counted=counted,
        )


def retry_after_seconds(headers: Mapping[str, str]) -> float | None:
    """Return how long Retry-After (seconds or an HTTP date) asks to wait; None without it.

    >>> retry_after_seconds({"retry-after": "1.5"})
    1.5
    """
    value = headers.get("retry-after", "").strip()
    with contextlib.suppress(ValueError):
        seconds = float(value)
        return max(0.0, seconds) if seconds < float("inf") else None
    with contextlib.suppress(ValueError, TypeError):
        moment = email.utils.parsedate_to_datetime(value)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=datetime.UTC)
        return max(0.0, (moment - datetime.datetime.now(datetime.UTC)).total_seconds())
    return None


def _complaint(error: Any) -> str:
    """What the server said, for choosing a dialect; never shown, it may quote the request."""
    return json.dumps(error.body, default=str) if error.body is not None else str(error.message)


def _names_schema(complaint: str) -> bool:
    return any(
        word in complaint for word in ("response_format", "json_schema", "guided", "grammar")
    )
