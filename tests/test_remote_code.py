"""No call of ours lets a model's folder bring code along."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("common", "client", "server", "sim", "benchmarks")


def loading_calls(source: str) -> list[ast.Call]:
    return [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("from_pretrained", "from_config", "pipeline")
    ]


def refuses_code(call: ast.Call) -> bool:
    values = [word.value for word in call.keywords if word.arg == "trust_remote_code"]
    return [getattr(value, "value", None) for value in values] == [False]


def test_every_loading_call_says_so():
    calls = [
        (file.relative_to(ROOT), call.lineno, refuses_code(call))
        for folder in FOLDERS
        for file in sorted((ROOT / folder).rglob("*.py"))
        for call in loading_calls(file.read_text(encoding="utf-8"))
    ]
    assert len(calls) > 5
    assert [call for call in calls if not call[2]] == []


def test_the_check_sees_what_it_must():
    for words in ("", ", trust_remote_code=True", ", trust_remote_code=None"):
        (call,) = loading_calls(f"AutoTokenizer.from_pretrained(place{words})")
        assert not refuses_code(call)
