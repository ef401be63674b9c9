"""How one question is put to a server that takes less than the whole chat-completions interface."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from common.config import JudgeConfig
from common.evaluation.judge.rubric import SCHEMA


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """What this server understands of the chat-completions interface."""

    schema: bool
    """It takes ``response_format``."""
    limit_key: str = "max_tokens"
    temperature: bool = True
    """It takes another temperature than its own."""
    system: bool = True
    """It takes a system message."""

    def body(
        self, model: str, messages: Sequence[Mapping[str, str]], config: JudgeConfig
    ) -> dict[str, Any]:
        """Return everything that is sent."""
        said = [dict(message) for message in messages]
        if not self.system:
            said[1]["content"] = f"{said[0]['content']}\n\n{said[1]['content']}"
            del said[0]
        body: dict[str, Any] = {
            "model": model,
            "messages": said,
            self.limit_key: config.max_output_tokens,
        }
        if self.temperature:
            body["temperature"] = config.temperature
        if self.schema:
            body["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "verdicts", "strict": True, "schema": dict(SCHEMA)},
            }
        return body

    def without(self, complaint: str) -> "Dialect | None":
        """Return the dialect that avoids what a server complains about; None if unknown."""

        def named(*words: str) -> bool:
            return any(word in complaint.lower() for word in words)

        if self.limit_key == "max_tokens" and named("max_completion_tokens"):
            return replace(self, limit_key="max_completion_tokens")
        if self.schema and named("response_format", "json_schema", "guided", "grammar"):
            return replace(self, schema=False)
        if self.temperature and named("temperature"):
            return replace(self, temperature=False)
        if self.system and named("system", "roles must alternate"):
            return replace(self, system=False)
        return None


def dialects(config: JudgeConfig) -> list[Dialect]:
    """Return every dialect that these settings allow, the preferred one first."""
    schemas = {"auto": (True, False), "json-schema": (True,), "none": (False,)}
    choices = product(
        (True, False),
        (True, False),
        ("max_tokens", "max_completion_tokens"),
        schemas[config.response_format],
    )
    return [
        Dialect(schema=schema, limit_key=key, temperature=temperature, system=system)
        for system, temperature, key, schema in choices
    ]
