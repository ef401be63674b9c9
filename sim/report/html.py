"""A report's blocks as one HTML page that refers to nothing outside itself, or as markdown."""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.files import write_text
from sim.pages.fill import fill, read

_SPECIAL = re.compile(r"[\\`*\[\]|~#$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
"""What markdown reads as markup anywhere; an underscore within a word is none."""
_LIST_MARK = re.compile(r"^([0-9]{0,9})([-+.)])(?=\s|-|$)")
"""What begins a list or a rule at the start of a line."""
_WORLD_WIDE = re.compile(r"\b(www)\.", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A figure between 0 and 1 with its interval, drawn beside its name."""

    name: str
    value: float | None
    text: str
    interval: tuple[float, float] | None = None
    ours: bool = False


@dataclass(frozen=True, kw_only=True)
class Block:
    """One piece of a page: a heading with a note, bars, a table, or plots, or several of them."""

    title: str = ""
    note: str = ""
    headers: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    svgs: tuple[str, ...] = ()
    bars: tuple[Bar, ...] = ()
    lead: bool = False
    """The note is what the page has to say."""
    warning: bool = False
    text_cells: bool = False


def write_page(page: Path, title: str, blocks: Sequence[Block]) -> Path:
    """Write a page and, beside it under the same name, its markdown twin; return the page."""
    write_text(page.with_suffix(".md"), to_markdown(title, blocks))
    write_text(page, to_html(title, blocks))
    return page


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """Render blocks as one self-contained page."""
    # Plots carry style attributes, and a heat map its image.
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return fill("report.html", policy=policy, css=read("report.css"), title=title, blocks=blocks)


def to_markdown(title: str, blocks: Sequence[Block]) -> str:
    """Render blocks as markdown; plots stay on the page."""
    parts = [f"# {markdown_text(title)}"]
    for block in blocks:
        if block.title:
            parts.append(f"## {markdown_text(block.title)}")
        if block.note:
            note = markdown_text(block.note)
            parts.append(f"**{note}**" if block.warning or block.lead else note)
        if block.rows:
            parts.append(markdown_table(block.headers, block.rows))
    return "\n\n".join(parts) + "\n"


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    r"""Render a table of plain texts.

    >>> print(markdown_table(["drug", "F1"], [["a|b", "0.5"]]))
    | drug | F1 |
    |---|---|
    | a\|b | 0.5 |
    """
    lines = ["| " + " | ".join(map(markdown_text, line)) + " |" for line in (headers, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(headers), *lines[1:]])


def markdown_text(text: str) -> str:
    r"""Return a text so that markdown shows it as it is, on one line: no markup, HTML, or link.

    >>> print(markdown_text("1|2 <b> [x](y) a_b"), markdown_text("# 1"), markdown_text("1. a"))
    1\|2 &lt;b&gt; \[x\](y) a_b \# 1 1\. a
    """
    line = html.escape(" ".join(text.split()), quote=False)
    line = _SPECIAL.sub(r"\\\g<0>", line)
    line = _LIST_MARK.sub(r"\1\\\2", line)
    # Many renderers make links of bare addresses, of pages and of people.
    line = line.replace("://", "&#58;//").replace("@", "&#64;")
    return _WORLD_WIDE.sub(r"\1&#46;", line)
