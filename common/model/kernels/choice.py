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
    if requested == "auto":
        if device.type != "cuda":
            return Choice("torch", "blocked for a CPU's cache")
        obstacle = _obstacle("triton", device)
        if obstacle:
            return Choice("torch", f"triton: {obstacle}")
        return Choice("triton", "one pass over memory for each function")
    if requested not in CANDIDATES:
        raise SettingError(f"model.kernels={requested!r}", allowed=", ".join(("auto", *CANDIDATES)))
    obstacle = _obstacle(requested, device)
    if obstacle:
        raise SettingError(
            f"model.kernels={requested} cannot run here: {obstacle}",
            fix="set model.kernels to auto",
        )
    return Choice(requested, "asked for")


def _obstacle(candidate: str, device: torch.device) -> str:
    if candidate == "triton":
        if device.type != "cuda":
            return f"needs a CUDA device, not {device.type}"
        if importlib.util.find_spec("triton") is None:
            return "package triton is not installed"
    return ""


def kernels_named(name: str) -> Kernels:
    """Return one of ``CANDIDATES``."""
    if name == "triton":
        from common.model.kernels.elementwise_triton import TRITON

        return TRITON
    return TORCH
