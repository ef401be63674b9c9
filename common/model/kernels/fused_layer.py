"""A Llama decoder layer that saves less and copies less, equal to transformers' own.

Packed training batches take this way; any other call (generation with a cache) takes
transformers' ``LlamaDecoderLayer.forward`` on the same modules. What a layer saves for the
backward pass, per token and in bf16: two norms' inputs, q, k, v, the attention's output, gate and
up, and the adapter's rank-wide product. Nothing else is needed while the backbone is frozen.

Shapes: T packed tokens, D hidden width, I MLP width, H heads, E head width, F = E / 2.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM

from common.model.kernels.attention import Packing, attend
from common.undocumented.torch_names import silu_backward
from common.undocumented.transformers_names import LlamaDecoderLayer

# Rows that are worked on at a time on a CPU, so that fp32 intermediates stay in its cache.
_CPU_ROWS = 256


class LeanLayer(LlamaDecoderLayer):
    """Takes over the modules of a ``LlamaDecoderLayer``, under the same names."""

    def __init__(self, base: LlamaDecoderLayer, recompute: str) -> None:
        nn.Module.__init__(self)
        # All of it, so that transformers' own forward finds what a later release adds.
        self.__dict__.update(base.__dict__)
        self.recompute = recompute

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output, [1, T, D] for packed batches."""
        packing: Packing | None = kwargs.get("packing")
        if packing is None:
            return cast("Tensor", super().forward(hidden_states, *args, **kwargs))
        cos_TE, sin_TE = (t[0] for t in kwargs["position_embeddings"])
        inputs = (hidden_states[0], cos_TE, sin_TE, packing)
        if self.recompute == "all" and torch.is_grad_enabled():
            return cast("Tensor", checkpoint(self._layer, *inputs, use_reentrant=False))[None]
        return self._layer(*inputs)[None]

    def _layer(self, x_TD: Tensor, cos_TE: Tensor, sin_TE: Tensor, packing: Packing) -> Tensor:
        x_TD = self._attention(x_TD, cos_TE, sin_TE, packing)
        if self.recompute == "mlp" and torch.is_grad_enabled():
            return cast("Tensor", checkpoint(self._mlp, x_TD, use_reentrant=False))
        return self._mlp(x_TD)

    def _attention(self, x_TD: Tensor, cos_TE: Tensor, sin_TE: Tensor, packing: Packing) -> Tensor:
        attention = self.self_attn
        normed_TD, x_TD = rms_norm(x_TD, self.input_layernorm)
        width = attention.head_dim
        q_THE = attention.q_proj(normed_TD).view(len(x_TD), -1, width)
        k_TGE = attention.k_proj(normed_TD).view(len(x_TD), -1, width)
        v_TGE = attention.v_proj(normed_TD).view(len(x_TD), -1, width)
        q_THE, k_TGE = rotate(q_THE, cos_TE, sin_TE), rotate(k_TGE, cos_TE, sin_TE)
        out_THE = attend(q_THE, k_TGE, v_TGE, attention.scaling, packing)
        return _add(x_TD, attention.o_proj, out_THE.reshape(len(x_TD), -1))

    def _mlp(self, x_TD: Tensor) -> Tensor:
        normed_TD, x_TD = rms_norm(x_TD, self.post_attention_layernorm)
        gate_TI, up_TI = self.mlp.gate_proj(normed_TD), self.mlp.up_proj(normed_TD)
        return _add(x_TD, self.mlp.down_proj, swiglu(gate_TI, up_TI))


def install(model: LlamaForCausalLM, recompute: str) -> None:
    """Put lean layers in the place of transformers' layers, sharing every module.

    Args:
        model: A frozen Llama.
        recompute: ``none``; ``mlp`` (each layer's MLP half); ``half`` (every second layer whole);
            ``all`` (every layer whole).
    """
    per_layer = {"half": ("all", "none")}.get(recompute, (recompute, recompute))
    layers = model.model.layers
    for place, layer in enumerate(layers):
        layers[place] = LeanLayer(layer, per_layer[place % 2])


def supported(model: LlamaForCausalLM) -> bool:
    """Say whether the lean layer computes what this model's layers compute."""
    config = model.config
    return config.hidden_act in ("silu", "swish") and not config.attention_dropout


def rms_norm(x_TD: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the normed input, and the input itself for the residual way.

    Handing ``x`` through the same node lets its two gradients be added while they are in cache.
    """
    return cast("tuple[Tensor, Tensor]", _rms_norm(x_TD, norm.weight, norm.variance_epsilon))


def swiglu(gate_TI: Tensor, up_TI: Tensor) -> Tensor:
    """Return ``silu(gate) * up``; saves its two inputs and nothing else."""
    return cast("Tensor", _swiglu(gate_TI, up_TI))


def rotate(x_THE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """Apply rotary position embeddings (Su et al., 2021), halves rotated against each other."""
    return cast("Tensor", _rotate(x_THE, cos_TE, sin_TE))


def _add(residual_TD: Tensor, projection: nn.Module, x: Tensor) -> Tensor:
    """Return ``residual + projection(x)``, in the projection's memory where autograd allows it."""
    out_TD: Tensor = projection(x)
    return out_TD.add_(residual_TD) if type(projection) is nn.Linear else residual_TD + out_TD


def _row_blocks(x: Tensor) -> range:
    return range(0, len(x), _CPU_ROWS if x.device.type == "cpu" else max(1, len(x)))


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_D: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        out_TD = torch.empty_like(x_TD)
        rstd_T1 = torch.empty(len(x_TD), 1, dtype=torch.float32, device=x_TD.device)
        blocks = _row_blocks(x_TD)
        for start in blocks:
            rows = slice(start, start + blocks.step)
            wide = x_TD[rows].float()
            mean_square = wide.square().mean(1, keepdim=True)
            rstd_T1[rows] = mean_square.add_(epsilon).rsqrt_()
            # transformers rounds to the input's dtype before the weight; so do we.
            torch.mul((wide * rstd_T1[rows]).to(x_TD.dtype), weight_D, out=out_TD[rows])
        ctx.save_for_backward(x_TD, rstd_T1, weight_D)
        return out_TD, x_TD.view_as(x_TD)

    @staticmethod
    def backward(ctx: Any, d_out_TD: Tensor, d_x_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, rstd_T1, weight_D = ctx.saved_tensors
        total_TD = torch.empty_like(x_TD)
        blocks = _row_blocks(x_TD)
        for start in blocks:
            rows = slice(start, start + blocks.step)
            normed = x_TD[rows] * rstd_T1[rows]
            d_normed = (d_out_TD[rows] * weight_D).float()
            inner = (d_normed * normed).mean(1, keepdim=True)
            d_normed.addcmul_(normed, inner, value=-1.0).mul_(rstd_T1[rows])
            torch.add(d_normed, d_x_TD[rows], out=d_normed)
            total_TD[rows] = d_normed
        return total_TD, None, None


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_TI: Tensor, up_TI: Tensor) -> Tensor:
        ctx.save_for_backward(gate_TI, up_TI)
        return functional.silu(gate_TI).mul_(up_TI)

    @staticmethod
    def backward(ctx: Any, d_out_TI: Tensor) -> tuple[Tensor, Tensor]:
        gate_TI, up_TI = ctx.saved_tensors
        d_gate_TI = silu_backward(d_out_TI * up_TI, gate_TI)
        return d_gate_TI, functional.silu(gate_TI).mul_(d_out_TI)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_THE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TE, sin_TE)
        return _rotated(x_THE, cos_TE, sin_TE)

    @staticmethod
    def backward(ctx: Any, d_out_THE: Tensor) -> tuple[Tensor, None, None]:
        cos_TE, sin_TE = ctx.saved_tensors
        # A rotation's transpose is the rotation by the opposite angle.
        return _rotated(d_out_THE, cos_TE, -sin_TE), None, None


def _rotated(x_THE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    half = x_THE.shape[-1] // 2
    cos_T1F, sin_T1F = cos_TE[:, None, :half], sin_TE[:, None, :half]
    first, second = x_THE[..., :half], x_THE[..., half:]
    out_THE = torch.empty_like(x_THE)
    torch.mul(first, cos_T1F, out=out_THE[..., :half]).addcmul_(second, sin_T1F, value=-1.0)
    torch.mul(second, cos_T1F, out=out_THE[..., half:]).addcmul_(first, sin_T1F)
    return out_THE


# torch's stubs leave Function.apply untyped.
_rms_norm: Any = _RmsNorm.apply
_swiglu: Any = _SwiGlu.apply
_rotate: Any = _Rotate.apply
