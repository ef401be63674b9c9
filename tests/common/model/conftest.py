"""Backbones in folders, made from the tiny Llama: as they come from elsewhere."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from common.model.backbone.tiny import tiny_config, tiny_model, tiny_tokenizer


def _save_tiny(folder: Path, *, shard_size: str = "5GB", template: Any = None) -> Path:
    """Save the tiny Llama with its tokenizer; in shards, or with another chat template."""
    tiny_model().save_pretrained(folder, max_shard_size=shard_size)
    tokenizer = tiny_tokenizer()
    if template is not None:
        tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def _set_config(folder: Path, **settings: Any) -> None:
    """Change keys of a folder's config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def _tiny_with(**settings: Any) -> LlamaForCausalLM:
    """The tiny Llama's weights under another configuration, as transformers runs it."""
    config = LlamaConfig(**(tiny_config().to_diff_dict() | settings))
    model = LlamaForCausalLM(config)
    model.load_state_dict(tiny_model().state_dict())
    return model.eval()


@pytest.fixture(scope="session")
def save_tiny() -> Callable[..., Any]:
    """See ``_save_tiny``."""
    return _save_tiny


@pytest.fixture(scope="session")
def set_config() -> Callable[..., Any]:
    """See ``_set_config``."""
    return _set_config


@pytest.fixture(scope="session")
def tiny_with() -> Callable[..., Any]:
    """See ``_tiny_with``."""
    return _tiny_with
