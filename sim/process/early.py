"""What can be refused at once: before data is read, and before weights are hashed."""

from dataclasses import replace
from pathlib import Path

import torch

from common.config import Config
from common.evaluation.constrained import require_llguidance
from common.evaluation.formulary import read_formulary
from common.evaluation.interactions import read_interactions
from common.evaluation.metrics import drug_map_of
from common.model.adapter.layout import adapter_spec, meta_adapter
from common.model.backbone.known_shapes import KNOWN_SHAPES, shape_of
from common.model.backbone.load import BackboneSpec, load_tokenizer
from common.model.kernels.attention import choose_attention
from common.model.kernels.choice import choose_kernels
from common.model.kernels.frozen import choose_weights
from common.model.session import DTYPES, choose_device, choose_dtype

_UNREAD = "not read yet"


def check_settings(config: Config) -> None:
    """Check what needs neither data nor weights: device, adapter, tokenizer, other files.

    Raises:
        UserError: naming the key that cannot be had here.
    """
    check_device(config)
    drug_map_of(config.data)
    if config.evaluation.method == "generate" and config.evaluation.decoding == "grammar":
        require_llguidance()
    if config.evaluation.formulary:
        read_formulary(Path(config.evaluation.formulary).expanduser())
    if config.evaluation.interactions:
        read_interactions(Path(config.evaluation.interactions).expanduser())
    _check_backbone(config)


def check_device(config: Config) -> None:
    """Check that device, arithmetic and attention kernel are there.

    Raises:
        UserError: naming the key that cannot be had here.
    """
    on = torch.device(choose_device(config.train.device).value)
    arithmetic = DTYPES[choose_dtype(config.train.dtype, on).value]
    if config.model.attention != "auto":
        # `auto` finds a kernel anywhere; trying them takes a process that trains nothing seconds
        # of a GPU, and memory there until it ends.
        choose_attention(config.model.attention, on, arithmetic)
    choose_kernels(config.model.kernels, on)
    choose_weights(config.model.weights, on, arithmetic)


def _check_backbone(config: Config) -> None:
    """Check the adapter against the backbone's shape, and a folder's configuration and tokenizer.

    Of a backbone that may have to be fetched first, only what all Llamas share is checked.
    """
    name, adapter = config.model.backbone, adapter_spec(config.adapter)
    folder = Path(name).expanduser()
    if name not in ("tiny", *KNOWN_SHAPES) and folder.is_dir():
        spec = BackboneSpec(
            name=name, folder=folder, hub_id="", fingerprint=_UNREAD, shape=shape_of(name)
        )
        load_tokenizer(spec)
    else:
        if name != "tiny":
            adapter = replace(adapter, initialiser="kaiming-uniform")
        shape = shape_of("tiny")
        spec = BackboneSpec(name=name, folder=None, hub_id="", fingerprint=_UNREAD, shape=shape)
    meta_adapter(spec, adapter)
