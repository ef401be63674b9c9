"""Optimizers on the flat adapter buffer, and the state that carries over rounds and resumes."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.config import TrainConfig
from common.model.adapter.falora import Adapter
from common.tensor_files import Tensors, under

_STEP = "step"


@dataclass(kw_only=True)
class TrainState:
    """All that the next step depends on besides the adapter: the data order needs no more."""

    step: int = 0
    """Optimizer steps done so far, over all rounds."""
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    """torch's optimizer state of the flat buffer, by torch's names; on the CPU. Where rounds train
    different parts of the adapter, each part has its own, under its name (``Scheme.block``)."""

    def to_tensors(self) -> Tensors:
        """Return everything as named tensors, for a safetensors file.

        >>> TrainState(step=3).to_tensors()
        {'step': array(3)}
        """
        named = {f"optimizer.{name}": one.numpy().copy() for name, one in self.optimizer.items()}
        return {_STEP: np.array(self.step), **named}

    @classmethod
    def from_tensors(cls, tensors: Tensors) -> "TrainState":
        """Rebuild the state that ``to_tensors`` wrote."""
        named = under("optimizer.", tensors)
        optimizer = {name: torch.tensor(value) for name, value in named.items()}
        return cls(step=int(tensors[_STEP]), optimizer=optimizer)


class FlatOptimizer:
    """torch's SGD or AdamW on one parameter: the flat buffer of what the round trains."""

    def __init__(self, adapter: Adapter, config: TrainConfig, state: TrainState) -> None:
        self._block, self._others = adapter.block, {}
        self._parameter = torch.nn.Parameter(adapter.flat)
        self._parameter.grad = adapter.flat_grad
        make: Any = partial(torch.optim.AdamW, betas=(config.beta1, config.beta2))
        if config.optimizer == "sgd":
            make = partial(torch.optim.SGD, momentum=config.momentum)
        self._optimizer: torch.optim.Optimizer = make(
            [self._parameter],
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            foreach=False,
        )
        for name, tensor in state.optimizer.items():
            if not name.startswith(self._block):
                self._others[name] = tensor
                continue
            # torch keeps its step counter on the CPU.
            where = tensor.device if tensor.ndim == 0 else adapter.flat.device
            own = name.removeprefix(self._block)
            self._optimizer.state[self._parameter][own] = tensor.to(where, copy=True)

    def step(self, learning_rate: float) -> None:
        """Apply the flat gradient at this learning rate."""
        self._optimizer.param_groups[0]["lr"] = learning_rate
        self._optimizer.step()

    def tensors(self) -> dict[str, Tensor]:
        """Return torch's state tensors by name, copied to the CPU, and those of other parts."""
        state = self._optimizer.state[self._parameter]
        return self._others | {
            self._block + name: tensor.detach().to("cpu", copy=True)
            for name, tensor in state.items()
            if isinstance(tensor, Tensor)
        }
