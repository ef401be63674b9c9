"""Who does the elementwise work of a step: plain torch, or Triton kernels on a GPU."""

import importlib.util

import torch

from common.choice import Choice
from common.errors import SettingError
from common.model.kernels.elementwise import TORCH, Kernels

CANDIDATES = ("triton", "torch")


def choose_kernels(requested: str, device: torch.device) -> Choice[str]:
    """Choose who does the elementwise work.

    Args:
        requested: ``auto`` or one of ``CANDIDATES``.
        device: Where the backbone is.

    Raises:
        UserError: If what is asked for cannot run here.

    >>> choose_kernels("auto", torch.device("cpu")).value
    'torch'
    """
    obstacle = _obstacle(device)
    if requested == "auto":
        if device.type != "cuda":
            return Choice("torch", "blocked for a CPU's cache")
        if obstacle:
            return Choice("torch", f"triton: {obstacle}")
        return Choice("triton", "one pass over memory for each function")
    if requested not in CANDIDATES:
        raise SettingError(f"model.kernels={requested!r}", allowed=", ".join(("auto", *CANDIDATES)))
    if requested == "triton" and obstacle:
        raise SettingError(
            f"model.kernels=triton cannot run here: {obstacle}", fix="set model.kernels to auto"
        )
    return Choice(requested, "asked for")


def _obstacle(device: torch.device) -> str:
    """Say why Triton's kernels cannot run here, or return nothing."""
    if device.type != "cuda":
        return f"needs a CUDA device, not {device.type}"
    absent = importlib.util.find_spec("triton") is None
    return "package triton is not installed" if absent else ""


def kernels_named(name: str) -> Kernels:
    """Return one of ``CANDIDATES``."""
    if name == "triton":
        from common.model.kernels.elementwise_triton import TRITON

        return TRITON
    return TORCH
