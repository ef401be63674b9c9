"""A whole run where field machines put things: odd names everywhere, a proxy, other packages.

One federation holds three promises at once, because each needs real Flower and Ray: paths may have
blanks, brackets and letters beyond ASCII; what is said on loopback goes through no proxy; packages
of other projects with our names are never imported.
"""

import contextlib
import importlib.metadata
import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import psutil
import pytest

from common.data.synthetic.write import write_tables

REPOSITORY = Path(__file__).resolve().parents[3]
PACKAGES = ("client", "common", "server", "sim")
WRONG = "raise RuntimeError('the wrong package was imported')\n"
RUN_SECONDS = 900
SHORT = {
    "federation.hospitals": 2,
    "federation.rounds": 1,
    "federation.local-steps": 1,
    "federation.workers": 1,
    "train.max-length": 128,
    "train.device": "cpu",
    "evaluation.samples": 1,
    "evaluation.max-new-tokens": 8,
    "evaluation.validation-samples": 1,
}


def environment_in(folder: Path) -> Path:
    """Make a virtual environment of what this one holds, as pip would write it there.

    Packages are links, so that each finds itself below ``folder``; scripts begin as pip's do where
    the interpreter's path has blanks.
    """
    venv.create(folder, with_pip=False)
    site = next(folder.glob("lib/python*/site-packages"))
    for place in (Path(one) for one in sys.path if one.endswith("site-packages")):
        for entry in place.iterdir():
            link = site / entry.name
            ours = entry.suffix == ".pth" or entry.name.startswith("__editable__")
            if not (ours or link.exists() or entry.name in PACKAGES):
                link.symlink_to(entry)
    for script in importlib.metadata.entry_points(group="console_scripts"):
        if script.module.partition(".")[0] in ("flwr", "ray"):
            file = folder / "bin" / script.name
            file.write_text(
                f"#!/bin/sh\n'''exec' \"{folder}/bin/python\" \"$0\" \"$@\"\n' '''\n"
                f"import sys\nfrom {script.module} import {script.attr}\n"
                f"sys.exit({script.attr}())\n",
                encoding="utf-8",
            )
            file.chmod(0o755)
    return folder / "bin" / "python"


@pytest.mark.ray
def test_the_tiny_demo_runs_in_odd_places_behind_a_proxy_beside_other_packages(
    tmp_path, fake_proxy
):
    odd = tmp_path / "Größe [1] (ß)"
    places = {"TMPDIR": odd / "tmp [ü]", "HOME": odd / "hö me", "FEDRX_CACHE": odd / "cä che"}
    for place in (*places.values(), odd / "wörk [dir]"):
        place.mkdir(parents=True)
    python = environment_in(odd / "env (ö) [2]")
    data, run = odd / "dä ta [3]", odd / "rün [4] (é)"
    write_tables(data, patients=30, seed=0)
    others = tmp_path / "others"
    for package in PACKAGES:
        (others / package).mkdir(parents=True)
        (others / package / "__init__.py").write_text(WRONG)
    settings = {**SHORT, "data.path": data}
    done = subprocess.run(
        [
            *(str(python), "-c", "from fedrx import main; main()"),
            *("demo", "--tiny", "--json", "--run-dir", str(run)),
            *(part for key, value in settings.items() for part in ("--set", f"{key}={value}")),
        ],
        cwd=odd / "wörk [dir]",
        env={
            **{k: v for k, v in os.environ.items() if "proxy" not in k.lower()},
            **{name: str(place) for name, place in places.items()},
            **fake_proxy.environment(),
            "PYTHONPATH": os.pathsep.join([str(others), str(REPOSITORY / "sim" / "start")]),
            "MPLBACKEND": "agg",
        },
        capture_output=True,
        encoding="utf-8",
        timeout=RUN_SECONDS,
        check=False,
    )
    log = run / "flower.log"
    told = done.stderr + (log.read_text(encoding="utf-8") if log.exists() else "")
    assert done.returncode == 0, told
    summary = json.loads(done.stdout)
    assert json.loads((run / "summary.json").read_text(encoding="utf-8")) == summary
    assert json.loads((run / "status.json").read_text(encoding="utf-8"))["state"] == "finished"
    assert summary["source"] == "synthetic"
    assert (run / "report.html").is_file()
    assert fake_proxy.seen == []
    assert not list(places["TMPDIR"].glob("fedrx-*"))
    assert left(run) == []


def left(run: Path) -> list[str]:
    """Command lines of living processes that belong to a run."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get("FEDRX_RUN") == str(run):
                found.append(" ".join(process.cmdline()))
    return found
