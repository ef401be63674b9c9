"""The command line: its verbs, its exit statuses, and errors of one line without a traceback."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def fedrx(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "sim.cli", *arguments],
        cwd=cwd,
        env=None,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


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
        (["report", "."], ["is not a run directory"]),
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


@pytest.mark.parametrize("damage", ["no tokenizer", "half the weights"])
def test_a_damaged_backbone_is_refused_before_anything_runs(damage, tmp_path):
    from common.model import tiny

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


def test_help_names_every_verb_from_any_folder(tmp_path):
    text = fedrx("--help", cwd=tmp_path).stdout
    for verb in ("demo", "federate", "single", "paper", "resume", "data", "plan", "evaluate"):
        assert f" {verb} " in text
    for verb in ("judge", "review", "suggest", "assist", "report", "export", "audit", "doctor"):
        assert f" {verb} " in text
