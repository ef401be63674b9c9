"""A Llama decoder layer that saves less and copies less, equal to transformers' own.

Packed training batches take this way; any other call (generation with a cache) takes
transformers' ``LlamaDecoderLayer.forward`` on the same modules. What a layer saves for the
backward pass, per token and in bf16: two norms' inputs, q, k, v, the attention's output, gate and
up, and the adapter's rank-wide product. Nothing else is needed while the backbone is frozen.

Shapes: T packed tokens, D hidden width, I MLP width, H heads, G key/value heads, E head width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM

from common.model.adapter.projections import Projections
from common.model.kernels.attention import Packing, attend
from common.model.kernels.elementwise import TORCH, Kernels, by_part, of_each_part
from common.model.kernels.frozen import QuantisedLinear
from common.model.kernels.rows import Parts
from common.undocumented.transformers_names import LlamaDecoderLayer

_FROZEN = (nn.Linear, QuantisedLinear)
KeepKeys = Callable[[int, Tensor, Tensor], None]
"""(layer, k_TGE, v_TGE): what packed prompts leave for generation."""


class LeanLayer(LlamaDecoderLayer):
    """Takes over the modules of a ``LlamaDecoderLayer``, under the same names."""

    def __init__(
        self, base: LlamaDecoderLayer, recompute: str, kernels: Kernels, *, last: bool
    ) -> None:
        nn.Module.__init__(self)
        # All of it, so that transformers' own forward finds what a later release adds.
        self.__dict__.update(base.__dict__)
        self.recompute, self.kernels, self.last = recompute, kernels, last
        attention, mlp = base.self_attn, base.mlp
        self.qkv = Projections(attention.q_proj, attention.k_proj, attention.v_proj)
        self.gate_up = Projections(mlp.gate_proj, mlp.up_proj)
        self.out, self.down = Projections(attention.o_proj), Projections(mlp.down_proj)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output, [1, T, D] for packed batches."""
        packing: Packing | None = kwargs.get("packing")
        if packing is None:
            return cast("Tensor", super().forward(hidden_states, *args, **kwargs))
        cos_TE, sin_TE = (t[0] for t in kwargs["position_embeddings"])
        at_N = kwargs.get("at") if self.last else None
        # Squeezed, for an index's gradient is zeros and a copy.
        x_TD = hidden_states.squeeze(0)
        inputs = (x_TD, cos_TE, sin_TE, packing, kwargs.get("keep"), at_N)
        if self.recompute == "all" and torch.is_grad_enabled():
            return cast("Tensor", checkpoint(self._layer, *inputs, use_reentrant=False))[None]
        return self._layer(*inputs)[None]

    def _layer(
        self,
        x_TD: Tensor,
        cos_TE: Tensor,
        sin_TE: Tensor,
        packing: Packing,
        keep: KeepKeys | None,
        at_N: Tensor | None,
    ) -> Tensor:
        attention, parts = self.self_attn, packing.rows
        kernels = by_part(self.kernels, parts)
        normed_TD, x_TD = rms_norm(x_TD, self.input_layernorm, kernels)
        width = attention.head_dim
        projected = self.qkv(normed_TD, parts)
        q_THE, k_TGE, v_TGE = (y_TO.view(len(x_TD), -1, width) for y_TO in projected)
        q_THE, k_TGE = _rotate(q_THE, k_TGE, cos_TE, sin_TE, kernels)
        if keep is not None:
            keep(attention.layer_idx, k_TGE, v_TGE)
        out_THE = attend(q_THE, k_TGE, v_TGE, attention.scaling, packing)
        out_TF = out_THE.reshape(len(x_TD), -1)
        if at_N is not None:
            # Past its attention, the last layer's other tokens are read by nobody.
            x_TD, out_TF = x_TD.index_select(0, at_N), out_TF.index_select(0, at_N)
            parts = packing.rows_at
        if self.recompute == "mlp" and torch.is_grad_enabled():
            # The sum alone is kept for it.
            x_TD = _add(x_TD, self.out, out_TF, parts)
            return cast("Tensor", checkpoint(self._mlp, x_TD, None, parts, use_reentrant=False))
        return self._mlp(x_TD, _projected(self.out, out_TF, parts), parts)

    def _mlp(self, x_TD: Tensor, beside_TD: Tensor | None, parts: Parts) -> Tensor:
        kernels = by_part(self.kernels, parts)
        normed_TD, x_TD = rms_norm(x_TD, self.post_attention_layernorm, kernels, beside_TD)
        gate_TI, up_TI = self.gate_up(normed_TD, parts)
        return _add(x_TD, self.down, _swiglu(gate_TI, up_TI, kernels), parts)


class LeanNorm(nn.Module):
    """The norm after the last layer, by the layers' kernels; takes the place of transformers'."""

    def __init__(self, base: nn.Module, kernels: Kernels) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = base.weight, base.variance_epsilon
        self.kernels = kernels

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the normed input, [..., D]."""
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        return rms_norm(x_TD, self, self.kernels)[0].view(hidden_states.shape)


class _OfEachPart(nn.Module):
    """A module of transformers' that works on each part's tokens by calls of its own."""

    def __init__(self, base: nn.Module, parts: tuple[int, ...]) -> None:
        super().__init__()
        self.base, self.parts = base, parts

    def forward(self, x: Tensor, position_ids: Tensor | None = None) -> Any:
        """Return what the base does for every part, joined along the tokens.

        Args:
            x: [1, T, D].
            position_ids: [1, T], of a rotary embedding.
        """

        def of_part(*rows: Tensor) -> Any:
            out = self.base(*(one[None] for one in rows))
            return out[0] if isinstance(out, Tensor) else tuple(one[0] for one in out)

        rows = [one[0] for one in (x, position_ids) if one is not None]
        out = of_each_part(of_part, self.parts, len(rows), *rows)
        return out[None] if isinstance(out, Tensor) else tuple(one[None] for one in out)


@contextmanager
def around_layers_by_part(
    core: Any, rows: tuple[int, ...], last: tuple[int, ...]
) -> Iterator[None]:
    """Let what stands around the layers work on each part's tokens by calls of its own.

    Args:
        core: With the rotary embedding before the layers, and the norm after them.
        rows: Offsets of the parts' tokens.
        last: The same of those that the last layer goes on with.
    """
    rope, norm = core.rotary_emb, core.norm
    core.rotary_emb, core.norm = _OfEachPart(rope, rows), _OfEachPart(norm, last)
    try:
        yield
    finally:
        core.rotary_emb, core.norm = rope, norm


def install(model: LlamaForCausalLM, recompute: str, kernels: Kernels = TORCH) -> None:
    """Put lean layers in the place of transformers' layers, sharing every module.

    Args:
        model: A frozen Llama.
        recompute: ``none``; ``mlp`` (each layer's MLP half); ``half`` (every second layer whole);
            ``all`` (every layer whole).
        kernels: Who does the elementwise work.
    """
    per_layer = {"half": ("all", "none")}.get(recompute, (recompute, recompute))
    layers = model.model.layers
    for place, layer in enumerate(layers):
        last = place == len(layers) - 1
        layers[place] = LeanLayer(layer, per_layer[place % 2], kernels, last=last)
    if kernels.by_row:
        model.model.norm = LeanNorm(model.model.norm, kernels)


def supported(model: LlamaForCausalLM) -> bool:
    """Say whether the lean layer computes what this model's layers compute."""
    config = model.config
    return config.hidden_act in ("silu", "swish") and not config.attention_dropout


def rms_norm(
    x_TD: Tensor, norm: nn.Module, kernels: Kernels, beside_TD: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the normed sum of ``x`` and what is beside it, and the sum for the residual way.

    Handing the sum through the same node lets its two gradients be added while they are in cache.
    """
    normed = _rms_norm(x_TD, beside_TD, norm.weight, norm.variance_epsilon, kernels)
    return cast("tuple[Tensor, Tensor]", normed)


def _projected(projections: Projections, x: Tensor, parts: Parts) -> Tensor:
    (projection,) = projections.modules
    # A linear map of all rows is torch's own node, which costs the host less.
    return cast("Tensor", projection(x) if parts is None else projections(x, parts)[0])


def _add(residual_TD: Tensor, projections: Projections, x: Tensor, parts: Parts) -> Tensor:
    """Return ``residual + projection(x)``, in the projection's memory where autograd allows it."""
    out_TD = _projected(projections, x, parts)
    fresh = type(projections.modules[0]) in _FROZEN
    return out_TD.add_(residual_TD) if fresh else residual_TD + out_TD


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        beside_TD: Tensor | None,
        weight_D: Tensor,
        epsilon: float,
        kernels: Kernels,
    ) -> tuple[Tensor, Tensor]:
        out_TD, total_TD, rstd_T1 = kernels.norm(x_TD, beside_TD, weight_D, epsilon)
        ctx.kernels, ctx.alone = kernels, beside_TD is None
        ctx.save_for_backward(total_TD, rstd_T1, weight_D)
        return out_TD, total_TD.view_as(x_TD) if ctx.alone else total_TD

    @staticmethod
    def backward(ctx: Any, d_out_TD: Tensor, d_total_TD: Tensor) -> tuple[Tensor | None, ...]:
        d_x_TD = ctx.kernels.norm_backward(d_out_TD, d_total_TD, *ctx.saved_tensors)
        return d_x_TD, None if ctx.alone else d_x_TD, None, None, None


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_TI: Tensor, up_TI: Tensor, kernels: Kernels) -> Tensor:
        ctx.kernels = kernels
        ctx.save_for_backward(gate_TI, up_TI)
        return kernels.swiglu(gate_TI, up_TI)

    @staticmethod
    def backward(ctx: Any, d_out_TI: Tensor) -> tuple[Tensor, Tensor, None]:
        return *ctx.kernels.swiglu_backward(d_out_TI, *ctx.saved_tensors), None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_THE: Tensor, k_TGE: Tensor, cos_TE: Tensor, sin_TE: Tensor, kernels: Kernels
    ) -> tuple[Tensor, Tensor]:
        ctx.kernels = kernels
        ctx.save_for_backward(cos_TE, sin_TE)
        return kernels.rotate(q_THE, k_TGE, cos_TE, sin_TE, False)

    @staticmethod
    def backward(ctx: Any, d_q_THE: Tensor, d_k_TGE: Tensor) -> tuple[Tensor | None, ...]:
        cos_TE, sin_TE = ctx.saved_tensors
        d_q_THE, d_k_TGE = ctx.kernels.rotate(d_q_THE, d_k_TGE, cos_TE, sin_TE, True)
        return d_q_THE, d_k_TGE, None, None, None


# torch's stubs leave Function.apply untyped.
_rms_norm: Any = _RmsNorm.apply
_swiglu: Any = _SwiGlu.apply
_rotate: Any = _Rotate.apply
