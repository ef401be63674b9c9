"""What ran: source digest, package versions and hardware."""

import contextlib
import datetime
import functools
import hashlib
import importlib.metadata
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from packaging.requirements import Requirement

from common.limits import available_cpus

PROMPT_DATE = datetime.date(2024, 7, 26)
"""What a chat template's clock says in every run's prompts, stored with the run; Llama 3's own
templates name this day where they have no clock."""
PACKAGES = ("client", "common", "server", "sim")
VERSIONED = (
    *("fedrx", "flwr", "torch", "transformers", "ray", "numpy", "polars"),
    *("opacus", "openai", "flash-attn"),
)


def source_root() -> Path:
    """Return the folder that holds the four packages of the running code."""
    return Path(__file__).resolve().parent.parent


@functools.cache
def source_digest(root: Path | None = None) -> str:
    """Return sha256 over names and contents of every .py file of the four packages.

    Hospitals and server compare it before round 1, so that nobody trains with other code than
    the run was started with. A package that is imported counts as the files it came from: Ray puts
    the working directory ahead of the app, and another ``client/`` there would run unseen.
    """
    return sources_digest(
        (f"{package}/{file.relative_to(folder).as_posix()}", file.read_bytes())
        for package in PACKAGES
        for folder in [root / package if root else _package_folder(package)]
        for file in folder.rglob("*.py")
    )


def sources_digest(files: Iterable[tuple[str, bytes]]) -> str:
    """Return sha256 over names (``client/app.py``) and contents of source files, in any order.

    >>> a, b = ("client/a.py", b"1"), ("common/b.py", b"2")
    >>> sources_digest([a, b]) == sources_digest([b, a]) != sources_digest([a])
    True
    """
    digest = hashlib.sha256()
    for name, content in sorted(files, key=lambda file: file[0].split("/")):
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def _package_folder(package: str) -> Path:
    file = getattr(sys.modules.get(package), "__file__", None)
    return Path(file).resolve().parent if file else source_root() / package


def tensors_sha256(tensors: dict[str, np.ndarray[Any, Any]]) -> str:
    """Return sha256 of tensors in fp32, keys sorted: key, shape, little-endian bytes.

    >>> a = {"k": np.zeros((1, 2), np.float32)}
    >>> tensors_sha256(a) == tensors_sha256({"k": np.zeros((2, 1), np.float32)})
    False
    """
    digest = hashlib.sha256()
    for key in sorted(tensors):
        value = np.ascontiguousarray(tensors[key], dtype="<f4")
        digest.update(f"{key}\0{'x'.join(map(str, value.shape))}\0".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


def environment(command_line: Sequence[str]) -> dict[str, object]:
    """Return versions, processor, accelerator and source digest; no user or host names."""
    import torch

    versions = {}
    for name in VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    accelerators = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cpus": available_cpus(),
        "accelerators": accelerators,
        "versions": versions,
        "git_commit": _git_commit(),
        "source_digest": source_digest(),
        "prompt_date": PROMPT_DATE.isoformat(),
        "command_line": shown_command(command_line),
    }


def shown_command(command_line: Sequence[str]) -> list[str]:
    """Return a command line without the folder of its program.

    >>> shown_command(["/opt/bin/fedrx", "demo"])
    ['fedrx', 'demo']
    """
    return [Path(command_line[0]).name, *command_line[1:]] if command_line else []


def pip_install(package: str) -> str:
    """Return the command that installs an optional package in the versions that were tested.

    FedRx itself is on no index: ``pip install 'fedrx[...]'`` would find nothing, or a stranger.

    >>> pip_install("absent")
    "pip install 'absent'"
    """
    wanted = package
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for requirement in map(Requirement, importlib.metadata.requires("fedrx") or ()):
            if requirement.name == package:
                wanted = f"{package}{requirement.specifier}"
                break
    return f"pip install '{wanted}'"


def peak_rss_bytes() -> int:
    """Return the peak resident memory of this process, in bytes.

    Linux's ``ru_maxrss`` starts at the peak of the process that started this one; VmHWM does not.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_device_bytes() -> int | None:
    """Return the peak that this process took of the GPU for tensors, in bytes; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    return int(torch.cuda.max_memory_allocated())


def tokens_per_second(tokens: int, seconds: float) -> float | None:
    """Return a training speed to a tenth; None where tokens are not told (privacy).

    >>> tokens_per_second(8192, 0.411), tokens_per_second(0, 2.0)
    (19931.9, None)
    """
    return round(tokens / seconds, 1) if tokens and seconds else None


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _git_commit() -> str | None:
    root = source_root()
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if (root / ".git").exists():
            command = ["git", "-C", str(root), "rev-parse", "HEAD"]
            return subprocess.check_output(
                command, text=True, timeout=10, stderr=subprocess.DEVNULL
            ).strip()
    return None
