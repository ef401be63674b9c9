"""Adapted projections: ``y = x W^T + s (x A^T) B^T`` with a frozen W.

Projections that read the same input are computed by one call, ``Projections``: one product with
all their A's, and one node of the graph. It keeps ``x A^T`` (rank wide) instead of ``x``, unless A
is trained, and the gradient of B - or every packed segment's gradient of B, for differential
privacy - comes from the same backward pass.

Shapes: T packed tokens, D input width, O output width, R rank, G ranks of all A's, P trainable
parameters, S packed segments, U units (rows of a unit-gradient buffer).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.model.adapter.scheme import A, B
from common.model.kernels.frozen import (
    FrozenWeight,
    QuantisedLinear,
    input_gradient,
    products,
    shared_input,
)
from common.model.kernels.rows import Parts, add_product, product

if TYPE_CHECKING:
    from common.model.adapter.falora import Adapter


@dataclass(kw_only=True)
class UnitCapture:
    """Where the running backward pass puts each segment's gradient."""

    bounds: tuple[tuple[int, ...], tuple[int, ...]]
    """The segments' offsets among all tokens, and among those before labels."""
    rows: tuple[int, ...]
    out_UP: Tensor


class AdaptedLinear(nn.Module):
    """A frozen linear layer with its low-rank update; takes the place of the frozen one."""

    adapter: "Adapter"
    lora_A: Tensor
    lora_B: Tensor

    def __init__(self, base: nn.Linear | QuantisedLinear, key: str) -> None:
        super().__init__()
        self.weight: FrozenWeight = base.weight
        self.bias = base.bias
        self.in_features, self.out_features = base.in_features, base.out_features
        self.key = key
        self.merged_OD: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Return this projection alone, [..., O]; the name is the ``nn.Linear``'s."""
        if self.merged_OD is not None:
            return functional.linear(input, self.merged_OD, self.bias)
        output: Tensor = _adapted(input, (self,), (), None, self.lora_A, self.lora_B)[0]
        return output


class Projections:
    """All linear maps of one input: q, k and v of a layer, its gate and up.

    Args:
        modules: Frozen or adapted. The A's of the adapted ones move into one buffer, which their
            own are views of, unless A is trained.
    """

    def __init__(self, *modules: nn.Module) -> None:
        self.modules = modules
        self.adapted = [one for one in modules if isinstance(one, AdaptedLinear)]
        self.frozen = tuple(one for one in modules if not isinstance(one, AdaptedLinear))
        self._a_GD: Tensor | None = None
        if self.adapted and not any(isinstance(one.lora_A, nn.Parameter) for one in self.adapted):
            self._a_GD = torch.cat([one.lora_A for one in self.adapted])
            parts = self._a_GD.chunk(len(self.adapted))
            for module, a_RD in zip(self.adapted, parts, strict=True):
                module.lora_A = a_RD

    def __call__(self, x_TD: Tensor, parts: Parts = None) -> list[Tensor]:
        """Return every module's output, each [T, O].

        Args:
            x_TD: The input that all read.
            parts: Rows with products of their own (`common.model.kernels.rows`).
        """
        if any(one.merged_OD is not None for one in self.adapted):
            return [module(x_TD) for module in self.modules]
        outputs: dict[nn.Module, Tensor] = {}
        if one_node(x_TD) or parts is not None:
            if not self.adapted:
                return list(shared_input(x_TD, self.modules, parts))
            outputs |= self._adapted_outputs(x_TD, self.frozen, parts)
        for module in self.modules:
            if module not in outputs and isinstance(module, AdaptedLinear):
                outputs |= self._adapted_outputs(x_TD, ())
            elif module not in outputs:
                outputs[module] = module(x_TD)
        return [outputs[module] for module in self.modules]

    def _adapted_outputs(
        self, x_TD: Tensor, beside: tuple[nn.Module, ...], parts: Parts = None
    ) -> dict[nn.Module, Tensor]:
        modules = tuple(self.adapted)
        a_GD = torch.cat([one.lora_A for one in modules]) if self._a_GD is None else self._a_GD
        outputs = _adapted(x_TD, modules, beside, parts, a_GD, *(one.lora_B for one in modules))
        return dict(zip((*modules, *beside), outputs, strict=True))


def one_node(x: Tensor) -> bool:
    """Say whether frozen and adapted maps of one input are one node of the graph: on a GPU.

    It is the same function, but its gradients are added in another order: CPUs, whose runs are
    compared value by value, leave the sum to autograd.
    """
    return x.is_cuda


class _AdaptedFunction(torch.autograd.Function):
    """Adapted projections of one input, and frozen ones beside them, as one node of the graph."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        modules: tuple[AdaptedLinear, ...],
        beside: tuple[nn.Module, ...],
        parts: Parts,
        a_GD: Tensor,
        *bs: Tensor,
    ) -> Any:
        x_TD = x.reshape(-1, x.shape[-1])
        z_TG = product(x_TD, a_GD.to(x.dtype).T, parts)
        maps: tuple[Any, ...] = (*modules, *beside)
        # The weights are the modules' own, and frozen: nothing can change them in between.
        ctx.weights = [one.weight for one in maps]
        y_TOs = products(x_TD, ctx.weights, [one.bias for one in maps], parts)
        scale = modules[0].adapter.spec.scale
        for y_TO, b_OR, z_TR in zip(y_TOs, bs, z_TG.chunk(len(bs), 1), strict=False):
            add_product(y_TO, z_TR, b_OR.to(x.dtype).T, parts, scale)
        ctx.modules, ctx.shape, ctx.parts = modules, x.shape, parts
        ctx.a_trained, ctx.b_trained = ctx.needs_input_grad[4], any(ctx.needs_input_grad[5:])
        kept = z_TG if ctx.b_trained else None, x_TD if ctx.a_trained else None
        ctx.save_for_backward(*kept, a_GD, *bs)
        return tuple(y_TO.view(*x.shape[:-1], -1) for y_TO in y_TOs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        z_TG, x_TD, a_GD, *bs = ctx.saved_tensors
        adapter: Adapter = ctx.modules[0].adapter
        g_TOs = [g.reshape(-1, g.shape[-1]) for g in grads]
        d_x: Any = None
        low_TG: Any = None
        if ctx.needs_input_grad[0] or ctx.a_trained:
            low_TRs = [
                product(g, b_OR.to(g.dtype), ctx.parts) for g, b_OR in zip(g_TOs, bs, strict=False)
            ]
            low_TG = torch.cat(low_TRs, 1)
        if ctx.needs_input_grad[0]:
            d_x = input_gradient(list(zip(g_TOs, ctx.weights, strict=True)), ctx.parts)
            add_product(d_x, low_TG, a_GD.to(d_x.dtype), ctx.parts, adapter.spec.scale)
            d_x = d_x.view(ctx.shape)
        if adapter.capture is not None:
            _add_units(adapter, adapter.capture, ctx.modules, g_TOs, z_TG, low_TG, x_TD)
            return (d_x, *[None] * (4 + len(bs)))
        d_a, d_bs, scale = None, [None] * len(bs), adapter.spec.scale
        if ctx.a_trained:
            d_a = (low_TG.T @ x_TD).float().mul_(scale)
        if ctx.b_trained:
            pairs = zip(g_TOs, z_TG.chunk(len(bs), 1), strict=False)
            d_bs = [(g_TO.T @ z_TR).float().mul_(scale) for g_TO, z_TR in pairs]
        return d_x, None, None, None, d_a, *d_bs


# torch's stubs leave Function.apply untyped.
_adapted: Any = _AdaptedFunction.apply


def _add_units(
    adapter: "Adapter",
    capture: UnitCapture,
    modules: Sequence[AdaptedLinear],
    g_TOs: Sequence[Tensor],
    z_TG: Tensor | None,
    low_TG: Tensor | None,
    x_TD: Tensor | None,
) -> None:
    """Add every segment's gradient of B, of A, or of both, as was kept for, to its unit's row."""
    if z_TG is not None:
        for module, g_TO, z_TR in zip(modules, g_TOs, z_TG.chunk(len(modules), 1), strict=False):
            adapter.add_unit_products(f"{module.key}.{B}", capture, g_TO, z_TR)
    if x_TD is not None and low_TG is not None:
        for module, low_TR in zip(modules, low_TG.chunk(len(modules), 1), strict=True):
            adapter.add_unit_products(f"{module.key}.{A}", capture, low_TR, x_TD)
