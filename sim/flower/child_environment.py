"""The environment of every process that a run starts, and the folder that it works in.

One place for what other programs read from their environment: where they may listen, whom they may
ask, where they find our packages, and what they may use of the machine.
"""

import contextlib
import json
import os
import shlex
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from importlib.metadata import distribution
from pathlib import Path

from common.errors import UserError
from common.files import write_text
from common.limits import available_memory_bytes, cgroup_limits
from common.undocumented.ray_names import (
    HIDE_GPUS_FROM_GPULESS_WORKERS,
    LOCAL_SERVERS_LISTEN_EVERYWHERE,
    MEMORY,
    PRESTART,
    SOCKET,
    WORKER_NICENESS,
)
from common.wire.undocumented_flower import LAUNCH_POLL_SECONDS, NO_UPDATE_CHECK

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    NO_UPDATE_CHECK: "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
"""Flower's processes tell and install nothing."""
RUN_VARIABLE = "FEDRX_RUN"
"""Marks every process of a run with its run directory, so that none is ever left behind."""
APP = "fedrx"
"""Folder of the staged app below the working folder; Flower takes the name."""
SCRIPTS = "bin"
"""Folder of Flower's commands below the working folder, where they cannot be used as installed."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
METADATA = ("169.254.169.254", "metadata.google.internal")
"""Ray asks there, when it starts, whether it is in a cloud; that is on the machine's own link."""
NO_PROXY, GRPC_NO_PROXY = ("no_proxy", "NO_PROXY"), "no_grpc_proxy"
"""What urllib, requests and httpx read, and what gRPC reads before it."""
LONGEST_SOCKET_BYTES = 107
SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")
RAY_STORE_SHARE = 0.3
"""Ray's own share of the memory for its object store."""
RAY_SMALLEST_STORE_BYTES = 80 * 2**20


def without_loopback_proxy(
    environment: Mapping[str, str], *, besides: tuple[str, ...] = ()
) -> dict[str, str]:
    """Return what keeps loopback from going through a proxy, beside what the person excepts.

    >>> without_loopback_proxy({"no_proxy": "example.org"})["NO_PROXY"]
    'example.org,127.0.0.1,localhost,::1'
    >>> without_loopback_proxy({"NO_PROXY": "*"})["no_proxy"]
    '*'
    """
    said = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    grpc = environment.get("no_grpc_proxy", said)
    added = (*LOOPBACK, *besides)
    # "*" counts only where it stands alone; gRPC does not know it.
    hosts = "*" if "*" in _hosts(said) else _with(_hosts(said), added)
    return {**dict.fromkeys(NO_PROXY, hosts), GRPC_NO_PROXY: _with(_hosts(grpc), added)}


def ask_loopback_directly() -> None:
    """Keep this process's own calls to loopback from going through a proxy, from here on."""
    os.environ.update(without_loopback_proxy(os.environ))


def child_environment(
    folder: Path,
    *,
    run: Path,
    base: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return the environment of every Flower and Ray process of a run.

    ``RAY_ADDRESS`` is the person's own if it is set; otherwise Ray starts a cluster of its own
    even where ``ray start`` has left one on the machine.

    Args:
        folder: The SuperLink's working folder, from ``working_folder``.
        run: The run directory.
        base: The environment to begin with; default this process's.
    """
    base = os.environ if base is None else base
    paths = [str(folder / APP), *filter(None, [base.get("PYTHONPATH")])]
    environment = {
        **base,
        **without_loopback_proxy(base, besides=METADATA),
        **QUIET,
        RUN_VARIABLE: str(run),
        # Our packages as the run uses them, ahead of any other of the same name.
        "PYTHONPATH": os.pathsep.join(paths),
        "PATH": os.pathsep.join(
            [str(folder / SCRIPTS), sysconfig.get_path("scripts"), base.get("PATH", "")]
        ),
        "TMPDIR": str(folder),
        "RAY_TMPDIR": str(folder),
        "FLWR_HOME": str(folder / "home"),
        LAUNCH_POLL_SECONDS: "0.1",
        "RAY_ADDRESS": base.get("RAY_ADDRESS") or "local",
        # Without this Ray's own servers listen on every interface of the machine.
        LOCAL_SERVERS_LISTEN_EVERYWHERE: "1" if joins_cluster(base) else "0",
        # Ray nices its workers by 15: on a shared machine the hospitals would starve.
        WORKER_NICENESS: "0",
        PRESTART: "0",
        HIDE_GPUS_FROM_GPULESS_WORKERS: "0",
        # The launcher has fetched the backbone; nobody needs the hub from here on.
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    memory = ray_memory()
    if memory:
        environment.setdefault(MEMORY, json.dumps(memory))
    return environment


def joins_cluster(base: Mapping[str, str] | None = None) -> bool:
    """Return whether the simulation joins an existing Ray cluster (RAY_ADDRESS)."""
    base = os.environ if base is None else base
    return base.get("RAY_ADDRESS", "") not in ("", "local")


def ray_memory() -> dict[str, int]:
    """Return what Ray may take where a cgroup limits it: Ray itself reads the outermost group.

    Empty where nothing limits.
    """
    if cgroup_limits().memory_bytes is None:
        return {}
    free = available_memory_bytes()
    store = int(free * RAY_STORE_SHARE)
    with contextlib.suppress(OSError):
        store = min(store, int(shutil.disk_usage("/dev/shm").free * 0.95))
    store = max(store, RAY_SMALLEST_STORE_BYTES)
    return {"memory": max(free - store, RAY_SMALLEST_STORE_BYTES), "object_store_memory": store}


@contextlib.contextmanager
def working_folder() -> Iterator[Path]:
    """Make a private folder that Ray can work in, and remove it at the end.

    Ray takes only ASCII paths, short enough for a socket's name: where ``TMPDIR`` is not such a
    place, the system's own temporary folders are tried.

    Raises:
        UserError: if there is no such place.
    """
    reasons = []
    for place in dict.fromkeys([tempfile.gettempdir(), *SHORT_FOLDERS]):
        if not (place.isascii() and fits_socket(Path(place) / "fedrx-12345678")):
            reasons.append(f"{place}: longer or other than Ray can name")
            continue
        try:
            made = tempfile.TemporaryDirectory(
                prefix="fedrx-", dir=place, ignore_cleanup_errors=True
            )
        except OSError as error:
            reasons.append(f"{place}: {error.strerror}")
            continue
        with made as name:
            yield Path(name)
        return
    raise UserError(
        "no folder for temporary files",
        allowed="a writable folder with a short name of ASCII letters",
        fix=f"set TMPDIR ({'; '.join(reasons)})",
    )


def write_scripts(folder: Path, executable: str = sys.executable) -> None:
    """Write Flower's commands for an interpreter whose path a shell would take apart.

    Ray starts its workers through a shell and does not quote the interpreter, so it is given one
    with a plain path: the same environment, through a link in the working folder.

    Args:
        folder: From ``working_folder``; stays as it is where the interpreter's path is plain.
        executable: The interpreter.
    """
    if shlex.quote(executable) == executable:
        return
    link = folder / "environment"
    link.symlink_to(Path(executable).parent.parent, target_is_directory=True)
    python = link / Path(executable).parent.name / Path(executable).name
    (folder / SCRIPTS).mkdir()
    for script in distribution("flwr").entry_points.select(group="console_scripts"):
        file = folder / SCRIPTS / script.name
        write_text(
            file,
            f"#!{python}\nimport sys\nfrom {script.module} import {script.attr}\n"
            f"sys.exit({script.attr}())\n",
        )
        file.chmod(0o700)


def fits_socket(folder: Path) -> bool:
    """Tell whether Ray's sockets in a folder have names that the system takes."""
    return len(os.fsencode(f"{folder}{SOCKET}")) <= LONGEST_SOCKET_BYTES


def _hosts(text: str) -> list[str]:
    return [host.strip() for host in text.split(",") if host.strip()]


def _with(hosts: list[str], added: tuple[str, ...]) -> str:
    named = [host for host in hosts if host != "*"]
    return ",".join([*named, *(host for host in added if host not in named)])
