"""Only the command line prints: all else returns what is to be said, or tells its console."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FILES = [
    file
    for package in ("common", "client", "server", "sim")
    for file in sorted((ROOT / package).rglob("*.py"))
    if not file.is_relative_to(ROOT / "sim" / "cli")
]
START = ROOT / "sim" / "start" / "fedrx" / "__init__.py"
"""The command before it can import anything: what is missing goes to standard error."""
PRINTERS = ("rich", "typer", "click")
TABLES = {"rich.box", "rich.console.RenderableType", "rich.rule", "rich.table", "rich.text"}
"""What the report builds; the command line prints it."""


def spoken(source: str) -> set[str]:
    """Return how a module reaches the terminal, or what it imports of those that do."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Name(id="print") | ast.Attribute(attr="print"):
                found.add("print")
            case ast.Attribute(value=ast.Name(id="sys"), attr="stdout" | "stderr" as stream):
                found.add(stream)
            case ast.Import(names=names):
                found |= {one.name for one in names if one.name.split(".")[0] in PRINTERS}
            case ast.ImportFrom(module=str(name), names=names) if name.split(".")[0] in PRINTERS:
                whole = name in (*PRINTERS, "rich.console")
                found |= {f"{name}.{one.name}" if whole else name for one in names}
            case ast.ImportFrom(module="sys", names=names):
                found |= {one.name for one in names} & {"stdout", "stderr"}
    return found


def allowed(file: Path) -> set[str]:
    if file.is_relative_to(ROOT / "sim" / "report"):
        return TABLES
    return {"stderr"} if file == START else set()


def test_nothing_else_prints():
    found = {file: spoken(file.read_text(encoding="utf-8")) - allowed(file) for file in FILES}
    assert len(FILES) > 200
    assert {str(file.relative_to(ROOT)): how for file, how in found.items() if how} == {}


@pytest.mark.parametrize(
    ("source", "how"),
    [
        ("print('a')", {"print"}),
        ("def f(console):\n    console.print('a')", {"print"}),
        ("from functools import partial\nsay = partial(print, flush=True)", {"print"}),
        ("from rich import print as say", {"rich.print"}),
        ("from typer import echo", {"typer.echo"}),
        ("import rich.console", {"rich.console"}),
        ("from rich.console import Console", {"rich.console.Console"}),
        ("from rich.progress import Progress", {"rich.progress"}),
        ("import sys\nsys.stdout.write('a')", {"stdout"}),
        ("from sys import stderr", {"stderr"}),
        ("class A:\n    def f(self):\n        '''>>> print(1)'''", set()),
    ],
)
def test_every_way_to_print_is_seen(source, how):
    assert spoken(source) == how
