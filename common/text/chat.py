"""A tokenizer's chat template, tamed: its clock stands still, and every role it lacks is made up.

A template is a program that came with the weights. It may read the clock, refuse or drop a system
message, or fail; whoever renders a prompt goes through here, so that training, answers and every
hospital see the same bytes on any day.
"""

import datetime
from typing import TYPE_CHECKING

from common.errors import UserError
from common.provenance import PROMPT_DATE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]
_DIRECTIVES = (
    *("%-d", "%-m", "%-y", "%-H", "%-I", "%-M", "%-S", "%-j"),
    *(f"%{letter}" for letter in "aAbBcdeDfFgGhHIjklmMnpPrRsSTuUVwWxXyYzZ"),
    "%%",
)
_CLOCK = "fedrx_clock"
# A macro of the template's own hides the global of that name. The line break after it is trimmed
# by transformers' environment, so that the template begins as it would without the macro.
_FROZEN_CLOCK = (
    "{%- macro strftime_now(format) -%}{%- set said = namespace(text=format) -%}"
    f"{{%- for directive, value in {_CLOCK} -%}}"
    "{%- set said.text = said.text.replace(directive, value) -%}"
    "{%- endfor -%}{{- said.text -}}{%- endmacro %}\n"
)


def prompt_text(tokenizer: "PreTrainedTokenizerBase", system: str, user: str) -> str:
    """Render a system and a user message up to where the answer starts.

    A template that refuses or leaves out the system message gets its text at the beginning of the
    user's.

    Args:
        tokenizer: One with a chat template.
        system: What to do.
        user: The case.

    Raises:
        UserError: If the template fails, or does not print the messages as they are.
    """
    failure: Exception | None = None
    for messages in (
        [{"role": "system", "content": system}, {"role": "user", "content": user}],
        [{"role": "user", "content": f"{system}\n\n{user}"}],
    ):
        try:
            text = _render(tokenizer, messages)
            text.encode()  # half a character has no tokens
        # A template runs on whatever it was written for: any exception is its failure.
        except Exception as error:
            failure = error
            continue
        if system in text and user in text:
            return text
    reason = f"it fails with {type(failure).__name__}" if failure else "it leaves out their text"
    raise UserError(
        f"model.backbone: the chat template does not render a system and a user message: {reason}",
        fix="mend the template, or use an instruction-tuned Llama with a chat template",
    ) from failure


def prompt_tokens(tokenizer: "PreTrainedTokenizerBase", system: str, user: str) -> list[int]:
    """Render as ``prompt_text`` does, and tokenise; special tokens are the template's business."""
    text = prompt_text(tokenizer, system, user)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _render(tokenizer: "PreTrainedTokenizerBase", messages: Messages) -> str:
    template = tokenizer.get_chat_template()
    clock = []
    if "strftime_now" in template:
        template = _FROZEN_CLOCK + template
        now = datetime.datetime.combine(PROMPT_DATE, datetime.time(), datetime.UTC)
        clock = [[directive, now.strftime(directive)] for directive in _DIRECTIVES]
    text = tokenizer.apply_chat_template(
        messages,
        chat_template=template,
        add_generation_prompt=True,
        tokenize=False,
        **({_CLOCK: clock} if clock else {}),
    )
    return str(text)
