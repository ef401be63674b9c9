"""Configuration: three forms in step, every problem named, and what is allowed."""

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import Config
from common.configio import (
    Change,
    changed_freely,
    completed_for_flwr,
    config_hash,
    differences,
    flatten,
    from_flat,
    known_keys,
    parse_overrides,
    read_config,
    to_toml,
    toml_scalar,
)
from common.errors import UserError
from common.provenance import PACKAGES, pip_install
from sim.flower.run_config import keys_page

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_of_keys_is_the_configuration_s():
    assert (ROOT / "configs" / "README.md").read_text() == keys_page()


def test_pyproject_carries_the_same_keys_and_defaults_for_flower():
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())
    sections = table["tool"]["flwr"]["app"]["config"]
    flat = {
        f"{name}.{key}": value for name, keys in sections.items() for key, value in keys.items()
    }
    assert flat == flatten(Config())


def test_every_value_is_one_that_flower_accepts():
    assert {type(value) for value in flatten(Config()).values()} <= {bool, int, float, str}


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.toml")), ids=lambda f: f.name)
def test_shipped_configurations_are_valid(file):
    assert isinstance(read_config(file), Config)


def test_written_toml_reads_back_to_the_same_configuration(tmp_path):
    config = from_flat({"adapter.rank": 32, "data.path": 'a "b" \\ c', "train.learning-rate": 3e-5})
    (tmp_path / "c.toml").write_text(to_toml(config, heading="two\nlines"))
    assert read_config(tmp_path / "c.toml") == config


@given(st.text(max_size=40))
def test_any_text_survives_toml(text):
    if any("\ud800" <= char <= "\udfff" for char in text):
        return
    assert tomllib.loads(f"x = {toml_scalar(text)}")["x"] == text


def test_all_problems_are_named_at_once_with_what_is_allowed():
    with pytest.raises(UserError) as caught:
        from_flat({"adapter.rnk": 1, "train.learning-rate": -1.0, "federation.rounds": "many"})
    text = str(caught.value)
    assert "adapter.rnk (did you mean adapter.rank?)" in text
    assert "train.learning-rate=-1.0 (allowed: a number > 0 and <= 1000)" in text
    assert "federation.rounds='many' (allowed: an integer >= 1)" in text
    assert "3 problems" in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("adapter.rank", 0),
        ("adapter.rank", 1.5),
        ("adapter.rank", True),
        ("federation.fraction", 0.0),
        ("federation.fraction", 1.01),
        ("train.optimizer", "lion"),
        ("train.learning-rate", float("nan")),
        ("train.learning-rate", float("inf")),
        ("train.learning-rate", 1e38),
        ("train.weight-decay", 1e38),
        ("adapter.alpha", 1e38),
        ("train.keep-state", 1),
        ("data.path", 3),
    ],
)
def test_a_value_outside_its_limits_is_refused(key, value):
    with pytest.raises(UserError, match=key):
        from_flat({key: value})


def test_initials_and_misplaced_keys_get_a_hint():
    with pytest.raises(UserError, match="did you mean train.learning-rate"):
        parse_overrides(["train.lr=1"])
    with pytest.raises(UserError, match="did you mean adapter.rank"):
        parse_overrides(["rank=1"])


def test_overrides_take_the_type_of_their_key():
    values = parse_overrides(
        ["train.keep-state=false", "adapter.rank=8", "train.learning-rate=1e-2", "run.name=x=y"]
    )
    assert values == {
        "train.keep-state": False,
        "adapter.rank": 8,
        "train.learning-rate": 0.01,
        "run.name": "x=y",
    }
    for text in ("adapter.rank", "adapter.rank=eight", "train.keep-state=perhaps"):
        with pytest.raises(UserError):
            parse_overrides([text])


TEMPLATE = "Ill with:\n{diagnoses}\n"


def test_a_template_s_text_travels_and_its_file_may_go(tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"\xef\xbb\xbfIll with:\r\n{diagnoses}\r\n")
    (tmp_path / "a.toml").write_text(f"[text]\ntemplate = '{file}'\n")
    found = [
        read_config(tmp_path / "a.toml"),
        from_flat(parse_overrides([f"text.template={file}"])),
    ]
    file.unlink()
    (tmp_path / "b.toml").write_text(to_toml(found[0]))
    found += [read_config(tmp_path / "b.toml"), from_flat(flatten(found[0]))]
    assert [one.text.template for one in found] == [TEMPLATE] * 4
    assert config_hash(found[0]) != config_hash(Config())


def test_what_comes_over_the_wire_opens_no_file(tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text(TEMPLATE)
    with pytest.raises(UserError, match=r"text\.template: .* is no template"):
        from_flat({"text.template": str(file)})


@pytest.mark.parametrize("content", [None, b"\xff{diagnoses}", b"{diagnosis}"])
def test_a_template_that_cannot_be_used_is_one_line(tmp_path, content):
    file = tmp_path / "prompt.txt"
    if content is not None:
        file.write_bytes(content)
    (tmp_path / "a.toml").write_text(f"[text]\ntemplate = '{file}'\n")
    with pytest.raises(UserError, match=r"text\.template.*fix") as caught:
        read_config(tmp_path / "a.toml")
    assert "\n" not in str(caught.value)


def test_a_broken_or_missing_file_is_one_line(tmp_path):
    (tmp_path / "broken.toml").write_text("[train\n")
    for name in ("broken.toml", "absent.toml"):
        with pytest.raises(UserError) as caught:
            read_config(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_hash_and_differences_leave_the_run_section_out():
    base = Config()
    renamed = replace(base, run=replace(base.run, name="other"))
    wider = replace(base, adapter=replace(base.adapter, rank=32))
    assert config_hash(base) == config_hash(renamed) != config_hash(wider)
    assert differences(base, renamed) == []
    assert differences(base, wider) == [Change("adapter.rank", 16, 32)]


def test_plain_flower_runs_settle_on_one_folder_and_flowers_number_of_nodes(monkeypatch, tmp_path):
    monkeypatch.setenv("FEDRX_RUNS", str(tmp_path))
    client, server = (
        completed_for_flwr(Config(), run_id=7, nodes=2),
        completed_for_flwr(Config(), run_id=7),
    )
    assert client.run.directory == server.run.directory
    assert client.federation.hospitals == 2
    launched = replace(Config(), run=replace(Config().run, directory="/somewhere"))
    assert completed_for_flwr(launched, run_id=7, nodes=2) == launched


def test_every_key_says_what_it_means():
    for key, entry in known_keys().items():
        assert len(entry.metadata["meaning"]) > 5, key


@pytest.mark.parametrize(
    ("text", "example"),
    [("adapter.rank=eight", "adapter.rank=16"), ("data.drop-flushes=1", "data.drop-flushes=true")],
)
def test_a_value_of_the_wrong_kind_is_answered_with_one_that_is_right(text, example):
    with pytest.raises(UserError, match=f"--set {text}; .*; fix: for instance --set {example}$"):
        parse_overrides([text])
    parse_overrides([example])


def test_what_decides_what_was_trained_may_not_change_afterwards() -> None:
    base = Config()
    free = ("evaluation.", "train.device")
    changed = changed_freely(base, ["evaluation.samples=3", "train.device=cpu"], free)
    assert [change.key for change in differences(base, changed)] == [
        "train.device",
        "evaluation.samples",
    ]
    with pytest.raises(UserError, match=r"train\.seed: 0 -> 1; .*evaluation\.\*, train\.device"):
        changed_freely(base, ["train.seed=1", "evaluation.samples=3"], free)


def test_a_file_that_begins_with_a_byte_order_mark_is_read(tmp_path) -> None:
    """As editors of Windows write UTF-8."""
    file = tmp_path / "config.toml"
    file.write_bytes(b"\xef\xbb\xbf[adapter]\r\nrank = 4\r\n")
    assert read_config(file).adapter.rank == 4


def test_no_fix_names_a_package_that_is_on_no_index() -> None:
    """``fedrx`` is on no index: a fix names the package behind an extra, as the metadata does."""
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            naming = [line for line in file.read_text().splitlines() if "install 'fedrx[" in line]
            assert all("``" in line for line in naming), file
    assert pip_install("llguidance") == "pip install 'llguidance<1.10,>=1.3'"


def test_what_was_called_constrained_is_a_way_of_decoding(tmp_path):
    file = tmp_path / "old.toml"
    file.write_text("[evaluation]\nconstrained = true\n")
    assert read_config(file).evaluation.decoding == "grammar"
    assert read_config(file, ["evaluation.constrained=false"]).evaluation.decoding == "greedy"
    file.write_text('[evaluation]\nconstrained = "maybe"\n')
    with pytest.raises(UserError, match=r"unknown key evaluation\.constrained"):
        read_config(file)
