"""Tokenizers that cannot serve are refused before a run; the fingerprint covers the rest."""

import contextlib
import json
import shutil

import pytest
from transformers.utils import chat_template_utils

from common.configio import from_flat
from common.errors import UserError
from common.model.backbone.load import load_tokenizer, resolve_backbone
from common.model.backbone.tiny import tiny_tokenizer
from common.training.worker import Worker
from sim.process.progress import SILENT
from sim.runs.preparation import fingerprints, prepare, require_same_inputs
from sim.runs.single import single

PLAIN = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<answer>"


@pytest.fixture(scope="module")
def saved(tmp_path_factory, save_tiny):
    return save_tiny(tmp_path_factory.mktemp("tokenizer") / "llama")


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "llama")


def resolved(folder):
    return resolve_backbone(str(folder), cache_dir=folder.parent / "cache")


def set_template(folder, template) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    shutil.rmtree(folder / "additional_chat_templates", ignore_errors=True)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def set_tokens(folder, change) -> None:
    """Change tokenizer.json."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def several(folder):
    set_template(folder, {"rag": PLAIN, "tool_use": PLAIN})


def none(folder):
    (folder / "chat_template.jinja").unlink()


def broken(folder):
    set_template(folder, "{% for m in messages %}{{ m")


def failing(folder):
    set_template(folder, "{{ raise_exception('only tools may speak') }}")


def random(folder):
    set_template(folder, PLAIN + "{{ range(100000) | random }}")


def silent(folder):
    set_template(folder, "<answer>")


def end_beyond(folder):
    def change(content):
        one = next(token for token in content["added_tokens"] if token["content"] == "<|im_end|>")
        one["id"] = content["model"]["vocab"]["<|im_end|>"] = 4096

    set_tokens(folder, change)


def another_beyond(folder):
    set_tokens(folder, lambda content: content["model"]["vocab"].update({"zzz": 1024}))


def no_file(folder):
    (folder / "tokenizer.json").unlink()


def torn_file(folder):
    file = folder / "tokenizer.json"
    file.write_text(file.read_text()[:500])


CASES = [
    (several, ["rag, tool_use", "none is the default"]),
    (none, ["no chat template"]),
    (broken, ["TemplateSyntaxError"]),
    (failing, ["only tools may speak"]),
    (random, ["several ways"]),
    (silent, ["leaves out"]),
    (end_beyond, ["the end token <|im_end|>", "4096", "below 1024"]),
    (another_beyond, ["zzz", "1024"]),
    (no_file, ["no readable tokenizer"]),
    (torn_file, ["no readable tokenizer"]),
]


@pytest.mark.parametrize(("change", "words"), CASES, ids=[case[0].__name__ for case in CASES])
def test_a_tokenizer_that_cannot_serve_is_refused(folder, change, words):
    resolved(folder)
    change(folder)
    with pytest.raises(UserError) as refused:
        resolved(folder)
    assert refused.value.exit_status == 2
    assert "\n" not in str(refused.value)
    assert all(word in str(refused.value) for word in [*words, "model.backbone=", "fix: "])


def test_no_run_directory_is_made_for_it(folder):
    broken(folder)
    config = from_flat({"model.backbone": str(folder), "data.synthetic-patients": 60})
    run = folder.parent / "run"
    with pytest.raises(UserError, match="TemplateSyntaxError"):
        single(config, command_line=[], run_dir=run)
    assert not run.exists()


def test_a_run_does_not_go_on_with_an_edited_template(folder):
    config = from_flat({"model.backbone": str(folder), "data.synthetic-patients": 60})
    begun = fingerprints(prepare(config, SILENT, Worker()))
    require_same_inputs(begun, prepare(config, SILENT, Worker()))
    set_template(folder, PLAIN)
    with pytest.raises(UserError, match="the run's backbone changed since it began"):
        require_same_inputs(begun, prepare(config, SILENT, Worker()))


def test_a_default_among_several_templates_serves(folder):
    set_template(folder, {"default": PLAIN, "tool_use": "{{ none }}"})
    first = resolved(folder).fingerprint
    set_template(folder, PLAIN)
    assert resolved(folder).fingerprint == first


def test_the_fingerprint_covers_tokenizer_and_template(folder):
    prints = [resolved(folder).fingerprint]
    assert resolved(folder).fingerprint == prints[0]
    # written anew by another version of transformers, it is the same tokenizer
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"saved_by": "5.99"}))
    set_tokens(folder, lambda content: None)
    assert resolved(folder).fingerprint == prints[0]

    def swap(content):
        vocabulary = content["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]

    set_tokens(folder, swap)
    prints.append(resolved(folder).fingerprint)
    set_template(folder, PLAIN)
    prints.append(resolved(folder).fingerprint)
    set_template(folder, PLAIN.replace("<answer>", "<reply>"))
    prints.append(resolved(folder).fingerprint)
    (folder / "chat_template.jinja").write_text(PLAIN + "{# a remark #}")
    prints.append(resolved(folder).fingerprint)
    content = json.loads(settings.read_text())
    settings.write_text(json.dumps(content | {"eos_token": "<|im_start|>"}))
    prints.append(resolved(folder).fingerprint)
    assert len(set(prints)) == len(prints)


def test_the_fingerprint_does_not_follow_the_clock(folder, monkeypatch):
    set_template(folder, "{{ strftime_now('%d %b %Y') }}" + PLAIN)
    first = resolved(folder).fingerprint
    monkeypatch.setattr(chat_template_utils, "datetime", None)
    assert resolved(folder).fingerprint == first


def test_code_beside_a_tokenizer_is_never_run(folder):
    marker = folder / "was-run"
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Own: pass\n")
    settings = folder / "tokenizer_config.json"
    content = json.loads(settings.read_text())
    content |= {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}, "tokenizer_class": "Own"}
    settings.write_text(json.dumps(content))
    with contextlib.suppress(UserError):
        load_tokenizer(resolved(folder))
    assert not marker.exists()
