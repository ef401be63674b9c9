"""The exported adapter, loaded with PEFT alone, against our own model."""

import json

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from common.config import Config
from common.configio import from_flat
from common.errors import UserError
from common.model.backbone.load import load_model, resolve_backbone
from common.rundir import RunDirectory
from common.training.worker import Worker
from sim.runs.export import export_run


def configure(backbone: str, **more: object) -> Config:
    return from_flat(
        {
            "model.backbone": backbone,
            "adapter.rank": 8,
            "adapter.alpha": 12.0,
            "adapter.seed": 5,
            "train.dtype": "fp32",
            "train.device": "cpu",
            "train.threads": 1,
            **more,
        }
    )


def trained_run(config: Config, folder) -> RunDirectory:
    run = RunDirectory.create(config, directory=folder)
    session = Worker().session(config)
    random = np.random.default_rng(0)
    b = {
        key: (0.02 * random.standard_normal(shape)).astype(np.float32)
        for key, shape in session.adapter.shapes.items()
    }
    run.save_checkpoint("round-0001", b, facts={"round": 1})
    run.write_json(
        "environment.json",
        {
            "inputs": {
                "backbone": session.spec.fingerprint,
                "a": session.adapter.a_fingerprint,
                "samples": "unused",
            }
        },
    )
    return run


def largest_difference(config: Config, run: RunDirectory, reference) -> tuple[float, float]:
    """Of our logits to PEFT's and to the bare backbone's, relative to the largest logit."""
    folder = export_run(run)
    ids = torch.randint(5, 900, (1, 31), generator=torch.Generator().manual_seed(1))
    session = Worker().session(config)
    session.adapter.load(run.load_checkpoint().b)
    with torch.no_grad():
        ours = session.model(input_ids=ids).logits
        bare = reference(input_ids=ids).logits
        theirs = peft.PeftModel.from_pretrained(reference, folder)(input_ids=ids).logits
    size = ours.abs().max()
    return float((ours - theirs).abs().max() / size), float((ours - bare).abs().max() / size)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"adapter.initialiser": "orthonormal"},
        {"adapter.mode": "lora", "adapter.targets": "q_proj,down_proj"},
        {"adapter.mode": "rolora"},
    ],
)
def test_peft_alone_gives_the_same_logits(tmp_path, more):
    config = configure("tiny", **more)
    run = trained_run(config, tmp_path / "run")
    reference = load_model(
        resolve_backbone("tiny"), device=torch.device("cpu"), dtype=torch.float32
    )
    to_peft, to_bare = largest_difference(config, run, reference)
    assert to_peft < 1e-5
    assert to_bare > 1e-2


@pytest.mark.embedded
def test_peft_alone_gives_the_same_logits_on_the_embedded_backbone(tmp_path):
    config = configure("embedded")
    run = trained_run(config, tmp_path / "run")
    reference = AutoModelForCausalLM.from_pretrained(
        resolve_backbone("embedded").folder, dtype=torch.float32
    )
    to_peft, to_bare = largest_difference(config, run, reference)
    assert to_peft < 1e-5
    assert to_bare > 1e-2
    content = json.loads((run.path / "adapter" / "adapter_config.json").read_text())
    assert content["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_files_are_peft_s_and_hold_a_and_b(tmp_path):
    config = configure("tiny")
    run = trained_run(config, tmp_path / "run")
    folder = export_run(run, tmp_path / "out")
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    tensors = load_file(folder / "adapter_model.safetensors")
    session = Worker().session(config)
    expected = {
        f"base_model.model.{m.key}.lora_{letter}.weight"
        for m in session.adapter.modules
        for letter in "AB"
    }
    assert set(tensors) == expected
    for module in session.adapter.modules:
        a = tensors[f"base_model.model.{module.key}.lora_A.weight"]
        np.testing.assert_array_equal(a, module.lora_A.detach().numpy())
    read = peft.LoraConfig.from_pretrained(folder)
    assert (read.r, read.lora_alpha, set(read.target_modules)) == (8, 12.0, {"q_proj", "v_proj"})


def test_the_card_says_what_it_is_for(tmp_path):
    run = trained_run(configure("tiny"), tmp_path / "run")
    metrics = dict.fromkeys(
        ("output_rate", "precision", "recall", "jaccard", "f1", "length_ratio"), 0.25
    )
    metrics |= {"oov_rate": None, "samples": 7, "patients": 5, "level": "string"}
    run.write_json(
        "summary.json",
        {
            "source": "demo",
            "metrics": {"fedrx": metrics},
            "evaluation": {"checkpoint": "round-0001"},
            "privacy": {"epsilon": 3.0, "delta": 1e-5, "unit": "patient"},
        },
    )
    card = (export_run(run) / "README.md").read_text(encoding="utf-8")
    for phrase in (
        "Research only, not for clinical use.",
        "MIMIC-IV Clinical Database Demo",
        "epsilon 3.000, delta 1e-05, per patient",
        "7 held-out admissions of 5 patients",
        "| FedRx (trained B) | 0.250 |",
    ):
        assert phrase in card
    assert str(tmp_path) not in card


def test_unknown_source_counts_as_credentialed(tmp_path):
    run = trained_run(configure("tiny"), tmp_path / "run")
    card = (export_run(run) / "README.md").read_text(encoding="utf-8")
    assert "do not share or publish" in card


def test_metrics_of_another_checkpoint_are_not_claimed(tmp_path):
    run = trained_run(configure("tiny"), tmp_path / "run")
    run.write_json(
        "summary.json", {"metrics": {"fedrx": {}}, "evaluation": {"checkpoint": "round-0002"}}
    )
    assert "held-out" not in (export_run(run) / "README.md").read_text(encoding="utf-8")


def test_an_earlier_export_is_replaced_and_nothing_else(tmp_path):
    run = trained_run(configure("tiny"), tmp_path / "run")
    folder = export_run(run, tmp_path / "out")
    (folder / "adapter_config.json").write_text("{}")
    assert "LORA" in (export_run(run, folder) / "adapter_config.json").read_text()
    for name, files in {
        "mine": ("thesis.tex",),
        # Another tool's adapter, and an export that somebody has added to.
        "peft": ("adapter_config.json", "adapter_model.safetensors", "README.md"),
        "out": ("notes.txt",),
    }.items():
        other = tmp_path / name
        other.mkdir(exist_ok=True)
        for file in files:
            (other / file).write_text("mine")
        with pytest.raises(UserError, match="holds something else"):
            export_run(run, other)
        assert all((other / file).read_text() == "mine" for file in files)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out", "peft", "run"]


def test_another_a_is_refused(tmp_path):
    run = trained_run(configure("tiny"), tmp_path / "run")
    inputs = run.read_json("environment.json")["inputs"]
    run.write_json("environment.json", {"inputs": {**inputs, "a": "0" * 64}})
    with pytest.raises(UserError, match="A is not what the run was trained with"):
        export_run(run)
