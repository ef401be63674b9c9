"""Chat templates as they come: one that lacks a role, fails, or reads the clock."""

import datetime
from types import SimpleNamespace

import pytest
from transformers.utils import chat_template_utils

from common.errors import UserError
from common.model.backbone.tiny import tiny_tokenizer
from common.provenance import PROMPT_DATE, environment
from common.text.chat import prompt_text, prompt_tokens

SYSTEM, USER = "List the drugs.", "Sex: F\n- Ménière's disease"
PLAIN = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<answer>"
WITHOUT_SYSTEM = (
    "{% for m in messages if m['role'] != 'system' %}<{{ m['role'] }}>{{ m['content'] }}"
    "{% endfor %}<answer>"
)
REFUSING = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}" + PLAIN
)
ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% endfor %}" + PLAIN
)


def tokenizer_with(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("template", [None, PLAIN])
def test_a_template_with_a_system_role_gives_what_transformers_gives(template):
    tokenizer = tokenizer_with(template) if template else tiny_tokenizer()
    conversation = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": USER}]
    theirs = tokenizer.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    assert prompt_tokens(tokenizer, SYSTEM, USER) == theirs["input_ids"]


@pytest.mark.parametrize("template", [WITHOUT_SYSTEM, REFUSING, ALTERNATING])
def test_without_a_system_role_the_user_says_it(template):
    text = prompt_text(tokenizer_with(template), SYSTEM, USER)
    assert text == f"<user>{SYSTEM}\n\n{USER}<answer>"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages %}", "TemplateSyntaxError"),
        ("{{ messages.gone.deeper }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ raise_exception('no') }}", "TemplateError"),
        ("\ud800" + PLAIN, "UnicodeEncodeError"),
        ("<answer>", "leaves out"),
        ("{{ messages[0]['content'] if messages[0]['role'] == 'system' }}<answer>", "leaves out"),
        ("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}", "leaves out"),
        ("{% for m in messages %}{{ m['content'][0]['text'] }}{% endfor %}", "leaves out"),
    ],
)
def test_a_template_that_does_not_render_is_refused(template, words):
    with pytest.raises(UserError, match="fix: ") as refused:
        prompt_text(tokenizer_with(template), SYSTEM, USER)
    assert words in str(refused.value)
    assert USER not in str(refused.value)


CLOCK = "\n  {% if strftime_now is defined %}  {{ strftime_now('FORMAT') }}{% endif %}\n" + PLAIN
FORMATS = ("%d %b %Y", "%A, %-d %B %Y", "%Y-%m-%d %H:%M:%S", "%F", "%D", "%j %y 100%%", "")


class Tomorrow(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2031, 12, 25, 13, 14, 15, tzinfo=tz)


@pytest.mark.parametrize("form", FORMATS)
def test_a_template_sees_one_date_on_every_day(form, monkeypatch):
    tokenizer = tokenizer_with(CLOCK.replace("FORMAT", form))
    today = prompt_text(tokenizer, SYSTEM, USER)

    def theirs():
        conversation = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": USER}]
        return tokenizer.apply_chat_template(
            conversation, add_generation_prompt=True, tokenize=False
        )

    free = theirs()
    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    assert prompt_text(tokenizer, SYSTEM, USER) == today
    if form:  # the mutant: transformers' own clock
        assert theirs() != free
    # Oracle: transformers' own rendering on the frozen day, byte for byte.
    moment = datetime.datetime.combine(PROMPT_DATE, datetime.time())
    frozen = SimpleNamespace(now=lambda: moment)
    monkeypatch.setattr(chat_template_utils, "datetime", frozen)
    assert theirs() == today


def test_the_clock_stands_still_in_a_templates_own_macros_too(monkeypatch):
    template = (
        "{% macro head() %}[{{ strftime_now('%Y') }}]{% endmacro %}{{ head() }}"
        "{% set clock = strftime_now %}{{ clock('%m') }}" + PLAIN
    )
    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    text = prompt_text(tokenizer_with(template), SYSTEM, USER)
    assert text.startswith(f"[{PROMPT_DATE.year}]07<system>")


def test_the_date_is_stored_with_a_run():
    assert environment([])["prompt_date"] == PROMPT_DATE.isoformat() == "2024-07-26"
