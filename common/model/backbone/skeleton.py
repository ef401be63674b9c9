"""A Llama's modules by name and shape, without what computes in them.

Who only asks for shapes (a run's first process, the server) is spared the import of transformers'
model, which takes longer than the rest of it.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import LlamaConfig


def shaped_like(config: "LlamaConfig") -> nn.Module:
    """Return a Llama on the meta device: a skeleton, or where that says too little the model.

    Args:
        config: Of the Llama.

    Raises:
        Exception: Whatever transformers raises for a configuration that gives no model.
    """
    with torch.device("meta"):
        if _is_plain(config):
            return _Skeleton(config)
        from transformers import LlamaForCausalLM

        model: nn.Module = LlamaForCausalLM(config)
        return model


def _is_plain(config: "LlamaConfig") -> bool:
    """Whether transformers surely builds it: its own checks of these fields come with the model."""
    pad = config.pad_token_id
    return (
        config.hidden_act == "silu"
        and (config.head_dim or 0) > 0
        and config.num_hidden_layers > 0
        and (pad is None or 0 <= pad < config.vocab_size)
    )


class _Skeleton(nn.Module):
    def __init__(self, config: "LlamaConfig") -> None:
        super().__init__()
        width, vocabulary = config.hidden_size, config.vocab_size
        # Drawn by nobody (torch imports its compiler to draw them); torch leaves it untyped.
        of: Any = nn.Embedding.from_pretrained
        embedding: nn.Embedding = of(torch.empty(vocabulary, width), freeze=False)
        layers = [_layer(config) for _ in range(config.num_hidden_layers)]
        children = {"layers": nn.ModuleList(layers), "norm": nn.RMSNorm(width)}
        self.model = nn.ModuleDict({"embed_tokens": embedding, **children})
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = embedding.weight


def _layer(config: "LlamaConfig") -> nn.Module:
    width, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    bias, mlp_bias = config.attention_bias, config.mlp_bias
    attention = {
        "q_proj": nn.Linear(width, queries, bias=bias),
        "k_proj": nn.Linear(width, keys, bias=bias),
        "v_proj": nn.Linear(width, keys, bias=bias),
        "o_proj": nn.Linear(queries, width, bias=bias),
    }
    mlp = {
        "gate_proj": nn.Linear(width, inner, bias=mlp_bias),
        "up_proj": nn.Linear(width, inner, bias=mlp_bias),
        "down_proj": nn.Linear(inner, width, bias=mlp_bias),
    }
    norms = ("input_layernorm", "post_attention_layernorm")
    return nn.ModuleDict(
        {
            "self_attn": nn.ModuleDict(attention),
            "mlp": nn.ModuleDict(mlp),
            **{name: nn.RMSNorm(width) for name in norms},
        }
    )
