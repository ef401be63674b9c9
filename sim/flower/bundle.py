"""The Flower app as it is sent to a SuperLink: source files of four packages and nothing else."""

import shutil
from pathlib import Path

from common.files import write_text
from common.provenance import PACKAGES, source_root
from sim.flower.child_environment import APP
from sim.flower.run_config import flower_defaults

PYPROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "fedrx"
version = "{version}"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedrx"
fab-include = [{includes}]

[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "client.app:app"

[tool.flwr.app.config]
{defaults}"""


def stage_app(folder: Path, *, version: str) -> Path:
    """Copy the running code's .py files and a matching pyproject.toml below ``folder``.

    Patient data can never ride along: only ``.py`` files of the four packages are copied, and
    ``fab-include`` names the same set.

    Returns:
        The app's folder; its name is one that Flower accepts.
    """
    app = folder / APP
    root = source_root()
    for package in PACKAGES:
        for file in sorted((root / package).rglob("*.py")):
            target = app / file.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    includes = ", ".join(f'"{package}/**/*.py"' for package in PACKAGES)
    text = PYPROJECT.format(version=version, includes=includes, defaults=flower_defaults())
    write_text(app / "pyproject.toml", text)
    return app
