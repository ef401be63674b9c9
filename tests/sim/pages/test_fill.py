"""What a page may run and load, by its own text."""

import base64
import hashlib
import json
import re

import jinja2
import pytest

from sim.pages.fill import fill, render


def test_a_page_runs_what_it_came_with_and_nothing_else() -> None:
    """The hashes of the policy are those of the style and the script, computed here."""
    data = {"drug": "</script><script>alert(1)</script>", "dose": "5 & 10"}
    page = render("assist", data=data, connect="'self'")
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)[1].replace("&#39;", "'")
    for tag, directive in (("style", "style-src"), ("script", "script-src")):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none';")
    assert "alert(1)</script>" not in page
    (shown,) = re.findall(r'type="application/json"[^>]*>(.*?)</script>', page, flags=re.DOTALL)
    assert json.loads(shown) == data


def test_what_a_template_shows_must_be_there() -> None:
    with pytest.raises(jinja2.UndefinedError):
        fill("assist.html", css="", script="", data="")
