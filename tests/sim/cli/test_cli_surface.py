"""The command line: its verbs, its exit statuses, and errors of one line without a traceback."""

import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

from common.configio import from_flat, parse_overrides
from common.errors import UserError
from sim.cli.main import app
from sim.runs.federate import federate
from sim.runs.single import single

ROOT = Path(__file__).resolve().parents[3]


def fedrx(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "sim.cli.main", *arguments],
        cwd=cwd,
        env=None,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.process
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["federate", "nowhere.toml"], ["nowhere.toml", "hospitals.toml"]),
        (
            ["federate", "hospitals.toml", "--set", "train.lr=1"],
            ["train.lr", "train.learning-rate"],
        ),
        (["federate", "hospitals.toml", "--set", "data.path=/nowhere"], ["/nowhere"]),
        (
            ["federate", "demo-tiny.toml", "--set", "model.backbone=/nowhere/model"],
            ["model.backbone", "/nowhere/model"],
        ),
        (
            ["federate", "demo-tiny.toml", "--set", "federation.hospitals=500"],
            ["federation.hospitals=500", "patients"],
        ),
        (["demo", "--tiny", "--set", "data.normalisation=map"], ["data.drug-map"]),
        (["demo", "--tiny", "--set", "data.test-fraction=0"], ["no held-out patients"]),
        (["data", "synthesize", "/proc/nowhere"], ["/proc/nowhere", "name another path"]),
        (["deploy", "hospitals.toml", "dep", "--hospital", "north"], ["--hospital north", "DATA"]),
        (["deploy", "hospitals.toml", "dep", "--hospital", "=x"], ["--hospital =x", "NAME=DATA"]),
        (["report", "."], ["is not a run directory: it has no run.json"]),
        (["report", "runs/nosuch"], ["runs/nosuch does not exist", "name a folder"]),
        (["plan", "typo/paper.toml"], ["typo/paper.toml", "paper.toml"]),
        (["data", "synthesize", "."], ["is not empty"]),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(arguments, words, tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    result = fedrx(*arguments, cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("fedrx: ")]
    assert len(lines) == 1
    assert all(word in lines[0] for word in words), lines[0]
    assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_bad_value_of_a_sweep_is_all_that_is_said():
    arguments = ["sweep", "demo-tiny.toml", "--seeds", "1", "--dry-run", "--vary"]
    skipped = "without the arm krum: "
    assert skipped in CliRunner().invoke(app, [*arguments, "adapter.rank=8"]).output
    refused = CliRunner().invoke(app, [*arguments, "adapter.rank=8,sixteen"])
    assert isinstance(refused.exception, UserError)
    assert refused.output == ""


@pytest.mark.parametrize("verb", [federate, single])
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.checkpoint-steps=abc"], "train.checkpoint-steps='abc'"),
        (["train.checkpoint-steps=0"], "train.checkpoint-steps='0'"),
        (["federation.local-steps=0"], "neither train.steps nor train.epochs"),
        (["model.attention=flash-attn"], "model.attention=flash-attn cannot run here"),
        (["train.device=banana"], "train.device='banana'"),
        (["train.dtype=fp64"], "train.dtype"),
        (["adapter.targets=lm_head"], "no layer has lm_head"),
    ],
)
def test_what_cannot_run_here_leaves_nothing(verb, overrides, words, tmp_path):
    with pytest.raises(UserError, match=re.escape(words)):
        config = from_flat(
            {
                **parse_overrides(overrides),
                "model.backbone": "tiny",
                "data.synthetic-patients": 30,
                "evaluation.samples": 2,
            }
        )
        verb(config, command_line=[], run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.process
def test_a_backbone_that_is_no_llama_is_refused(tmp_path):
    other = tmp_path / "bert"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "bert"}))
    result = fedrx(
        *("federate", "demo-tiny.toml", "--set", f"model.backbone={other}"), cwd=tmp_path
    )
    assert result.returncode == 2
    assert "not a Llama" in result.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.process
@pytest.mark.parametrize("damage", ["no tokenizer", "half the weights"])
def test_a_damaged_backbone_is_refused_before_anything_runs(damage, tmp_path):
    from common.model.backbone import tiny

    folder = tmp_path / "llama"
    tiny.tiny_model().save_pretrained(folder)
    if damage == "half the weights":
        tiny.tiny_tokenizer().save_pretrained(folder)
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:5000])
    result = fedrx("single", "demo-tiny.toml", "--set", f"model.backbone={folder}", cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.process
def test_help_names_every_verb_from_any_folder(tmp_path):
    text = fedrx("--help", cwd=tmp_path).stdout
    for verb in ("demo", "federate", "single", "paper", "resume", "data", "plan", "evaluate"):
        assert f" {verb} " in text
    for verb in ("judge", "review", "suggest", "assist", "report", "export", "audit", "doctor"):
        assert f" {verb} " in text


@pytest.mark.process
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["federat"], "No such command 'federat'. Did you mean 'federate'?; fix: fedrx --help"),
        (["federate"], "Missing argument 'CONFIG'; fix: fedrx federate --help"),
        (["data", "prepare", ".", "--foo"], "No such option '--foo'; fix: fedrx data prepare"),
        (["sweep", "a.toml", "--seeds", "0"], "Invalid value for '--seeds': 0 is not in the range"),
    ],
)
def test_a_wrong_command_line_is_one_line_too(arguments, line, tmp_path):
    result = fedrx(*arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith(f"fedrx: {line}")
    assert result.stderr.count("\n") == 1
    assert not result.stdout


@pytest.mark.process
def test_the_help_of_arguments_is_shown(tmp_path):
    text = " ".join(fedrx("federate", "--help", cwd=tmp_path).stdout.replace("│", "").split())
    assert "A TOML file, or a shipped one" in text
    for file in (ROOT / "configs").glob("*.toml"):
        assert file.name in text
    assert "Run directory" in fedrx("suggest", "--help", cwd=tmp_path).stdout


@pytest.mark.process
def test_the_version_is_told(tmp_path):
    assert fedrx("--version", cwd=tmp_path).stdout == f"fedrx {version('fedrx')}\n"
