"""``fedrx export``: a run's adapter as PEFT loads it, A and B, with a model card."""

import shutil
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from common.config import Config
from common.data.handling import handling_of
from common.errors import UserError
from common.files import write_bytes, write_json, write_text
from common.model.adapter.falora import Adapter
from common.model.adapter.layout import adapter_spec, meta_adapter
from common.model.backbone.load import BackboneSpec
from common.records import Summary
from common.rundir import Checkpoint, RunDirectory
from common.tensor_files import Tensors
from common.training.resident_session import backbone_spec
from sim.report.html import markdown_text
from sim.report.run_report import COLUMNS, NOTICE, model_name

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
CARD_FILE = "README.md"
CARD_TITLE = "# FedRx adapter: drug lists from diagnoses"
FOLDER = "adapter"


def export_run(
    run: RunDirectory, target: Path | None = None, *, checkpoint: str | None = None
) -> Path:
    """Write a run's adapter in PEFT's layout, with a model card. No weights are loaded.

    Args:
        run: Any run directory with a checkpoint.
        target: Folder to write; default ``adapter`` in the run directory. An earlier export
            there is replaced.
        checkpoint: Name of a checkpoint; default the last.

    Returns:
        The folder: adapter_config.json, adapter_model.safetensors (fp32), README.md.

    Raises:
        UserError: If there is no checkpoint, the target holds other files, or the backbone or A
            are not those of the run.
    """
    config, loaded = run.config(), run.load_checkpoint(checkpoint)
    folder = (target or run.path / FOLDER).expanduser().absolute()
    if not _replaceable(folder):
        raise UserError(
            f"{folder} holds something else",
            allowed="a new or empty folder, or an earlier export",
            fix="name another folder",
        )
    backbone = backbone_spec(config.model.backbone)
    adapter = meta_adapter(backbone, adapter_spec(config.adapter))
    begun = run.inputs()
    for what, now, before in (
        ("the backbone", backbone.fingerprint, begun.backbone),
        ("A", adapter.a_fingerprint, begun.a),
    ):
        if before not in ("", now):
            raise UserError(
                f"{what} is not what the run was trained with",
                fix="restore what model.backbone named, and this version's adapter.seed",
            )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        written = Path(scratch) / folder.name
        written.mkdir()
        write_json(written / CONFIG_FILE, peft_config(config, backbone))
        write_bytes(written / WEIGHTS_FILE, save(peft_tensors(adapter, loaded.b)))
        write_text(written / CARD_FILE, model_card(run, config, backbone, loaded))
        shutil.rmtree(folder, ignore_errors=True)
        written.rename(folder)
    return folder


def _replaceable(folder: Path) -> bool:
    """Tell whether a folder is new, empty, or what an earlier export has written, and no more."""
    if not folder.exists():
        return True
    names = {path.name for path in folder.iterdir()}
    card = folder / CARD_FILE
    ours = card.is_file() and CARD_TITLE in card.read_text(encoding="utf-8", errors="replace")
    return not names or (ours and names <= {CONFIG_FILE, WEIGHTS_FILE, CARD_FILE})


def peft_config(config: Config, backbone: BackboneSpec) -> dict[str, object]:
    """Return adapter_config.json as PEFT's LoraConfig reads it."""
    adapter = config.adapter
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": public_name(backbone),
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "target_modules": list(adapter_spec(adapter).targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }


def peft_tensors(adapter: Adapter, b: Tensors) -> Tensors:
    """Name A and B as PEFT does.

    Args:
        adapter: Gives A, as drawn from its seed.
        b: Trained matrices by wire key; in mode ``lora`` A is among them.
    """
    everything = {**({} if adapter.spec.mode == "lora" else adapter.a_state()), **b}
    return {
        f"base_model.model.{key}.weight": np.asarray(value, dtype=np.float32, order="C")
        for key, value in everything.items()
    }


def public_name(backbone: BackboneSpec) -> str:
    """Return the hub id, or what of a local name may leave the machine: no parent folder.

    >>> from common.model.backbone.load import resolve_backbone
    >>> public_name(resolve_backbone("tiny"))
    'tiny'
    """
    return backbone.hub_id or Path(backbone.name).name


def source_of_weights(backbone: BackboneSpec) -> str:
    """Return what the model card's code loads: the hub id, or a place to fill in."""
    return backbone.hub_id or f"the folder of {public_name(backbone)}"


def model_card(
    run: RunDirectory, config: Config, backbone: BackboneSpec, checkpoint: Checkpoint
) -> str:
    """Return the README of the exported adapter: what it is, what it may be used for, figures."""
    summary = run.summary()
    source = summary.source or "credentialed"
    adapter, train = config.adapter, config.train
    hospitals = len(summary.hospitals) or config.federation.hospitals
    where = checkpoint.facts
    counts = [f"{name} {where[name]}" for name in ("round", "step") if name in where]
    moment = ", ".join(counts) or "the only one"
    lines = [
        "---",
        *([f"base_model: {backbone.hub_id}"] if backbone.hub_id else []),
        "library_name: peft",
        "tags: [lora, federated-learning, research-only]",
        "---",
        "",
        CARD_TITLE,
        "",
        f"**{NOTICE}** {handling_of(source).card}",
        "",
        (
            "Given a patient's physical data and the diagnoses of one hospital stay, the model "
            "lists the drugs that were ordered. Diagnoses are coded at discharge and the list is "
            "the whole stay's orders: this reconstructs, it does not advise."
        ),
        "",
        "| | |",
        "|---|---|",
        f"| backbone | {markdown_text(public_name(backbone))} |",
        f"| backbone sha256 | `{backbone.fingerprint}` |",
        (
            f"| adapter | {adapter.mode}, rank {adapter.rank}, alpha {adapter.alpha:g}, "
            f"on {', '.join(adapter_spec(adapter).targets)} |"
        ),
        (
            f"| training | {hospitals} hospital(s), {train.optimizer}, learning rate "
            f"{train.learning_rate:g}; checkpoint {checkpoint.name} ({moment}) |"
        ),
        *_weights_lines(config),
        f"| data | {source} |",
        f"| privacy | {_privacy_line(summary)} |",
        "",
    ]
    if checkpoint.name == (summary.evaluation or {}).get("checkpoint"):
        lines += _metrics_lines(summary)
    lines += [
        "## Use",
        "",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f'backbone = AutoModelForCausalLM.from_pretrained("{source_of_weights(backbone)}")',
        'model = PeftModel.from_pretrained(backbone, "this folder")',
        "```",
        "",
    ]
    return "\n".join(lines)


def _weights_lines(config: Config) -> list[str]:
    """Say in which format the backbone was, where it was not the one that the adapter is for."""
    if config.model.weights != "fp8":
        return []
    return ["| trained on | the backbone's projections in fp8; the adapter is for bf16 weights |"]


def _privacy_line(summary: Summary) -> str:
    privacy = summary.privacy
    if not privacy:
        return "trained without differential privacy"
    epsilon = privacy["epsilon"]
    if epsilon is None:
        return "no guarantee (epsilon is infinite)"
    return f"epsilon {epsilon:.3f}, delta {privacy['delta']:g}, per {privacy['unit']}"


def _metrics_lines(summary: Summary) -> list[str]:
    told = summary.as_json()
    metrics = told["metrics"]
    first = next(iter(metrics.values()))
    rows = [
        f"| {markdown_text(model_name(model, told))} | "
        + " | ".join("–" if values[key] is None else f"{values[key]:.3f}" for key, _ in COLUMNS)
        + " |"
        for model, values in metrics.items()
    ]
    return [
        f"## {first['samples']} held-out admissions of {first['patients']} patients",
        "",
        "| | " + " | ".join(name for _, name in COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
        *rows,
        "",
        (
            f"Sets of drugs at the {first['level']} level, macro means; an unparseable answer "
            "counts 0."
        ),
        "",
    ]
