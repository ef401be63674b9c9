"""Frozen linear maps: their weight appears in the forward product and in the input's gradient.

A frozen weight has no gradient of its own, so a format needs two products and nothing else. Both
directions read the same quantised weight, so a gradient is that of the function that was computed,
and the rows of an input do not touch each other. In fp8 (e4m3) every output row of the weight has
one scale, and so has every token of an input or a gradient. In nf4 (Dettmers et al., 2023,
arXiv 2305.14314) blocks of 64 weights share a scale; a weight is dequantised for each product,
which is then one in the backbone's own arithmetic.

Shapes: T packed tokens, D input width, O output width.
"""

import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from common.choice import Choice
from common.errors import SettingError
from common.model.kernels.choice import kernels_named
from common.model.kernels.elementwise import Kernels
from common.model.kernels.nf4 import Nf4Weight, blockwise, nf4_obstacle
from common.model.kernels.rows import Parts, add_product, product
from common.provenance import pip_install
from common.undocumented.torch_names import scaled_mm

WEIGHTS = ("bf16", "fp8", "nf4")
HEAD = {"lm_head"}
"""Neither quantised nor adapted: the loss reads the head's weights, not its module."""


@dataclass(frozen=True, kw_only=True)
class Fp8Weight:
    """A quantised weight [O, D]: ``values * scales``."""

    values_OD: Tensor
    scales_O1: Tensor
    """fp32."""
    kernels: Kernels
    """Who quantises and transposes."""

    @classmethod
    def of(cls, weight_OD: Tensor, kernels: Kernels) -> "Fp8Weight":
        """Quantise a weight, one scale for each output."""
        values_OD, scales_O1 = kernels.quantise(weight_OD.detach(), None)
        return cls(values_OD=values_OD, scales_O1=scales_O1, kernels=kernels)

    def float(self) -> Tensor:
        """Return it in fp32, as it is used."""
        return self.values_OD.float() * self.scales_O1

    def product(
        self, x_values: Tensor, x_scales: Tensor, dtype: torch.dtype, parts: Parts = None
    ) -> Tensor:
        """Return ``x W^T``, [T, O], of a quantised ``x``."""
        return _scaled(x_values, x_scales, self.values_OD, self.scales_O1, dtype, parts)

    def gradient(self, g_TO: Tensor, parts: Parts = None) -> Tensor:
        """Return ``g W``, [T, D]: the weight's scales go to ``g`` before it is quantised."""
        g_values, g_scales = self.kernels.quantise(g_TO, self.scales_O1.view(-1))
        # The product wants both operands along the summed dimension; one copy of the weight is
        # turned when it is needed, where a second one would cost as much memory as it saved.
        turned_DO = self.kernels.transpose(self.values_OD)
        ones_D1 = torch.ones(len(turned_DO), 1, dtype=torch.float32, device=g_TO.device)
        return _scaled(g_values, g_scales, turned_DO, ones_D1, g_TO.dtype, parts)


def _scaled(
    left_TK: Tensor,
    left_T1: Tensor,
    right_NK: Tensor,
    right_N1: Tensor,
    dtype: torch.dtype,
    parts: Parts,
) -> Tensor:
    """Return ``(left * scales) (right * scales)^T`` with fp32 accumulation, [T, N]."""
    if left_TK.device.type != "cuda":
        product_TN = product(left_TK.float(), right_NK.float().T, parts)
        return (product_TN * left_T1 * right_N1.view(1, -1)).to(dtype)
    found = [
        scaled_mm(
            left_TK[start:stop],
            right_NK.T,
            # A part's scales begin anywhere, and cuBLAS wants 16 bytes (seen refused on an H200).
            scale_a=left_T1[start:stop].clone() if start % 4 else left_T1[start:stop],
            scale_b=right_N1.view(1, -1),
            out_dtype=dtype,
            use_fast_accum=True,
        )
        for start, stop in itertools.pairwise(parts or (0, len(left_TK)))
    ]
    return found[0] if len(found) == 1 else torch.cat(found)


FrozenWeight = Tensor | Fp8Weight | Nf4Weight
_TURN = threading.Lock()
"""Triton (3.6) readies a kernel on its first call without a lock."""


@dataclass(frozen=True, kw_only=True)
class Quantiser:
    """Puts weights of frozen linear maps into fp8 or nf4, called by one thread or by several."""

    weights: str
    """``fp8`` or ``nf4``."""
    kernels: Kernels
    """Who quantises to fp8."""

    def __post_init__(self) -> None:
        """Import what nf4 needs: that is not for several threads at once."""
        if self.weights == "nf4":
            blockwise()

    def of(self, weight_OD: Tensor) -> Fp8Weight | Nf4Weight:
        """Quantise a weight where it lies."""
        with _TURN:
            if self.weights == "nf4":
                return Nf4Weight.of(weight_OD)
            return Fp8Weight.of(weight_OD, self.kernels)


def quantiser_of(weights: str, kernels: str) -> Quantiser | None:
    """Return what quantises, or None where weights stay in the backbone's arithmetic.

    Args:
        weights: As ``choose_weights`` chose.
        kernels: As ``choose_kernels`` chose.
    """
    if weights not in ("fp8", "nf4"):
        return None
    return Quantiser(weights=weights, kernels=kernels_named(kernels))


def products(
    x_TD: Tensor,
    weights: Sequence[FrozenWeight],
    biases: Sequence[Tensor | None],
    parts: Parts = None,
) -> list[Tensor]:
    """Return ``x W^T + bias`` of projections of one input, each [T, O] in memory of its own."""
    outputs = []
    quantised: tuple[Tensor, Tensor] | None = None
    for weight, bias_O in zip(weights, biases, strict=True):
        if not isinstance(weight, Fp8Weight):
            outputs.append(product(x_TD, _dense(weight).T, parts, bias_O))
            continue
        quantised = quantised or weight.kernels.quantise(x_TD, None)
        out_TO = weight.product(*quantised, x_TD.dtype, parts)
        outputs.append(out_TO if bias_O is None else out_TO.add_(bias_O))
    return outputs


def input_gradient(pairs: Sequence[tuple[Tensor, FrozenWeight]], parts: Parts = None) -> Tensor:
    """Return the sum of ``g W`` over projections of one input, [T, D]."""
    total_TD: Tensor | None = None
    for g_TO, weight in pairs:
        if isinstance(weight, Fp8Weight):
            found_TD = weight.gradient(g_TO, parts)
            total_TD = found_TD if total_TD is None else total_TD.add_(found_TD)
        elif total_TD is None:
            total_TD = product(g_TO, _dense(weight), parts)
        else:
            add_product(total_TD, g_TO, _dense(weight), parts)
    assert total_TD is not None
    return total_TD


def _dense(weight: Tensor | Nf4Weight) -> Tensor:
    return weight if isinstance(weight, Tensor) else weight.dense()


class QuantisedLinear(nn.Module):
    """A frozen linear layer in another format; takes the place of an ``nn.Linear``."""

    def __init__(self, base: nn.Linear, weight: FrozenWeight) -> None:
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.bias, self.weight = base.bias, weight

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input W^T + bias``, [..., O]."""
        if input.ndim == 2:  # as it is, so that the residual can be added in its memory
            return shared_input(input, (self,))[0]
        flat_TD = input.reshape(-1, input.shape[-1])
        return shared_input(flat_TD, (self,))[0].view(*input.shape[:-1], -1)


def shared_input(
    x_TD: Tensor, modules: Sequence[nn.Module], parts: Parts = None
) -> tuple[Tensor, ...]:
    """Return the outputs of frozen linear layers that read the same input, each [T, O].

    One node of the graph: the input is quantised once, and its gradients are summed within the
    products instead of by passes over memory.

    Args:
        x_TD: The input.
        modules: ``nn.Linear`` or ``QuantisedLinear``, frozen.
        parts: Rows with products of their own (`common.model.kernels.rows`).
    """
    maps: Sequence[Any] = modules
    weights, biases = [one.weight for one in maps], [one.bias for one in maps]
    outputs = _shared_input(x_TD, weights, biases, parts)
    return cast("tuple[Tensor, ...]", outputs)


class _SharedInput(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weights: Any, biases: Any, parts: Parts
    ) -> tuple[Tensor, ...]:
        ctx.weights, ctx.parts = weights, parts
        return tuple(products(x_TD, weights, biases, parts))

    @staticmethod
    def backward(ctx: Any, *g_TOs: Tensor) -> tuple[Tensor, None, None, None]:
        pairs = list(zip(g_TOs, ctx.weights, strict=True))
        return input_gradient(pairs, ctx.parts), None, None, None


# torch's stubs leave Function.apply untyped.
_shared_input: Any = _SharedInput.apply


def choose_weights(requested: str, device: torch.device, dtype: torch.dtype) -> Choice[str]:
    """Choose the format of the frozen weights.

    Args:
        requested: One of ``WEIGHTS``; ``bf16`` means: in the arithmetic of the backbone.
        device: Where the backbone is.
        dtype: Its arithmetic.

    Raises:
        UserError: If the format cannot be had here. It is never replaced by another one: hospitals
            that train together must compute the same function.
    """
    if requested not in WEIGHTS:
        raise SettingError(f"model.weights={requested!r}", allowed=", ".join(WEIGHTS))
    if requested == "bf16":
        name = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
        return Choice(name, "as train.dtype computes")
    obstacle = nf4_obstacle() if requested == "nf4" else fp8_obstacle(device, dtype)
    if obstacle:
        raise SettingError(
            f"model.weights={requested} cannot run here: {obstacle}",
            fix="set model.weights=bf16"
            + (f", or {pip_install('bitsandbytes')}" if requested == "nf4" else ""),
        )
    return Choice(requested, "asked for")


def fp8_obstacle(device: torch.device, dtype: torch.dtype) -> str:
    """Say why weights cannot be in fp8 here, or return nothing."""
    if device.type != "cuda":
        return f"fp8 products need a CUDA device, not {device.type}"
    if torch.cuda.get_device_capability(device) < (8, 9):
        return "fp8 products need compute capability 8.9"
    if dtype != torch.bfloat16:
        return "fp8 needs train.dtype=bf16"
    return ""


def quantise(model: nn.Module, quantiser: Quantiser) -> None:
    """Quantise the frozen linear maps of a model's layers that are not so yet, in place.

    Embeddings and the language-model head keep their dtype.

    Args:
        model: A Llama without adapter.
        quantiser: What they become.
    """
    for name in [name for name, one in model.named_modules() if isinstance(one, nn.Linear)]:
        if name.rpartition(".")[2] not in HEAD:
            # Nothing else holds it, so that its memory is free when it has been replaced.
            linear: Any = model.get_submodule(name)
            replace_linear(model, name, quantiser.of(linear.weight))


def replace_linear(model: nn.Module, name: str, weight: FrozenWeight) -> None:
    """Put a weight in the place of a linear layer's own; its bias stays."""
    parent, _, child = name.rpartition(".")
    linear: Any = model.get_submodule(name)
    setattr(model.get_submodule(parent), child, QuantisedLinear(linear, weight))
