"""Configurations that say more than a Llama computes are refused with the reason."""

import pytest

from common.errors import UserError
from common.model.backbone.load import resolve_backbone


@pytest.fixture(scope="module")
def saved(tmp_path_factory, save_tiny):
    return save_tiny(tmp_path_factory.mktemp("llama") / "llama")


@pytest.fixture
def folder(saved):
    before = (saved / "config.json").read_text()
    yield saved
    (saved / "config.json").write_text(before)


@pytest.fixture
def refusal(folder, set_config):
    """What is said to a configuration with other settings."""

    def said(**settings) -> str:
        set_config(folder, **settings)
        with pytest.raises(UserError) as refused:
            resolve_backbone(str(folder), cache_dir=folder.parent / "cache")
        assert refused.value.exit_status == 2
        assert "\n" not in str(refused.value)
        return str(refused.value)

    return said


@pytest.mark.parametrize(
    ("settings", "how"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bits"),
        ({"quantization_config": {"load_in_8bit": True}}, "quantised"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "(gptq)"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "(awq)"),
        ({"quantization_config": {"quant_method": "fp8"}}, "(fp8)"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "(compressed-tensors)"),
    ],
)
def test_quantised_checkpoints(refusal, settings, how):
    said = refusal(**settings)
    assert how in said
    assert "allowed: weights in fp32, fp16 or bf16; fix: name the model" in said


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("quantize_config.json", "is quantised (quantize_config.json)"),
        ("quant_config.json", "is quantised (quant_config.json)"),
        ("adapter_config.json", "is an adapter"),
    ],
)
def test_what_lies_beside_the_weights(folder, refusal, file, words):
    (folder / file).write_text("{}")
    try:
        assert words in refusal()
    finally:
        (folder / file).unlink()


@pytest.mark.parametrize(
    "settings",
    [
        {"sliding_window": 128},
        {"attention_chunk_size": 64},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"is_causal": False},
        {"use_bidirectional_attention": True},
        {"attn_logit_softcapping": 50.0},
        {"no_rope_layers": [1, 0]},
        {"partial_rotary_factor": 0.5},
    ],
)
def test_attention_settings_that_a_llama_has_not(refusal, settings):
    key = next(iter(settings))
    assert f"{key}={settings[key]!r}" in refusal(**settings)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"rope_type": "proportional", "rope_theta": 1e4}, "rope_type='proportional'"),
        ({"rope_type": "of-tomorrow", "rope_theta": 1e4}, "rope_type='of-tomorrow'"),
        (
            {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5},
            "partial_rotary_factor=0.5",
        ),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "longrope", "short_factor": [1.0]}, "longrope"),
    ],
)
def test_rotary_settings_that_are_not_known(refusal, parameters, words):
    assert words in refusal(rope_parameters=parameters)


def test_neutral_settings_are_taken(folder, set_config):
    set_config(folder, sliding_window=None, use_sliding_window=False, is_causal=True)
    set_config(folder, partial_rotary_factor=1.0, attention_bias=False, quantization_config=None)
    taken = resolve_backbone(str(folder), cache_dir=folder.parent / "cache")
    assert taken.rope == "default"


def test_a_shape_that_gives_no_llama(refusal):
    assert "describes no Llama" in refusal(num_attention_heads=5)
