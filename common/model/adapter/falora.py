"""FA-LoRA: low-rank adapters whose A is drawn once and frozen, and whose B is trained.

``y = x W^T + s (x A^T) B^T`` with ``s = alpha / rank`` (FFA-LoRA, Sun et al., ICLR 2024,
arXiv 2403.12313). Only B is trained, kept and sent. One autograd function does the whole
projection: it keeps ``x A^T`` (rank wide) instead of ``x``, and the gradient of B - or every
packed segment's gradient of B, for differential privacy - comes from the same backward pass.

Shapes: T packed tokens, D input width, O output width, R rank, P trainable parameters,
S packed segments, U units (rows of a unit-gradient buffer).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from common.errors import UserError
from common.model.adapter.spec import AdapterSpec, HashedA, draw_a
from common.model.kernels.elementwise import Kernels
from common.model.kernels.frozen import (
    Fp8Weight,
    FrozenWeight,
    frozen_weight,
    input_gradient,
    products,
)

__all__ = ["AdaptedLinear", "Adapter", "AdapterSpec", "attach", "draw_a"]
HEAD = {"lm_head"}
"""Never adapted: the loss reads the head's weights, not its module."""

# Projections that read the same input: one product with all their A's serves the whole group.
_SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(kw_only=True)
class _UnitCapture:
    """Where the running backward pass puts each segment's gradient."""

    bounds: tuple[int, ...]
    rows: tuple[int, ...]
    out_UP: Tensor


class _Group:
    """Adapted projections that read the same input, computed together.

    The first projection that is called computes all of them; the others find their output ready.
    """

    def __init__(self, adapter: "Adapter", modules: Sequence["AdaptedLinear"]) -> None:
        self.adapter = adapter
        self.modules = tuple(modules)
        self._input: Tensor | None = None
        self._ready: dict[int, Tensor] = {}
        if adapter.spec.mode == "fa-lora":
            # One buffer, so that x A^T is one product; the modules' A are views of it.
            self.a_GD = torch.cat([module.lora_A.detach() for module in modules])
            for module, a_RD in zip(modules, self.a_GD.chunk(len(modules)), strict=True):
                module.lora_A = a_RD

    def output(self, module: "AdaptedLinear", x: Tensor) -> Tensor:
        """Return one member's output for ``x``, [..., O]."""
        if self._input is not x or id(module) not in self._ready:
            outputs = self._compute(x)
            self._ready = {id(member): y for member, y in zip(self.modules, outputs, strict=True)}
            self._input = x
        y = self._ready.pop(id(module))
        if not self._ready:
            self._input = None
        return y

    def _compute(self, x: Tensor, beside: Sequence[nn.Module] = ()) -> tuple[Tensor, ...]:
        if self.adapter.spec.mode == "fa-lora":
            a_GD = self.a_GD
        else:
            a_GD = torch.cat([module.lora_A for module in self.modules])
        flat: list[Any] = []
        for module in self.modules:
            flat += [module.weight, module.bias, module.lora_B]
        return cast("tuple[Tensor, ...]", _adapted(x, self, tuple(beside), a_GD, *flat))

    def together(self, x: Tensor, modules: Sequence[nn.Module]) -> list[Tensor]:
        """Return the outputs of projections of one input, this group's and frozen ones."""
        beside = [module for module in modules if module not in self.modules]
        outputs = self._compute(x, beside)
        order = [*self.modules, *beside]
        return [outputs[order.index(module)] for module in modules]


class _AdaptedFunction(torch.autograd.Function):
    """The adapted projections of one group as one node of the graph."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        group: _Group,
        beside: tuple[Any, ...],
        a_GD: Tensor,
        *tensors: Any,
    ) -> Any:
        triples = [tensors[i : i + 3] for i in range(0, len(tensors), 3)]
        scale = group.adapter.spec.scale
        x_TD = x.reshape(-1, x.shape[-1])
        z_TG = x_TD @ a_GD.to(x.dtype).T
        weights, biases, bs = zip(*triples, strict=True)
        weights = *weights, *map(frozen_weight, beside)
        y_TOs = products(x_TD, weights, (*biases, *(module.bias for module in beside)))
        outputs = []
        for y_TO, b_OR, z_TR in zip(y_TOs, bs, z_TG.chunk(len(bs), 1), strict=False):
            y_TO.addmm_(z_TR, b_OR.to(x.dtype).T, alpha=scale)
            outputs.append(y_TO.view(*x.shape[:-1], -1))
        outputs += [y_TO.view(*x.shape[:-1], -1) for y_TO in y_TOs[len(bs) :]]
        ctx.group, ctx.shape = group, x.shape
        ctx.keeps_x = ctx.needs_input_grad[3]
        # The weights are the modules' own, and frozen: nothing can change them in between.
        ctx.weights = weights
        ctx.save_for_backward(z_TG, a_GD, *([x_TD] if ctx.keeps_x else []), *bs)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        z_TG, a_GD, *bs = ctx.saved_tensors
        x_TD = bs.pop(0) if ctx.keeps_x else None
        group: _Group = ctx.group
        spec = group.adapter.spec
        g_TOs = [g.reshape(-1, g.shape[-1]) for g in grads]
        d_x = d_a = None
        if ctx.needs_input_grad[0] or ctx.keeps_x:
            low_TG = torch.cat(
                [g_TO @ b_OR.to(g_TO.dtype) for g_TO, b_OR in zip(g_TOs, bs, strict=False)], 1
            )
            if ctx.needs_input_grad[0]:
                d_x = input_gradient(list(zip(g_TOs, ctx.weights, strict=True)))
                d_x.addmm_(low_TG, a_GD.to(d_x.dtype), alpha=spec.scale)
                d_x = d_x.view(ctx.shape)
        capture = group.adapter.capture
        d_bs: list[Tensor | None] = []
        for module, g_TO, z_TR in zip(group.modules, g_TOs, z_TG.chunk(len(bs), 1), strict=False):
            if capture is None:
                d_bs.append((g_TO.T @ z_TR).float().mul_(spec.scale))
            else:
                group.adapter.add_unit_products(module.key + ".lora_B", capture, g_TO, z_TR)
                d_bs.append(None)
        if x_TD is not None and capture is None:
            d_a = (low_TG.T @ x_TD).float().mul_(spec.scale)
        elif x_TD is not None and capture is not None:
            for module, low_TR in zip(group.modules, low_TG.chunk(len(bs), 1), strict=True):
                group.adapter.add_unit_products(module.key + ".lora_A", capture, low_TR, x_TD)
        return d_x, None, None, d_a, *(t for d_b in d_bs for t in (None, None, d_b))


# torch's stubs leave Function.apply untyped.
_adapted: Any = _AdaptedFunction.apply


class AdaptedLinear(nn.Module):
    """A frozen linear layer with its low-rank update; takes the place of the ``nn.Linear``."""

    group: _Group
    lora_A: Tensor
    lora_B: Tensor

    def __init__(self, base: nn.Linear, key: str) -> None:
        super().__init__()
        self.weight: FrozenWeight = base.weight
        self.bias = base.bias
        self.in_features, self.out_features = base.in_features, base.out_features
        self.dtype = base.weight.dtype
        self.key = key
        self.merged_OD: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Return ``x W^T + s (x A^T) B^T``, [..., O]; the name is the ``nn.Linear``'s."""
        if self.merged_OD is not None:
            return functional.linear(input, self.merged_OD, self.bias)
        return self.group.output(self, input)

    def quantise(self, kernels: Kernels) -> None:
        """Put the frozen weight into fp8."""
        assert isinstance(self.weight, Tensor)
        quantised = Fp8Weight.of(self.weight, kernels)
        del self.weight
        self.weight = quantised


class Adapter:
    """The trainable state of one model: a flat fp32 buffer that the modules' B are views of.

    Attributes:
        spec: What was attached.
        flat: [P] fp32; trainable values in the order of ``keys`` (B; with A in mode ``lora``).
        flat_grad: [P] fp32; the parameters' ``grad`` are views of it.
        keys: Sorted wire keys.
        shapes: Shape of each key.
        capture: Set while unit gradients are collected, see ``unit_gradients``.
    """

    def __init__(self, model: nn.Module, spec: AdapterSpec) -> None:
        self.spec = spec
        self.capture: _UnitCapture | None = None
        self.modules = _replace_targets(model, spec)
        shapes: dict[str, tuple[int, int]] = {}
        for module in self.modules:
            shapes[module.key + ".lora_B"] = (module.out_features, spec.rank)
            if spec.mode == "lora":
                shapes[module.key + ".lora_A"] = (spec.rank, module.in_features)
        self.keys = tuple(sorted(shapes))
        self.shapes = {key: shapes[key] for key in self.keys}
        device = self.modules[0].weight.device
        size = sum(math.prod(shape) for shape in shapes.values())
        self.flat = torch.zeros(size, dtype=torch.float32, device=device)
        self.flat_grad = torch.zeros_like(self.flat)
        self.slices: dict[str, slice] = {}
        start = 0
        for key in self.keys:
            stop = start + math.prod(shapes[key])
            self.slices[key] = slice(start, stop)
            start = stop
        self._initial_a = HashedA(spec)
        for module in self.modules:
            self._bind(module)
        self.a_fingerprint = self._initial_a.digest()
        for group in _grouped(self.modules):
            shared = _Group(self, group)
            for module in group:
                module.group = shared

    def _bind(self, module: AdaptedLinear) -> None:
        module.lora_B = self._parameter(module.key + ".lora_B")
        device, dtype = module.weight.device, module.dtype
        # Drawn on the meta device too: a server without weights knows A's fingerprint by it.
        drawn = draw_a(self.spec, module.key, module.in_features)
        self._initial_a.add(module.key, drawn)
        a_RD = torch.from_numpy(drawn).to(device)
        if self.spec.mode == "lora":
            module.lora_A = self._parameter(module.key + ".lora_A")
            module.lora_A.data.copy_(a_RD)
        else:
            module.register_buffer("lora_A", a_RD.to(dtype), persistent=False)

    def _parameter(self, key: str) -> nn.Parameter:
        where, shape = self.slices[key], self.shapes[key]
        parameter = nn.Parameter(self.flat[where].view(shape))
        parameter.grad = self.flat_grad[where].view(shape)
        return parameter

    @property
    def trainable_parameters(self) -> int:
        """Number of trained values P."""
        return self.flat.numel()

    def state(self) -> dict[str, NDArray[np.float32]]:
        """Return fp32 copies of the trainable matrices by wire key."""
        host = self.flat.detach().cpu().numpy().copy()
        return {key: host[self.slices[key]].reshape(self.shapes[key]).copy() for key in self.keys}

    def load(self, state: Mapping[str, NDArray[np.float32]]) -> None:
        """Set the trainable matrices.

        Raises:
            ValueError: If a key is missing or unknown, or a shape or dtype differs; nothing is
                changed then.
        """
        if set(state) != set(self.keys):
            missing, extra = set(self.keys) - set(state), set(state) - set(self.keys)
            raise ValueError(
                f"adapter keys differ: missing {sorted(missing)}, extra {sorted(extra)}"
            )
        for key, shape in self.shapes.items():
            if tuple(state[key].shape) != shape or state[key].dtype != np.float32:
                raise ValueError(
                    f"{key} is {state[key].dtype} {tuple(state[key].shape)}, not float32 {shape}"
                )
        host = np.concatenate([np.ravel(state[key]) for key in self.keys])
        self.flat.copy_(torch.from_numpy(host))

    def a_state(self) -> dict[str, NDArray[np.float32]]:
        """Return A by wire key in fp32, as drawn (mode ``lora``: as trained so far)."""
        return {
            module.key + ".lora_A": (
                module.lora_A.detach().cpu().numpy().copy()
                if self.spec.mode == "lora"
                else draw_a(self.spec, module.key, module.in_features)
            )
            for module in self.modules
        }

    @contextmanager
    def unit_gradients(
        self, cu_seqlens: Sequence[int], rows: Sequence[int], out_UP: Tensor
    ) -> Iterator[None]:
        """Send the gradients of backward passes inside the block to one row per unit.

        Segment ``i`` of the packed batch covers the tokens ``cu_seqlens[i] .. cu_seqlens[i + 1]``
        and its gradient is added to ``out_UP[rows[i]]``; two segments of one patient share a
        row, and a buffer may collect several micro-batches. ``flat_grad`` is left alone. The
        loss must be a sum of per-unit losses, or a unit's gradient depends on its neighbours.
        One backward pass, and the same number of operations as the plain gradient.

        Args:
            cu_seqlens: S + 1 token offsets, from 0 to T.
            rows: S row numbers below U.
            out_UP: [U, P] fp32, in the order of ``flat``.

        Raises:
            ValueError: If the shapes do not fit together.
        """
        fits = out_UP.dtype == torch.float32 and out_UP.shape[1:] == self.flat.shape
        if not fits or len(rows) + 1 != len(cu_seqlens):
            raise ValueError("unit gradients need [U, P] fp32 and one row per segment")
        self.capture = _UnitCapture(bounds=tuple(cu_seqlens), rows=tuple(rows), out_UP=out_UP)
        try:
            yield
        finally:
            self.capture = None

    def add_unit_products(
        self, key: str, capture: _UnitCapture, left_TM: Tensor, right_TN: Tensor
    ) -> None:
        """Add every segment's ``s * left^T right`` to its unit's row (backward pass only)."""
        shape, where = self.shapes[key], self.slices[key]
        if capture.bounds[-1] != left_TM.shape[0]:
            raise ValueError("the packed batch and cu_seqlens differ in length")
        bounds = zip(capture.bounds, capture.bounds[1:], capture.rows, strict=False)
        for start, stop, row in bounds:
            product_MN = (left_TM[start:stop].T @ right_TN[start:stop]).float()
            capture.out_UP[row, where].view(shape).add_(product_MN, alpha=self.spec.scale)

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Fold the update into copies of the weights inside the block (generation only)."""
        with torch.no_grad():
            for module in self.modules:
                update = self.spec.scale * (module.lora_B.float() @ module.lora_A.float())
                module.merged_OD = (module.weight.float() + update).to(module.dtype)
        try:
            yield
        finally:
            for module in self.modules:
                module.merged_OD = None


def attach(model: nn.Module, spec: AdapterSpec) -> Adapter:
    """Freeze a model and put the adapter on its target projections.

    Args:
        model: A causal language model on its final device and in its final dtype; its target
            modules are replaced in place. The meta device works too (counts only).
        spec: What to attach.

    Returns:
        The adapter; its parameters are the only ones that require a gradient.

    Raises:
        UserError: If a target names no linear module of the model.
    """
    model.requires_grad_(False)
    return Adapter(model, spec)


def _replace_targets(model: nn.Module, spec: AdapterSpec) -> tuple[AdaptedLinear, ...]:
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in {*spec.targets} - HEAD
    ]
    missing = set(spec.targets) - {name.rsplit(".", 1)[-1] for name, _ in found}
    if missing:
        linear = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if type(m) is nn.Linear}
        raise UserError(
            f"adapter.targets: no layer has {', '.join(sorted(missing))}",
            allowed=", ".join(sorted(linear - HEAD)),
            fix="set adapter.targets",
        )
    adapted = []
    for name, module in found:
        parent, _, child = name.rpartition(".")
        replacement = AdaptedLinear(module, name)
        setattr(model.get_submodule(parent), child, replacement)
        adapted.append(replacement)
    return tuple(adapted)


def _grouped(modules: Sequence[AdaptedLinear]) -> list[list[AdaptedLinear]]:
    groups: dict[tuple[str, ...], list[AdaptedLinear]] = {}
    for module in modules:
        parent, _, child = module.key.rpartition(".")
        shared = next((names for names in _SHARED_INPUTS if child in names), (child,))
        groups.setdefault((parent, *shared), []).append(module)
    return list(groups.values())
