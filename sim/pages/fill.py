"""Self-contained pages from templates: style, script and data inlined, and nothing else allowed."""

import base64
import functools
import hashlib
import json
import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

PAGES = Path(__file__).parent


def render(name: str, *, data: object, connect: str = "'none'") -> str:
    """Return a page with everything it needs inside.

    Only the inlined style and script are allowed, by their hashes: whatever gets into the page
    as data cannot run, and cannot load anything.

    Args:
        name: Of template, style sheet and script; those that all pages share come before.
        data: JSON that the script reads.
        connect: Where the script may connect to.
    """
    css, code = (read(f"base.{kind}") + read(f"{name}.{kind}") for kind in ("css", "js"))
    policy = (
        f"default-src 'none'; style-src {_hash(css)}; script-src {_hash(code)}; connect-src "
        f"{connect}; img-src data:; base-uri 'none'; form-action 'none'"
    )
    return fill(f"{name}.html", policy=policy, css=css, script=code, data=script_json(data))


def fill(name: str, **values: object) -> str:
    """Fill a template in; on a page, what is shown is escaped.

    Args:
        name: The template's; ``.html`` for a page.
        **values: What the template shows.
    """
    return _templates().get_template(name).render(values)


def fenced(text: str) -> str:
    """Fence a text for Markdown, with more backticks than any of its own.

    >>> fenced("a ``` b").splitlines()
    ['````text', 'a ``` b', '````']
    """
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 0)
    return f"{fence}text\n{text.strip()}\n{fence}"


def cell(text: str) -> str:
    r"""Keep a text within its cell of a Markdown table.

    >>> print(cell("a|b"))
    a\|b
    """
    return text.replace("|", "\\|").replace("\n", " ")


def script_json(data: object) -> str:
    r"""Return JSON that cannot end the script element that holds it.

    >>> print(script_json({"drug": "</script>"}))
    {"drug": "\u003c/script\u003e"}
    """
    text = json.dumps(data, ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@functools.cache
def _templates() -> Environment:
    made = Environment(
        loader=FileSystemLoader(PAGES),
        autoescape=select_autoescape(["html"], default=False),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= {"cell": cell, "fenced": fenced, "quoted": json.dumps}
    return made


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def read(name: str) -> str:
    """Return a style sheet or a script."""
    return (PAGES / name).read_text(encoding="utf-8")
