"""Self-contained pages: style, script and data inlined, and a policy that allows nothing else."""

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PAGES = Path(__file__).parent / "pages"


def render(
    page: str, *, styles: Sequence[str], script: str, data: Any, connect: str = "'none'"
) -> str:
    """Return a page with everything it needs inside.

    Only the inlined style and script are allowed, by their hashes: whatever gets into the page
    as data cannot run, and cannot load anything.

    Args:
        page: Template with ``@CSP@``, ``@CSS@``, ``@DATA@`` and ``@JS@``.
        styles: Style sheets, in order.
        script: The script.
        data: JSON that the script reads.
        connect: Where the script may connect to.
    """
    css = "".join(_read(style) for style in styles)
    code = _read(script)
    policy = {
        "default-src": "'none'",
        "style-src": _hash(css),
        "script-src": _hash(code),
        "connect-src": connect,
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    parts = {
        "@CSP@": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "@CSS@": css,
        "@JS@": code,
        "@DATA@": script_json(data),
    }
    text = _read(page)
    for mark, content in parts.items():
        before, _, after = text.partition(mark)
        text = before + content + after
    return text


def script_json(data: Any) -> str:
    r"""Return JSON that cannot end the script element that holds it.

    >>> print(script_json({"drug": "</script>"}))
    {"drug": "\u003c/script\u003e"}
    """
    text = json.dumps(data, ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def _read(name: str) -> str:
    return (PAGES / name).read_text(encoding="utf-8")
