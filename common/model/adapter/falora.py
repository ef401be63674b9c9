"""FA-LoRA: low-rank adapters whose A is drawn once and frozen, and whose B is trained.

``y = x W^T + s (x A^T) B^T`` with ``s = alpha / rank`` (FFA-LoRA, Sun et al., ICLR 2024,
arXiv 2403.12313). Only B is trained, kept and sent. What is computed is in
``common.model.adapter.projections``; here is the trainable state.

Shapes: T packed tokens, D input width, O output width, R rank, P trainable parameters,
S packed segments, U units (rows of a unit-gradient buffer).
"""

import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from common.errors import SettingError
from common.model.adapter.projections import AdaptedLinear, UnitCapture
from common.model.adapter.scheme import A, B, part_of
from common.model.adapter.spec import AdapterSpec, digest_of_all, draw_a
from common.model.kernels.frozen import HEAD, QuantisedLinear

__all__ = ["Adapter", "AdapterSpec", "attach", "draw_a"]
_FROZEN = (nn.Linear, QuantisedLinear)


class Adapter:
    """The trainable state of one model: a flat fp32 buffer that the modules' matrices view.

    Attributes:
        spec: What was attached.
        shapes: Of all that the scheme holds, by wire key, sorted.
        flat: [P] fp32; the values that the current round trains, in the order of their keys.
        flat_grad: [P] fp32; the trained parameters' ``grad`` are views of it.
        slices: Where each trained key is in ``flat``.
        block: The scheme's name for what is trained, see ``Scheme.block``.
        capture: Set while unit gradients are collected, see ``unit_gradients``.
    """

    def __init__(self, model: nn.Module, spec: AdapterSpec) -> None:
        self.spec = spec
        self.capture: UnitCapture | None = None
        # The embedding: a projection may be quantised.
        self._like = next(model.parameters())
        self.modules = _replace_targets(model, spec)
        shapes: dict[str, tuple[int, int]] = {}
        for module in self.modules:
            sizes = {A: (spec.rank, module.in_features), B: (module.out_features, spec.rank)}
            shapes |= {f"{module.key}.{part}": sizes[part] for part in spec.scheme.held}
        self.shapes = dict(sorted(shapes.items()))
        size = sum(math.prod(shape) for shape in shapes.values())
        self._values = torch.zeros(size, dtype=torch.float32, device=self._like.device)
        # Not zeros_like: of values without storage torch works it out by its compiler, to import.
        self._gradients = self._values.new_zeros(size)
        self._places: dict[str, slice] = {}
        start = 0
        # What the first round trains comes first, so that every round's values lie together.
        first = spec.scheme.trained(1)
        for key in sorted(shapes, key=lambda key: (part_of(key) not in first, key)):
            stop = start + math.prod(shapes[key])
            self._places[key] = slice(start, stop)
            start = stop
        self._parameters: dict[str, nn.Parameter] = {}
        digests = {module.key: self._bind(module) for module in self.modules}
        self.a_fingerprint = digest_of_all(spec, digests)
        self.start_round(1)

    def start_round(self, server_round: int) -> None:
        """Train, from now on, what the scheme trains in this round."""
        scheme = self.spec.scheme
        trained = [key for key in self._places if part_of(key) in scheme.trained(server_round)]
        start, stop = self._places[trained[0]].start, self._places[trained[-1]].stop
        assert stop - start == sum(math.prod(self.shapes[key]) for key in trained)
        self.flat, self.flat_grad = self._values[start:stop], self._gradients[start:stop]
        self.block = scheme.block(server_round)
        places = {key: self._places[key] for key in trained}
        self.slices = {key: slice(at.start - start, at.stop - start) for key, at in places.items()}
        for key, parameter in self._parameters.items():
            parameter.requires_grad_(key in self.slices)

    def _bind(self, module: AdaptedLinear) -> str:
        """Give a module its matrices; returns the digest of its A as drawn."""
        module.adapter = self
        # Drawn on the meta device too: a server without weights knows A's fingerprint by it.
        drawn = draw_a(self.spec, module.key, module.in_features)
        a_RD = torch.from_numpy(drawn).to(self._like.device)
        for part in self.spec.scheme.held:
            setattr(module, part, self._parameter(f"{module.key}.{part}"))
        if A in self.spec.scheme.held:
            module.lora_A.data.copy_(a_RD)
        else:
            module.register_buffer(A, a_RD.to(self._like.dtype), persistent=False)
        return hashlib.sha256(drawn.astype("<f4").tobytes()).hexdigest()

    def _parameter(self, key: str) -> nn.Parameter:
        where, shape = self._places[key], self.shapes[key]
        parameter = nn.Parameter(self._values[where].view(shape))
        parameter.grad = self._gradients[where].view(shape)
        self._parameters[key] = parameter
        return parameter

    @property
    def trainable_parameters(self) -> int:
        """Number of values P that the current round trains."""
        return self.flat.numel()

    @property
    def held_parameters(self) -> int:
        """Number of values that some round trains."""
        return self._values.numel()

    def state(self) -> dict[str, NDArray[np.float32]]:
        """Return fp32 copies of all held matrices by wire key."""
        host = self._values.detach().cpu().numpy()
        places = self._places
        return {key: host[places[key]].reshape(shape).copy() for key, shape in self.shapes.items()}

    def load(self, state: Mapping[str, NDArray[np.float32]]) -> None:
        """Set all held matrices.

        Raises:
            ValueError: If a key is missing or unknown, or a shape or dtype differs; nothing is
                changed then.
        """
        missing, extra = self.shapes.keys() - set(state), set(state) - self.shapes.keys()
        if missing or extra:
            raise ValueError(
                f"adapter keys differ: missing {sorted(missing)}, extra {sorted(extra)}"
            )
        for key, shape in self.shapes.items():
            if tuple(state[key].shape) != shape or state[key].dtype != np.float32:
                raise ValueError(
                    f"{key} is {state[key].dtype} {tuple(state[key].shape)}, not float32 {shape}"
                )
        host = np.concatenate([np.ravel(state[key]) for key in self._places])
        self._values.copy_(torch.from_numpy(host))

    def drawn_a(self) -> dict[str, NDArray[np.float32]]:
        """Return A by wire key in fp32 as it is drawn, before any training."""
        return {
            f"{module.key}.{A}": draw_a(self.spec, module.key, module.in_features)
            for module in self.modules
        }

    @contextmanager
    def unit_gradients(
        self,
        cu_seqlens: Sequence[int],
        rows: Sequence[int],
        out_UP: Tensor,
        *,
        state_bounds: Sequence[int] = (),
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
            state_bounds: The segments' offsets among the tokens before labels, where the last
                layer goes on with these alone.

        Raises:
            ValueError: If the shapes do not fit together.
        """
        fits = out_UP.dtype == torch.float32 and out_UP.shape[1:] == self.flat.shape
        if not fits or len(rows) + 1 != len(cu_seqlens):
            raise ValueError("unit gradients need [U, P] fp32 and one row per segment")
        self.capture = UnitCapture(
            bounds=(tuple(cu_seqlens), tuple(state_bounds or cu_seqlens)),
            rows=tuple(rows),
            out_UP=out_UP,
        )
        try:
            yield
        finally:
            self.capture = None

    def add_unit_products(
        self, key: str, capture: UnitCapture, left_TM: Tensor, right_TN: Tensor
    ) -> None:
        """Add every segment's ``s * left^T right`` to its unit's row (backward pass only)."""
        shape, where = self.shapes[key], self.slices[key]
        fitting = [bounds for bounds in capture.bounds if bounds[-1] == left_TM.shape[0]]
        if not fitting:
            raise ValueError("the packed batch and cu_seqlens differ in length")
        pairs = itertools.pairwise(fitting[0])
        for (start, stop), row in zip(pairs, capture.rows, strict=True):
            product_MN = (left_TM[start:stop].T @ right_TN[start:stop]).float()
            capture.out_UP[row, where].view(shape).add_(product_MN, alpha=self.spec.scale)

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Fold the update into copies of the weights inside the block (generation only)."""
        with torch.no_grad():
            for module in self.modules:
                update = self.spec.scale * (module.lora_B.float() @ module.lora_A.float())
                module.merged_OD = (module.weight.float() + update).to(self._like.dtype)
        try:
            yield
        finally:
            for module in self.modules:
                module.merged_OD = None

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Let other values be tried inside the block; those of before are put back after it."""
        before_P = self.flat.clone()
        try:
            yield
        finally:
            self.flat.copy_(before_P)


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
        if isinstance(module, _FROZEN) and name.rsplit(".", 1)[-1] in {*spec.targets} - HEAD
    ]
    missing = set(spec.targets) - {name.rsplit(".", 1)[-1] for name, _ in found}
    if missing:
        linear = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if type(m) in _FROZEN}
        raise SettingError(
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
