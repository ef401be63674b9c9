"""The exported adapter, loaded with PEFT alone, against our own model."""

import json
import re
from dataclasses import asdict, replace

import gguf
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from common.config import Config, EvaluationConfig
from common.configio import from_flat
from common.errors import UserError
from common.evaluation.generate import generate
from common.model.backbone.load import load_model, load_tokenizer, resolve_backbone
from common.records.run import RunRecord, SavedFacts
from common.rundir import RunDirectory
from common.text.batches import encode_prompt
from common.text.prompts import messages
from common.training.worker import Worker
from sim.runs.export import export_run
from sim.runs.model_card import EXAMPLE, model_card


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
    run.save_checkpoint("round-0001", b, facts=SavedFacts(round=1))
    inputs = {"backbone": session.spec.fingerprint, "a": session.adapter.a_fingerprint}
    run.write_json("run.json", RunRecord(mode="federation", resumable=True, inputs=inputs))
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


METRICS = {
    **dict.fromkeys(("output_rate", "precision", "recall", "jaccard", "f1", "length_ratio"), 0.25),
    "oov_rate": None,
    "samples": 7,
    "patients": 5,
    "level": "string",
}


def test_the_card_says_what_it_is_for(tmp_path):
    run = trained_run(configure("tiny"), tmp_path / "run")
    run.write_json(
        "summary.json",
        {
            "source": "demo",
            "metrics": {"fedrx": METRICS},
            "evaluation": {"checkpoint": "round-0001", "settings": {"samples": 7}},
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


OTHERWISE = "what lists written so are worth is not in it"
NO_END = "not where a list ends"


@pytest.mark.parametrize(
    ("way", "words"),
    [
        (
            {"method": "score"},
            (
                "each name of the hospital's own formulary (what its training patients were "
                "ordered) was scored, and the ranking was cut at a threshold chosen on the "
                "hospital's validation patients (`evaluation.method = score`, "
                "`evaluation.frequencies = false`)"
            ),
        ),
        (
            {"method": "score", "frequencies": True, "formulary": "/secret/drugs.txt"},
            (
                "each name of a given list of drugs (`evaluation.formulary`) was scored, and how "
                "often the hospital's training patients were ordered a drug counted beside the "
                "score, by a weight chosen on its validation patients, and every list was as long "
                "as those of its training patients on average (`evaluation.method = score`, "
                "`evaluation.frequencies = true`)"
            ),
        ),
        ({"decoding": "formulary"}, "held to the names of the hospital's own formulary"),
        ({"decoding": "grammar"}, "held to the answer's format (`evaluation.method = generate`"),
        ({}, "wrote its lists in this table freely"),
    ],
)
@pytest.mark.parametrize("layout", ["peft", "merged", "gguf"])
def test_the_card_says_how_its_figures_were_made_and_that_its_code_does_otherwise(
    tmp_path, way, words, layout
):
    """By the evaluation's settings, which need not be those that the run was trained with."""
    run = trained_run(configure("tiny", **{"data.drug-order": "name"}), tmp_path / "run")
    settings = asdict(EvaluationConfig(**way))
    evaluation = {"checkpoint": "round-0001", "settings": settings}
    run.write_json("summary.json", {"metrics": {"fedrx": METRICS}, "evaluation": evaluation})
    base, checkpoint = resolve_backbone("tiny"), run.load_checkpoint()
    card = model_card(run, run.config(), base, checkpoint, layout=layout, hub_id="a/b")
    table, below = card.split("## Prompt and answer")
    assert words in table
    assert "in the order of the alphabet (`data.drug-order = name`)" in table
    assert (OTHERWISE in below) == bool(way)
    assert below.count(OTHERWISE) <= 1
    assert NO_END not in card
    assert "/secret" not in card
    unfilled = [line for line in card.splitlines() if "{{" in line or "None" in line]
    assert not unfilled


@pytest.mark.parametrize("layout", ["peft", "merged", "gguf"])
@pytest.mark.parametrize("evaluated", [True, False])
def test_the_card_of_a_model_that_learned_sets_warns_of_written_lists(tmp_path, layout, evaluated):
    run = trained_run(configure("tiny", **{"data.drug-order": "set"}), tmp_path / "run")
    if evaluated:
        settings = asdict(EvaluationConfig(method="score"))
        evaluation = {"checkpoint": "round-0001", "settings": settings}
        run.write_json("summary.json", {"metrics": {"fedrx": METRICS}, "evaluation": evaluation})
    base, checkpoint = resolve_backbone("tiny"), run.load_checkpoint()
    card = model_card(run, run.config(), base, checkpoint, layout=layout, hub_id="a/b")
    heading = "## Serve" if layout == "gguf" else "## Generate a list"
    warning = card.split(f"{heading}\n\n")[1].split("```")[0]
    assert NO_END in warning
    assert (OTHERWISE in warning) == evaluated
    assert "\n\n\n" not in card
    assert "`fedrx suggest` and `fedrx evaluate` with `evaluation.method = score`" in warning
    assert ("as a set, without an order (`data.drug-order = set`)" in card) == evaluated


SYSTEM = 'Say "drugs".\n```\nDrugs:\n```'
TEMPLATE = "{sex}, {age}:\n```\n{diagnoses}\n```"


def saved_backbone(folder):
    """The tiny backbone as a folder that transformers loads, as a user would have one."""
    spec = resolve_backbone("tiny")
    load_model(spec, device=torch.device("cpu"), dtype=torch.float32).save_pretrained(folder)
    load_tokenizer(spec).save_pretrained(folder)
    return folder


def our_answer(config, run):
    """The list that the run itself generates for the card's patient."""
    session = Worker().session(config)
    session.adapter.load(run.load_checkpoint().b)
    ids, _ = encode_prompt(EXAMPLE, session.tokenizer, text=config.text, max_length_tokens=2048)
    (made,) = generate(session, [ids], max_new_tokens=12, batch_size=1)
    return session.tokenizer.decode(list(made.tokens), skip_special_tokens=True)


@pytest.mark.parametrize("layout", ["peft", "merged"])
def test_the_cards_code_generates_the_runs_list(tmp_path, monkeypatch, capsys, layout):
    """From a local folder with a hub id, whose place in the code the folder takes here."""
    base = saved_backbone(tmp_path / "backbone")
    asked = {"text.system-prompt": SYSTEM, "text.template": TEMPLATE}
    config = configure(str(base), **{"evaluation.max-new-tokens": 12, **asked})
    run = trained_run(config, tmp_path / "run")
    folder = export_run(run, layout=layout, base_model="someone/some-llama")
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "base_model: someone/some-llama\n" in card.split("---")[1]
    (code,) = re.findall("```python\n(.*?)\n```\n", card, re.S)
    assert len([line for line in code.splitlines() if line.strip()]) <= 14
    expected = our_answer(config, run)
    monkeypatch.chdir(folder)
    exec(code.replace('"someone/some-llama"', repr(str(base))), {})
    assert capsys.readouterr().out.splitlines()[-len(expected.splitlines()) :] == (
        expected.splitlines()
    )
    assert expected
    system, user = messages(EXAMPLE, config.text)
    for shown in (SYSTEM, user["content"], TEMPLATE):
        assert f"\n````text\n{shown}\n````\n" in card
    assert system["content"] == SYSTEM


@pytest.mark.parametrize("more", [{}, {"adapter.targets": "q_proj,k_proj,v_proj,o_proj,down_proj"}])
def test_merged_weights_give_the_same_logits(tmp_path, more):
    config = configure("tiny", **more)
    run = trained_run(config, tmp_path / "run")
    folder = export_run(run, layout="merged")
    ids = torch.randint(5, 900, (1, 31), generator=torch.Generator().manual_seed(1))
    session = Worker().session(config)
    session.adapter.load(run.load_checkpoint().b)
    with torch.no_grad():
        ours = session.model(input_ids=ids).logits
        theirs = AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits
    assert float((ours - theirs).abs().max() / ours.abs().max()) < 1e-5
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == session.tokenizer.chat_template
    assert tokenizer("Aspirin 81 mg").input_ids == session.tokenizer("Aspirin 81 mg").input_ids
    assert export_run(run, layout="merged") == folder  # its own files may be replaced


def test_the_gguf_adapter_gives_the_same_logits(tmp_path):
    """Read by gguf, its rows put back by transformers' reader of gguf Llamas."""
    targets = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
    config = configure("tiny", **{"adapter.targets": targets})
    run = trained_run(config, tmp_path / "run")
    reader = gguf.GGUFReader(export_run(run, layout="gguf") / "adapter.gguf")
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.type"] == "adapter"
    assert fields["general.architecture"] == "llama"
    assert (fields["adapter.type"], fields["adapter.lora.alpha"]) == ("lora", 12.0)
    model = load_model(resolve_backbone("tiny"), device=torch.device("cpu"), dtype=torch.float32)
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    assert len(tensors) == 2 * 7 * 2
    turned = LlamaTensorProcessor(model.config.to_dict())
    names = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    for layer in range(2):
        for theirs, ours in names.items():
            a, b = (tensors[f"blk.{layer}.{theirs}.weight.lora_{one}"] for one in "ab")
            b = turned.process(b, f"blk.{layer}.{theirs}.weight").weights
            model.get_submodule(f"model.layers.{layer}.{ours}").weight.add_(12.0 / 8 * (b @ a))
    ids = torch.randint(5, 900, (1, 31), generator=torch.Generator().manual_seed(1))
    session = Worker().session(config)
    session.adapter.load(run.load_checkpoint().b)
    with torch.no_grad():
        ours = session.model(input_ids=ids).logits
        read = model(input_ids=ids).logits
    assert float((ours - read).abs().max() / ours.abs().max()) < 1e-5


def test_a_folders_name_is_never_a_hub_id(tmp_path):
    """AutoPeft says that it needs the backbone, and does not look for the folder on the hub."""
    base = saved_backbone(tmp_path / "my-llama")
    run = trained_run(configure(str(base)), tmp_path / "run")
    folder = export_run(run)
    content = json.loads((folder / "adapter_config.json").read_text())
    assert content["base_model_name_or_path"] is None
    assert "base_model:" not in (folder / "README.md").read_text(encoding="utf-8")
    content = json.loads(
        (export_run(run, base_model="someone/some-llama") / "adapter_config.json").read_text()
    )
    assert content["base_model_name_or_path"] == "someone/some-llama"
    for name in ("my-llama", "/data/my-llama", "a/b/c", "../x"):
        with pytest.raises(UserError, match="--base-model"):
            export_run(run, base_model=name)


# What vLLM's PEFTHelper wants, and refuses.
def test_the_config_is_one_that_vllm_takes(tmp_path):
    run = trained_run(configure("tiny"), tmp_path / "run")
    content = json.loads((export_run(run) / "adapter_config.json").read_text())
    assert {"r", "lora_alpha", "target_modules"} <= set(content)
    assert (type(content["r"]), type(content["lora_alpha"])) == (int, int)
    assert content["bias"] == "none"
    assert not {"modules_to_save", "use_dora", "use_rslora"} & set(content)
    known = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert set(content["target_modules"]) <= known
    assert "--max-lora-rank 8 " in (run.path / "adapter" / "README.md").read_text()


@pytest.mark.parametrize(
    ("rank", "phrase"),
    [(33, "--max-lora-rank 64 "), (513, "vLLM takes ranks up to 512: serve the merged weights")],
)
def test_the_card_names_a_rank_that_vllm_has(tmp_path, rank, phrase):
    run = trained_run(configure("tiny"), tmp_path / "run")
    config = run.config()
    config = replace(config, adapter=replace(config.adapter, rank=rank))
    base, checkpoint = resolve_backbone("tiny"), run.load_checkpoint()
    assert phrase in model_card(run, config, base, checkpoint, layout="peft", hub_id="a/b")


@pytest.mark.parametrize("weights", ["bf16", "fp8", "nf4"])
def test_the_card_tells_what_the_adapter_was_trained_on(tmp_path, weights):
    run = trained_run(configure("tiny"), tmp_path / "run")
    config = configure("tiny", **{"model.weights": weights})
    base, checkpoint = resolve_backbone("tiny"), run.load_checkpoint()
    card = model_card(run, config, base, checkpoint, layout="peft", hub_id="a/b")
    told = [line for line in card.splitlines() if line.startswith("| trained on |")]
    sentence = f"the backbone's projections in {weights}; the adapter is for the bf16 backbone"
    assert told == ([] if weights == "bf16" else [f"| trained on | {sentence} |"])


@pytest.mark.parametrize(
    ("privacy", "covered"),
    [
        ({"epsilon": 3.0, "delta": 1e-5, "unit": "patient"}, "tell of any one patient"),
        ({"epsilon": 3.0, "delta": 1e-5, "unit": "admission"}, "tell of any one admission"),
        ({"epsilon": 3.0, "delta": 1e-5, "unit": "hospital"}, "tell of any one hospital's data"),
        ({"epsilon": "infinity", "delta": 1e-5, "unit": "patient"}, None),
        (None, None),
    ],
)
def test_a_private_runs_card_says_what_is_covered(tmp_path, privacy, covered):
    run = trained_run(configure("tiny"), tmp_path / "run")
    run.write_json("summary.json", {"privacy": privacy} if privacy else {})
    card = (export_run(run) / "README.md").read_text(encoding="utf-8")
    assert ("What the guarantee covers" in card) == (covered is not None)
    assert covered is None or (covered in card and "Not covered: the figures below" in card)


@pytest.mark.parametrize(
    ("source", "hub_id", "licence"),
    [
        ("demo", "HuggingFaceTB/SmolLM2-135M-Instruct", "license: apache-2.0"),
        ("synthetic", "meta-llama/Llama-3.1-8B-Instruct", "license: llama3.1"),
        ("demo", "someone/llama", "license: other\nlicense_name: as-the-backbone"),
        (None, "meta-llama/Llama-3.1-8B", "license: other\nlicense_name: data-use-agreement"),
    ],
)
def test_the_licence_is_the_backbones_or_the_agreements(tmp_path, source, hub_id, licence):
    run = trained_run(configure("tiny"), tmp_path / "run")
    run.write_json("summary.json", {"source": source} if source else {})
    card = (export_run(run, base_model=hub_id) / "README.md").read_text(encoding="utf-8")
    assert f"{licence}\n" in card.split("---")[1]


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
    record = run.read_json("run.json")
    run.write_json("run.json", {**record, "inputs": {**record["inputs"], "a": "0" * 64}})
    with pytest.raises(UserError, match="A is not what the run was trained with"):
        export_run(run)
