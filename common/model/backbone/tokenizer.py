"""A backbone's tokenizer: read without running its code, tried before use, fingerprinted."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.config import OWN_TEXT
from common.errors import UserError
from common.text.chat import prompt_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = (
    'Sex: F\nAge: > 89\nHeight: unknown\nDiagnoses:\n- \\u{a}Ménière\'s disease, <5 "years" & more'
)


def read_tokenizer(
    place: Path | str, name: str, *, vocabulary: int | None = None
) -> "PreTrainedTokenizerBase":
    """Read a tokenizer and try it.

    Args:
        place: Its folder, or a hub id that is in the local cache.
        name: The backbone as the configuration names it.
        vocabulary: Rows of the backbone's embedding; None where that is not known.

    Raises:
        UserError: If it cannot be read, has no end token, its template is missing, ambiguous,
            broken or not the same twice, or a token has no row in the embedding.
    """
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            place, local_files_only=True, trust_remote_code=False
        )
    # The tokenizers library raises a bare Exception for a file that it cannot parse.
    except Exception as error:
        raise UserError(
            f"model.backbone={name} has no readable tokenizer ({type(error).__name__})",
            fix="name a folder with tokenizer.json and tokenizer_config.json",
        ) from error
    _check(tokenizer, name, vocabulary)
    return tokenizer


def _check(tokenizer: "PreTrainedTokenizerBase", name: str, vocabulary: int | None) -> None:
    """Render a made-up prompt, and hold the tokens against the backbone's vocabulary."""
    templates = tokenizer.chat_template
    if not templates or tokenizer.eos_token_id is None:
        raise UserError(
            f"model.backbone={name}: the tokenizer has no chat template or no end token",
            fix="use an instruction-tuned Llama",
        )
    if isinstance(templates, dict) and "default" not in templates:
        raise UserError(
            f"model.backbone={name}: the tokenizer has several chat templates "
            f"({', '.join(sorted(templates))}) and none is the default",
            allowed="one chat template, or several with one named `default`",
            fix="name one of them `default` in tokenizer_config.json",
        )
    try:
        rendered = {prompt_text(tokenizer, OWN_TEXT.system_prompt, _PROBE) for _ in range(4)}
    except UserError as error:
        said = str(error.__cause__ or "").split("\n")[0]
        raise UserError(
            error.what.replace("model.backbone:", f"model.backbone={name}:")
            + (f" ({said})" if said else ""),
            fix=error.fix,
        ) from None
    if len(rendered) > 1:
        raise UserError(
            f"model.backbone={name}: the chat template renders one prompt in several ways",
            fix="use a template whose text follows from the messages alone",
        )
    if vocabulary is not None:
        ids = {**tokenizer.get_vocab(), str(tokenizer.eos_token): tokenizer.eos_token_id}
        token, highest = max(ids.items(), key=lambda entry: entry[1])
        if tokenizer.eos_token_id >= vocabulary:
            token, highest = f"the end token {tokenizer.eos_token}", tokenizer.eos_token_id
        if highest >= vocabulary:
            raise UserError(
                f"model.backbone={name}: the tokenizer gives {token} the id {highest}",
                allowed=f"ids below {vocabulary}, the rows of the backbone's embedding",
                fix="bring tokenizer and weights of one model together",
            )


def tokenizer_facts(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """Return what decides which tokens a prompt and an answer become, and back.

    Not the files: the same tokenizer saved by another version of transformers stays the same.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = backend.to_str() if backend else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return {
        "model": hashlib.sha256(model.encode()).hexdigest(),
        "special": {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
        "end": tokenizer.eos_token_id,
        "clean_up": bool(tokenizer.clean_up_tokenization_spaces),
        "template": tokenizer.get_chat_template(),
        "prompt": prompt_text(tokenizer, OWN_TEXT.system_prompt, _PROBE),
    }
