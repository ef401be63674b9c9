"""The command finds its own packages, whatever packages of the same names stand before them."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
START = REPOSITORY / "sim" / "start"
COMMAND = "from fedrx import main; main()"
PACKAGES = ("client", "common", "server", "sim")


def start_module(file: Path = START / "fedrx" / "__init__.py") -> ModuleType:
    spec = importlib.util.spec_from_file_location("fedrx_start", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def others(tmp_path) -> Path:
    """Somebody's project with packages of all four names."""
    for package in PACKAGES:
        (tmp_path / "others" / package).mkdir(parents=True)
        (tmp_path / "others" / package / "__init__.py").write_text("")
    return tmp_path / "others"


def fedrx(*path: Path, code: str = COMMAND, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, "--version"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.process
def test_ours_are_used_though_others_come_first(others):
    """Both from PYTHONPATH and from the working directory; not even their first line is run."""
    for package in PACKAGES:
        (others / package / "__init__.py").write_text("raise RuntimeError('a wrong package')\n")
    done = fedrx(others, START, cwd=others)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("fedrx ")
    bare = fedrx(others, START, cwd=others, code="import sim")
    assert "a wrong package" in bare.stderr  # the control: the others do come first


@pytest.mark.process
def test_one_that_is_imported_already_is_named_with_its_path(others, tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("import common\n")
    done = fedrx(tmp_path / "site", others, START, cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("fedrx: another package `common` is imported before FedRx's own")
    assert f"remove {others} from PYTHONPATH" in line


def test_the_finder_answers_for_four_names_alone(others):
    module = start_module()
    finder = module.OurPackages(others)
    for name in PACKAGES:
        assert finder.find_spec(name, None).origin == str(others / name / "__init__.py")
    assert finder.find_spec("json", None) is None
    assert finder.find_spec("common.data", [str(others / "common")]) is None
    assert set(module.PACKAGES) == set(PACKAGES)


def test_packages_are_found_from_a_checkout_and_from_an_installation(tmp_path):
    assert start_module().location() == REPOSITORY
    (tmp_path / "site" / "sim").mkdir(parents=True)
    (tmp_path / "site" / "sim" / "__init__.py").write_text("")
    installed = shutil.copytree(START / "fedrx", tmp_path / "site" / "fedrx")
    assert start_module(installed / "__init__.py").location() == tmp_path / "site"


def test_the_console_script_goes_this_way():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"fedrx": "fedrx:main"}
    find = project["tool"]["setuptools"]["packages"]["find"]
    assert "sim/start" in find["where"]
    assert "fedrx*" in find["include"]
