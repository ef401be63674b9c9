"""Who does the elementwise work of a step: plain torch, compiled on a CPU, Triton on a GPU."""

import functools
import importlib.util
import os
import shutil
import subprocess
import sysconfig

import torch

from common.choice import Choice
from common.errors import SettingError
from common.model.kernels.elementwise import TORCH, Kernels

CANDIDATES = ("triton", "compiled", "torch")


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
            return Choice("torch", "starts at once (compiled is faster in a long run)")
        if reason := obstacle("triton", device):
            return Choice("torch", f"triton: {reason}")
        return Choice("triton", "one pass over memory for each function")
    if requested not in CANDIDATES:
        raise SettingError(f"model.kernels={requested!r}", allowed=", ".join(("auto", *CANDIDATES)))
    if reason := obstacle(requested, device):
        raise SettingError(
            f"model.kernels={requested} cannot run here: {reason}", fix="set model.kernels to auto"
        )
    return Choice(requested, "asked for")


def obstacle(name: str, device: torch.device) -> str:
    """Say why one of ``CANDIDATES`` cannot run here, or return nothing."""
    if name == "triton":
        if device.type != "cuda":
            return f"needs a CUDA device, not {device.type}"
        absent = importlib.util.find_spec("triton") is None
        return "package triton is not installed" if absent else ""
    if name == "compiled":
        return _compiler_obstacle(device)
    return ""


def _compiler_obstacle(device: torch.device) -> str:
    """Say why torch cannot compile for this device, or return nothing."""
    if device.type != "cpu":
        return f"compiled for a CPU, not for {device.type}"
    return _try_compiler(os.environ.get("CXX", "g++"), sysconfig.get_path("include"))


@functools.cache
def _try_compiler(compiler: str, headers: str) -> str:
    """Compile what every extension of Python's begins with, as torch does later."""
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler}) is installed"
    command = [compiler, "-I", headers, "-x", "c++", "-c", "-", "-o", os.devnull]
    try:
        tried = subprocess.run(command, input=b"#include <Python.h>\n", capture_output=True)
    except OSError as error:
        return f"{compiler} does not start ({error.strerror})"
    return "" if tried.returncode == 0 else f"{compiler} does not compile Python's headers"


def kernels_named(name: str) -> Kernels:
    """Return one of ``CANDIDATES``."""
    if name == "triton":
        from common.model.kernels.elementwise_triton import TRITON

        return TRITON
    if name == "compiled":
        from common.model.kernels.elementwise_compiled import COMPILED

        return COMPILED
    return TORCH
