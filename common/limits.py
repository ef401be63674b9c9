"""What this process may use: the CPUs and memory that its cgroup leaves it, not the machine's.

Containers and batch systems (SLURM) limit a job by its cgroup, at any level above the process: the
smallest limit from the process's own group up to the root counts. Both versions of the interface
are read, and each controller may be in either (https://docs.kernel.org/admin-guide/cgroup-v2.html,
https://docs.kernel.org/admin-guide/cgroup-v1/memory.html).
"""

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

UNLIMITED_BYTES = 2**60
"""Version 1 writes "no limit" as the largest multiple of a page."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a cgroup and all above it allow; None where nothing limits."""

    cpus: float | None = None
    """Processor seconds per second."""
    memory_bytes: int | None = None
    free_bytes: int | None = None
    """What is left under the tightest limit; cached files that can be dropped are free."""


_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}
"""By version: the limit, what is used, and which statistic of it can be dropped."""


def cgroup_limits(root: Path = Path("/")) -> Limits:
    """Read the limits of this process's cgroups.

    Files that are absent or not as expected limit nothing.
    """
    cpus: list[float] = []
    limits: list[int] = []
    free: list[int] = []
    for version, group in _groups(root):
        limit_file, used_file, droppable_name = _FILES[version]
        quota = _cpu_quota(group, version)
        if quota is not None:
            cpus.append(quota)
        limit = _number(_read(group / limit_file))
        if limit is not None and limit < UNLIMITED_BYTES:
            limits.append(limit)
            used = _number(_read(group / used_file)) or 0
            droppable = _statistic(_read(group / "memory.stat"), droppable_name)
            free.append(max(0, limit - max(0, used - droppable)))
    return Limits(
        cpus=min(cpus, default=None),
        memory_bytes=min(limits, default=None),
        free_bytes=min(free, default=None),
    )


def available_cpus(root: Path = Path("/")) -> int:
    """Return how many CPUs this process may keep busy: by affinity and by its cgroup's quota."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup_limits(root).cpus
    return cpus if quota is None else max(1, min(cpus, math.floor(quota)))


def default_threads(root: Path = Path("/")) -> int:
    """Return how many threads a process takes unless told: OMP_NUM_THREADS, or all CPUs it may use.

    OpenMP lets that be a list, of which the first counts.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    cpus = available_cpus(root)
    return min(int(asked), cpus) if asked.isdecimal() and int(asked) else cpus


def available_memory_bytes(root: Path = Path("/")) -> int:
    """Return how much memory this process can still get: on the machine and in its cgroup."""
    import psutil

    free = cgroup_limits(root).free_bytes
    available = int(psutil.virtual_memory().available)
    return available if free is None else min(available, free)


def total_memory_bytes(root: Path = Path("/")) -> int:
    """Return the machine's memory, or the cgroup's limit where that is lower."""
    import psutil

    limit = cgroup_limits(root).memory_bytes
    total = int(psutil.virtual_memory().total)
    return total if limit is None else min(total, limit)


def _groups(root: Path) -> Iterator[tuple[int, Path]]:
    """Yield the interface's version and the folder of every group that limits this process."""
    mounts = list(_mounts(_read(root / "proc/self/mountinfo") or ""))
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        version = 2 if hierarchy == "0" and not controllers else 1
        for mounted, names, source, point in mounts:
            if mounted != version or not set(controllers.split(",")) & names:
                continue
            top = root / point.relative_to("/")
            yield from ((version, group) for group in _up(top, _below(path, source)))


def _mounts(text: str) -> Iterator[tuple[int, set[str], PurePosixPath, PurePosixPath]]:
    """Yield version, controllers, mounted part and mount point of each cgroup mount."""
    for line in text.splitlines():
        head, _, tail = line.partition(" - ")
        fields, kind = head.split(), tail.split()
        if len(fields) < 5 or len(kind) < 3 or kind[0] not in ("cgroup", "cgroup2"):
            continue
        version = 2 if kind[0] == "cgroup2" else 1
        names = {""} if version == 2 else set(kind[2].split(","))
        yield version, names, PurePosixPath(_plain(fields[3])), PurePosixPath(_plain(fields[4]))


def _plain(text: str) -> str:
    r"""Undo mountinfo's escapes.

    >>> _plain(r"/a\040b")
    '/a b'
    """
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, character)
    return text


def _below(path: str, source: PurePosixPath) -> PurePosixPath:
    """Return a group's path below its mount; in a container the mount may be the group itself."""
    with contextlib.suppress(ValueError):
        return PurePosixPath(path).relative_to(source)
    return PurePosixPath()


def _up(top: Path, below: PurePosixPath) -> Iterator[Path]:
    """Yield a group's folder and those above it, up to the mount point."""
    for part in (below, *below.parents):
        if ".." not in part.parts:
            yield top / part


def _cpu_quota(group: Path, version: int) -> float | None:
    if version == 2:
        quota, _, period = (_read(group / "cpu.max") or "").partition(" ")
    else:
        quota = _read(group / "cpu.cfs_quota_us") or ""
        period = _read(group / "cpu.cfs_period_us") or ""
    numbers = _number(quota), _number(period)
    if not numbers[0] or not numbers[1]:
        return None
    return numbers[0] / numbers[1]


def _number(text: str | None) -> int | None:
    """Read a count; ``max``, ``-1`` and anything else are none.

    >>> _number("200000"), _number("max"), _number("-1"), _number(None)
    (200000, None, None, None)
    """
    text = (text or "").strip()
    return int(text) if text.isascii() and text.isdigit() else None


def _statistic(text: str | None, name: str) -> int:
    rows = (line.partition(" ") for line in (text or "").splitlines())
    return next((_number(value) or 0 for key, _, value in rows if key == name), 0)


def _read(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
