"""What a SuperLink gets: source files of four packages, whatever lies in the tree (traps 5, 8)."""

import io
import re
import shutil
import tomllib
import zipfile
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk
from flwr.cli.utils import validate_project_name

from common.config import Config
from common.configio import flatten
from common.provenance import PACKAGES, source_digest
from sim.flower.bundle import stage_app

REPOSITORY = Path(__file__).resolve().parents[3]
PLANTED = (
    "patients.csv",
    "predictions.jsonl",
    "client/patients.json",
    "common/data/samples.jsonl",
    "common/data/samples.parquet",
    "configs/secret.yaml",
    "sim/pages/table.csv.gz",
    "runs/one/predictions.jsonl",
    "server/notes.md",
)
FLOWER_S_OWN = {"pyproject.toml", ".info/CONTENT"}
CODE = re.compile(rf"({'|'.join(PACKAGES)})/([\w/]+/)?\w+\.py")


def names(app: Path) -> set[str]:
    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(app))) as bundle:
        return set(bundle.namelist())


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of the repository's files as a user clones them, with patient data planted."""
    app = tmp_path / "fedrx"
    app.mkdir()
    for package in PACKAGES:
        shutil.copytree(
            REPOSITORY / package, app / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", ".gitignore"):
        shutil.copyfile(REPOSITORY / name, app / name)
    for name in PLANTED:
        file = app / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("subject_id,10012853\n")
    return app


def test_bundle_of_a_checkout_holds_code_only(checkout):
    """``flwr run .``: fab-include in pyproject.toml decides."""
    found = names(checkout)
    assert found >= FLOWER_S_OWN
    assert all(CODE.fullmatch(name) for name in found - FLOWER_S_OWN)
    assert {"client/app.py", "server/app.py", "common/config.py"} <= found


def test_without_our_list_the_planted_files_would_travel(checkout):
    """The trap is real: Flower's default takes them."""
    file = checkout / "pyproject.toml"
    text = "\n".join(x for x in file.read_text().splitlines() if not x.startswith("fab-"))
    file.write_text(text)
    assert "client/patients.json" in names(checkout)


def test_staged_bundle_holds_the_running_code_only(tmp_path, monkeypatch, checkout):
    """The launcher's own bundle, made from a tree with planted files."""
    monkeypatch.setattr("sim.flower.bundle.source_root", lambda: checkout)
    app = stage_app(tmp_path / "stage", version="0.1.0")
    found = names(app)
    code = {
        p.relative_to(checkout).as_posix() for q in PACKAGES for p in (checkout / q).rglob("*.py")
    }
    assert found == FLOWER_S_OWN | code
    assert {p.name for p in app.rglob("*") if p.is_file() and p.suffix != ".py"} == {
        "pyproject.toml"
    }
    assert source_digest(app) == source_digest(checkout)


@pytest.mark.parametrize("which", ["repository", "staged"])
def test_names_are_ones_that_flower_accepts(which, tmp_path):
    app = REPOSITORY if which == "repository" else stage_app(tmp_path, version="0.1.0")
    table = tomllib.loads((app / "pyproject.toml").read_text())
    validate_project_name(table["project"]["name"], "project")
    assert re.fullmatch(r"[A-Za-z0-9-]{1,32}", table["project"]["name"])
    if which == "staged":
        validate_project_name(app.name, "directory")
        assert table["project"]["version"] == "0.1.0"


@pytest.mark.parametrize("which", ["repository", "staged"])
def test_run_config_holds_every_default_as_a_scalar(which, tmp_path):
    """Run-config values are bool, int, float or str, and both copies are in step."""
    app = REPOSITORY if which == "repository" else stage_app(tmp_path, version="0.1.0")
    table = tomllib.loads((app / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]

    def flat(section, prefix=""):
        for key, value in section.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    values = dict(flat(table))
    assert values == flatten(Config())
    assert all(type(value) in (bool, int, float, str) for value in values.values())
