"""Markdown reports show foreign text as it is: read back by a CommonMark renderer."""

import html
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.markdown import MarkdownIt

from sim.report.html import Block, markdown_text, to_html, to_markdown
from sim.runs.sweep import FIGURES, ArmRow, Interval, markdown

HOSTILE = [
    "Aspirin | 81 mg",
    "`rm -rf`",
    "``a`|`b``",
    "<script>alert(1)</script>",
    "<img src=x onerror=y>",
    "<!-- comment",
    "[click](https://example.org)",
    "![pixel](https://example.org/p.png)",
    "[a]: https://example.org",
    "<https://example.org>",
    "# heading",
    "one\n# two\n\n- three\n\n| a |\n|---|\n",
    "- item",
    "+ item",
    "12. item",
    "3) item",
    "---",
    "***",
    "===",
    "> quote",
    "**bold** _thin_ __bold__ ~~gone~~",
    "&lt;b&gt; &amp; &copy;",
    "\\| \\` \\\\",
    "    indented",
    "$x_1$ costs a_b_c",
    "naïve drug, 5 µg/mL; 0.5–1.0",
]


class Page(HTMLParser):
    """What a rendered page consists of: its elements, and the texts of some."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag in ("h1", "h2", "p", "th", "td"):
            self.texts.append("")

    def handle_data(self, data):
        if self.texts and not data.isspace():
            self.texts[-1] += data


def shown(text):
    """The text that a browser shows: white space runs together."""
    return " ".join(text.split())


def rendered(text):
    return Page(
        MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(text)
    )


def report(text):
    block = Block(
        title=text, note=text, warning=True, headers=("drug", text), rows=((text, "0.5"),)
    )
    return to_markdown(text, [block, Block(note=text)])


@pytest.mark.parametrize("text", HOSTILE)
def test_foreign_text_is_shown_and_does_nothing(text):
    """As title, heading, warning, note, table head and cell; the page says the same."""
    page = rendered(report(text))
    line = shown(text)
    assert page.texts == [line, line, line, "drug", line, line, "0.5", line]
    assert page.tags == [
        *("h1", "h2", "p", "strong", "table", "thead", "tr", "th", "th"),
        *("tbody", "tr", "td", "td", "p"),
    ]
    twin = to_html(text, [Block(note=text)])
    assert shown(html.unescape(re.search("<p>(.*)</p>", twin, re.DOTALL)[1])) == line


@given(st.text(st.sampled_from("ab1 .|`*_#~<>[]()!-+=&;:/\\\n\"'@$"), min_size=1, max_size=30))
def test_any_text_is_shown_and_does_nothing(text):
    line = shown(text)
    if line:
        page = rendered(report(text))
        assert page.texts == [line, line, line, "drug", line, line, "0.5", line]


@pytest.mark.parametrize(
    "text", ["see https://example.org/x", "ftp://a.b", "WWW.example.org", "mail@example.org"]
)
def test_no_bare_address_is_left_for_a_renderer_that_makes_links_of_them(text):
    source = markdown_text(text)
    assert not re.search(r"://|www\.|@", source, re.IGNORECASE)
    assert rendered(source).texts == [text]


def test_figures_and_names_stay_readable_in_the_source():
    for text in ("0.321 (0.22–0.42)", "b_sha256", "-0.5", "fa-lora r16", "1.00 MB", "ab" * 32):
        assert markdown_text(text) == text


def test_a_sweep_s_arm_is_a_cell_too():
    figures = dict.fromkeys(FIGURES, Interval(0.5, None))
    text = "fa-lora model.backbone=a|b<i>"
    page = rendered(markdown([ArmRow(arm=text, runs=1, **figures)]))
    assert page.texts[len(FIGURES) + 2] == text
    assert "i" not in page.tags
