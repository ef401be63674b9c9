"""What is declared is used, what is used is declared, and every range has two ends."""

import ast
import importlib.metadata
import itertools
import re
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("common", "client", "server", "sim")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT, TOOL = PYPROJECT["project"], PYPROJECT["tool"]
EXTRAS = PROJECT["optional-dependencies"]
# Declared though no line of ours imports them.
NEEDED_BY_TRANSFORMERS = {"accelerate": "reads gguf files"}
# Tests ask them, of the versions that Flower brings, about proxies and memory.
WHAT_FLOWER_BRINGS = {"ray", "grpcio", "requests"}
WITH_TORCH_FOR_GPUS = {"triton"}
BUILT_FROM_SOURCE = {"flash-attn-interface"}  # FlashAttention-3, which no index has
PEERS_IF_THERE = {"liger-kernel"}  # a benchmark measures it where a person has installed it
BROUGHT_TO_TORCH = {"tensorboard"}  # torch.utils.tensorboard imports it
NAMED_OTHERWISE = {"fhir": "fhir.resources", "mlflow": "mlflow-skinny", "xdist": "pytest-xdist"}
"""Distributions by module, where an extra is not installed."""
TOOLS = {"ruff": "ruff", "mypy": "mypy", "import-linter": "lint-imports"}
PLUGINS = {"pytest-timeout"}
WITHOUT_UPPER_END = {"flash-attn"}  # no CUDA machine here: what it passes with is not known


def names(requirements: list[str]) -> set[str]:
    return {normal(Requirement(line).name) for line in requirements}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@cache
def imported(*folders: str) -> set[str]:
    """Return the distributions that the files of some folders import."""
    modules = set()
    for folder in folders:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    modules |= {one.name.split(".")[0] for one in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    modules.add(node.module.split(".")[0])
    modules -= {*sys.stdlib_module_names, *PACKAGES}
    modules -= {path.stem for path in (*ROOT.rglob("*.py"), *ROOT.glob(".ci/*.py"))}
    found = importlib.metadata.packages_distributions()
    return {
        normal(name)
        for module in modules
        for name in found.get(module, [NAMED_OTHERWISE.get(module, module)])
    }


def test_every_dependency_is_imported_by_the_product():
    idle = names(PROJECT["dependencies"]) - imported(*PACKAGES)
    assert idle == set(NEEDED_BY_TRANSFORMERS)


def test_everything_that_the_product_imports_is_declared():
    optional = names([line for name in EXTRAS if name != "test" for line in EXTRAS[name]])
    optional -= BROUGHT_TO_TORCH
    optional |= WITH_TORCH_FOR_GPUS | BUILT_FROM_SOURCE
    assert imported(*PACKAGES) - names(PROJECT["dependencies"]) == optional


def test_what_tests_bring_is_imported_by_tests_or_benchmarks_or_is_a_tool_of_ci():
    idle = names(EXTRAS["test"]) - imported("tests", "benchmarks")
    assert idle == {*TOOLS, *PLUGINS, *WITH_TORCH_FOR_GPUS}
    declared = names(PROJECT["dependencies"] + EXTRAS["test"])
    assert imported("tests", "benchmarks") <= declared | WHAT_FLOWER_BRINGS | PEERS_IF_THERE
    commands = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for command in TOOLS.values():
        assert re.search(rf"^{command}\b", commands, re.MULTILINE), command
    assert TOOL["pytest"]["ini_options"]["timeout"] > 0


@pytest.mark.parametrize("line", [*PROJECT["dependencies"], *itertools.chain(*EXTRAS.values())])
def test_every_range_has_a_lowest_and_an_upper_end(line):
    requirement = Requirement(line)
    operators = sorted(one.operator for one in requirement.specifier)
    expected = [">="] if requirement.name in WITHOUT_UPPER_END else ["<", ">="]
    assert operators == expected


def test_ci_takes_the_ends_of_the_declared_ranges(capsys, monkeypatch):
    """`.ci/ranges.py` against the lines by hand."""
    monkeypatch.setattr(sys, "path", [str(ROOT / ".ci"), *sys.path])
    import ranges

    assert ranges.ranged("torch>=2.11,<2.14", "oldest") == "torch==2.11"
    assert ranges.ranged("torch>=2.11,<2.14", "newest") == "torch>=2.11"
    assert ranges.ranged("flwr[simulation]>=1.41,<1.43", "oldest") == "flwr[simulation]==1.41"
