"""A skeleton has the names and shapes of transformers' Llama; only who computes needs that."""

import pytest
import torch
import transformers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from common.model.adapter.falora import AdapterSpec, attach
from common.model.adapter.layout import meta_adapter
from common.model.backbone.load import resolve_backbone
from common.model.backbone.skeleton import shaped_like
from common.model.backbone.tiny import tiny_config


def config_of(**settings) -> LlamaConfig:
    return LlamaConfig(**(tiny_config().to_diff_dict() | settings))


def real(config: LlamaConfig) -> nn.Module:
    with torch.device("meta"):
        return LlamaForCausalLM(config)


PLAIN = [
    {},
    {"tie_word_embeddings": False},
    {"attention_bias": True},
    {"mlp_bias": True},
    {"head_dim": 24, "num_hidden_layers": 3},
    {"num_key_value_heads": 4},
    {"num_key_value_heads": None, "head_dim": None},
    {"pad_token_id": None, "intermediate_size": 96},
]


@pytest.mark.parametrize("settings", PLAIN)
def test_names_shapes_and_order_are_the_models(settings):
    config = config_of(**settings)
    ours, theirs = shaped_like(config), real(config)
    assert type(ours) is not LlamaForCausalLM
    shapes = [[(n, t.shape) for n, t in one.state_dict().items()] for one in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert {t.device.type for t in ours.state_dict().values()} == {"meta"}
    linear = [
        [(n, m.in_features, m.out_features) for n, m in one.named_modules() if type(m) is nn.Linear]
        for one in (ours, theirs)
    ]
    assert linear[0] == linear[1]
    targets = ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj")
    adapters = [attach(one, AdapterSpec(rank=2, targets=targets)) for one in (ours, theirs)]
    assert list(adapters[0].shapes.items()) == list(adapters[1].shapes.items())
    assert adapters[0].a_fingerprint == adapters[1].a_fingerprint


@pytest.mark.parametrize("settings", [{"hidden_act": "gelu"}, {"pad_token_id": -1}])
def test_where_a_skeleton_says_too_little_it_is_the_model(settings):
    assert type(shaped_like(config_of(**settings))) is LlamaForCausalLM


@pytest.mark.parametrize(
    "settings", [{"hidden_act": "foo"}, {"pad_token_id": 5000}, {"head_dim": 0}, {"vocab_size": 0}]
)
def test_what_transformers_refuses_is_refused(settings):
    config = config_of(**settings)
    for build in (real, shaped_like):
        with pytest.raises((KeyError, AssertionError, ZeroDivisionError, ValueError)):
            build(config)


def test_a_run_that_does_not_compute_does_not_import_the_model(tmp_path, save_tiny, monkeypatch):
    folder = save_tiny(tmp_path / "llama")
    monkeypatch.setattr(transformers, "LlamaForCausalLM", None)
    spec = resolve_backbone(str(folder), cache_dir=tmp_path / "cache")
    assert meta_adapter(spec, AdapterSpec(rank=2)).trainable_parameters > 0
