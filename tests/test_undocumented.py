"""What dependencies do not document is used in one place per library, and by no other name.

Read from the source by AST, and from the classes: a method of ours that a library calls must take
whatever that library's own method takes.
"""

import ast
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from common.model.kernels.attention import register

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("common", "client", "server", "sim")
GATHERED = {
    "common/undocumented/torch_names.py",
    "common/undocumented/transformers_names.py",
    "common/wire/undocumented_flower.py",
    "common/wire/undocumented_deployment.py",
    "common/undocumented/ray_names.py",
}
# The modules that a library documents, for those whose behaviour ours hangs on.
DOCUMENTED = {
    "flwr": {"flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.serverapp.strategy"},
    "ray": {"ray"},
    "torch": {
        *(
            "torch",
            "torch.autograd.graph",
            "torch.nn",
            "torch.nn.attention.varlen",
            "torch.profiler",
        ),
        *("torch.nn.functional", "torch.utils.checkpoint", "torch.utils.flop_counter"),
        "torch.utils.tensorboard",
    },
    "transformers": {"transformers", "transformers.utils"},
    "opacus": {
        *("opacus", "opacus.accountants"),
        "opacus.grad_sample.grad_sample_module_fast_gradient_clipping",
    },
    "typer": {"typer", "typer.testing"},
    "click": {"click", "click.exceptions"},
    "openai": {"openai"},
    "fastapi": {
        *("fastapi", "fastapi.exceptions", "fastapi.concurrency", "fastapi.responses"),
        "fastapi.testclient",
    },
    "huggingface_hub": {"huggingface_hub", "huggingface_hub.errors"},
    "tokenizers": {"tokenizers"},
}
DOCUMENTED_VARIABLES = {
    *("FLWR_HOME", "FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"),
    *("RAY_ADDRESS", "RAY_TMPDIR", "RAY_USAGE_STATS_ENABLED"),
}
# What tests look into (flwr 1.41 and 1.42, torch 2.11 to 2.14): messages as they travel, the
# in-process grid's needs, the app bundle, operators as they are dispatched.
TESTS_LOOK_INTO = {
    *("flwr.cli.build", "flwr.cli.utils", "flwr.common.serde", "flwr.proto.message_pb2"),
    "flwr.superlink.grid.inmemory_grid",
    *("flwr.cli.auth_plugin.oidc_cli_plugin", "flwr.common.constant"),
    *("flwr.supercore.credential_store", "flwr.supercore.primitives.asymmetric"),
    *("flwr.superlink.dependencies.account", "flwr.superlink.routers.fleet.router"),
    *("torch.utils._python_dispatch", "ray._private.resource_and_label_spec"),
    *("FLWR_LOCAL_SUPERLINK_HTTP_API_PORT", "FLWR_LOCAL_CONTROL_API_PORT"),
    *("FLWR_DISABLE_UPDATE_CHECK", "RAY_worker_niceness", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"),
    "RAY_OVERRIDE_RESOURCES",
    "transformers.modeling_gguf_pytorch_utils",  # its reader of gguf puts rows back: our oracle
    # a deployment, held against Flower's own routes, plug-ins and login
    *("flwr.cli.auth_plugin.oidc_cli_plugin", "flwr.supercore.credential_store"),
    *("flwr.superlink.dependencies.account", "flwr.superlink.routers.fleet.router"),
    *("flwr.common.constant", "flwr.supercore.primitives.asymmetric"),
}


DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
# Python's own documentation has these.
DOCUMENTED_PRIVATE = {"_asdict", "_replace", "_exit"}


def undocumented(source: str) -> set[str]:
    """Return what a file uses that its libraries do not document."""
    tree = ast.parse(source)
    nodes = list(ast.walk(tree))
    imported = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    imported |= {one.name for node in nodes if isinstance(node, ast.Import) for one in node.names}
    found = {module for module in imported if not is_documented(module)}
    own = {
        *(n.name for n in nodes if isinstance(n, DEFINITIONS)),
        *(n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)),
        *(n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)),
    }
    from_ours = {
        one.asname or one.name
        for node in nodes
        if isinstance(node, ast.ImportFrom) and is_ours(node.module or "")
        for one in node.names
    }
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and not is_ours(node.module or ""):
            found |= {f"{node.module}.{o.name}" for o in node.names if o.name.startswith("_")}
        if isinstance(node, ast.Attribute):
            private = re.fullmatch(r"_[a-zA-Z]\w*", node.attr) and node.attr not in own
            name = ast.unparse(node)
            private = private and name.split(".")[0] not in from_ours
            if (private and node.attr not in DOCUMENTED_PRIVATE) or name == "torch.ops":
                found.add(name)
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            named = re.findall(r"\b(?:FLWR|RAY)_[A-Za-z][A-Za-z_]*\b", node.value)
            found |= set(named) - DOCUMENTED_VARIABLES
    return found


def is_documented(module: str) -> bool:
    library = module.split(".")[0]
    if "._" in module:
        return is_ours(module)
    return library not in DOCUMENTED or module in DOCUMENTED[library]


def is_ours(module: str) -> bool:
    return module.split(".")[0] in PACKAGES


def sources(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


def test_the_product_and_its_benchmarks_use_undocumented_names_in_one_place_only():
    found = {
        str(path.relative_to(ROOT)): names
        for path in sources(*PACKAGES, "benchmarks")
        if (names := undocumented(path.read_text(encoding="utf-8")))
    }
    assert {file: names for file, names in found.items() if file not in GATHERED} == {}
    assert found.keys() == GATHERED


def test_every_gathered_module_says_which_versions_it_was_seen_in():
    for file in GATHERED:
        text = ast.get_docstring(ast.parse((ROOT / file).read_text(encoding="utf-8")))
        assert re.search(r"[Ss]een .*\d+\.\d+\.\d+", text or ""), file


def test_tests_look_into_what_is_listed_and_nothing_else():
    """Their own packages' private names are another matter."""
    found = set()
    for path in sources("tests"):
        source = path.read_text(encoding="utf-8")
        foreign = {name for name in names_of_modules(ast.parse(source)) if not is_ours(name)}
        for name in undocumented(source) if path != Path(__file__).resolve() else ():
            root = name.split(".")[0]
            if root in foreign or name.startswith(("FLWR_", "RAY_")):
                found.add(name)
    assert found <= TESTS_LOOK_INTO, found - TESTS_LOOK_INTO


def names_of_modules(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (one.name.split(".")[0] for one in node.names)
        if isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0]


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("from flwr.supercore.address import parse_address", "flwr.supercore.address"),
        ("import torch\ntorch.cpu._is_avx2_supported()", "torch.cpu._is_avx2_supported"),
        ("import torch\nadd = torch.ops.aten.add", "torch.ops"),
        ("from transformers.masking_utils import sdpa_mask", "transformers.masking_utils"),
        ("from torch._C import Size", "torch._C"),
        ("from torch.nn import _reduction", "torch.nn._reduction"),
        (
            "class A(B):\n    def f(self):\n        self._prepare_accounting(1)",
            "self._prepare_accounting",
        ),
        ("VARIABLES = 'export FLWR_LOCAL_CONTROL_API_PORT=1'", "FLWR_LOCAL_CONTROL_API_PORT"),
        ("ray = {'RAY_worker_niceness': '0'}", "RAY_worker_niceness"),
    ],
)
def test_a_new_one_is_found(line, name):
    assert name in undocumented(line)


def test_what_is_documented_or_our_own_is_not_taken_for_one():
    assert not undocumented(
        "import torch\nfrom transformers import Cache\nfrom common.model._x import _y\n"
        "class A:\n    def __init__(self):\n        self._x = torch.__version__\n"
        "    def f(self):\n        return self._x, self._g()\n    def _g(self):\n        ...\n"
        "A()._asdict()\nHOME = 'FLWR_HOME'\n"
    )


# Modules of ours in the place of others.
STANDS_FOR = {
    "AdaptedLinear": nn.Linear.forward,
    "LeanNorm": LlamaRMSNorm.forward,
    "QuantisedLinear": nn.Linear.forward,
    "SequenceRope": LlamaRotaryEmbedding.forward,
    "_OfEachPart": LlamaRotaryEmbedding.forward,
}


@cache
def our_classes() -> list[type]:
    """Return every class of the four packages that has a base of somebody else's."""
    found = []
    for package in map(importlib.import_module, PACKAGES):
        for entry in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            module = importlib.import_module(entry.name)
            found += [c for _, c in inspect.getmembers(module, inspect.isclass)]
    return sorted({c for c in found if is_ours(c.__module__)}, key=str)


def inherited(cls: type) -> Iterator[tuple[str, type]]:
    """Yield the methods of ours that a foreign base has too, with the base that defines them."""
    for name in vars(cls):
        for base in cls.__mro__[1:]:
            foreign = base is not object and not is_ours(base.__module__)
            if foreign and base.__module__.split(".")[0] in DOCUMENTED and name in vars(base):
                yield name, base
                break


def test_methods_that_a_library_calls_take_whatever_its_own_take():
    """Compared with the signature of the base that they stand in for."""
    compared = set()
    for cls in our_classes():
        if issubclass(cls, torch.autograd.Function):
            continue  # torch hands on what `apply` was given, and that is ours
        for name, base in inherited(cls):
            theirs, ours = getattr(base, name), getattr(cls, name)
            if not inspect.isfunction(theirs) or name == "__init__":
                continue
            if base is nn.Module and name == "forward":
                theirs = STANDS_FOR[cls.__name__]  # Module's own only says that there is none
            assert closed(ours, theirs) == "", f"{cls.__name__}.{name}: {closed(ours, theirs)}"
            compared.add(f"{cls.__name__}.{name}")
    assert {"SlotLayer.update", "LeanLayer.forward", "AdaptedLinear.forward"} <= compared


def closed(ours, theirs) -> str:
    """Say what a function does not take that another takes; empty when it takes all."""
    mine = inspect.signature(ours).parameters
    kinds = {parameter.kind for parameter in mine.values()}
    for name, parameter in inspect.signature(theirs).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            if parameter.kind not in kinds:
                return str(parameter)
        elif name not in mine and parameter.VAR_KEYWORD not in kinds:
            return name
    return ""


def test_a_closed_signature_is_found():
    def update(self, key_states, value_states, *args):
        """The kind that broke generation under transformers 5.24."""

    assert closed(update, transformers.DynamicLayer.update) == "**kwargs"
    assert closed(lambda self, x: x, nn.Linear.forward) == "input"
    assert closed(lambda self, input, **rest: input, nn.Linear.forward) == ""


def test_no_private_method_of_a_library_is_overridden():
    found = [f"{cls.__module__}.{name}" for cls in our_classes() for name in private(cls)]
    assert found == []
    assert private(type("Mutant", (nn.Module,), {"_apply": lambda self: self})) == ["_apply"]


def private(cls: type) -> list[str]:
    methods = [name for name, _ in inherited(cls) if inspect.isfunction(vars(cls)[name])]
    return [name for name in methods if re.match(r"_[a-z]", name)]


def test_what_is_registered_with_transformers_takes_any_argument():
    attention = transformers.AttentionInterface()[register()]
    kinds = {p.kind for p in inspect.signature(attention).parameters.values()}
    assert inspect.Parameter.VAR_KEYWORD in kinds
    masks = transformers.AttentionMaskInterface()
    assert masks[register()] is masks["sdpa"]
