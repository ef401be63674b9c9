"""The model card of an exported adapter: what it is, what it may be used for, how it is used."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Final, Literal

from common.config import Config
from common.data.handling import CREDENTIALED, handling_of
from common.data.protocols import ADMISSION, ASKED, FIRST_24H, FLAGGED, VISITS
from common.data.samples import Admission, Visit
from common.model.adapter.layout import adapter_spec
from common.model.backbone import embedded
from common.model.backbone.load import BackboneSpec
from common.provenance import PROMPT_DATE
from common.records import Summary
from common.rundir import Checkpoint, RunDirectory
from common.template import OWN_TEMPLATE
from common.text.prompts import messages, render_answer
from sim.report.html import markdown_text
from sim.report.words import COLUMNS, NOTICE, model_name, number

Format = Literal["peft", "merged", "gguf"]
CARD_TITLE: Final = "# FedRx adapter: drug lists from diagnoses"
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's ``--max-lora-rank`` may be."""
EXAMPLE = Admission(
    patient=0,
    admission=0,
    sex="F",
    age=71,
    height_cm=165.0,
    weight_kg=80.0,
    bmi=29.4,
    diagnoses=("Heart failure, unspecified", "Essential (primary) hypertension"),
)
"""An invented patient."""
_EARLIER = Visit(
    diagnoses=("Essential (primary) hypertension",),
    diagnosis_codes=("10:I10",),
    procedures=("Central venous catheter placement with guidance",),
    drugs=("Lisinopril",),
)
EXAMPLES = {
    ADMISSION: EXAMPLE,
    VISITS: replace(EXAMPLE, protocol=VISITS, earlier=(_EARLIER,)),
    FIRST_24H: replace(
        EXAMPLE,
        protocol=FIRST_24H,
        diagnoses=(),
        earlier=(replace(_EARLIER, procedures=(), drugs=()),),
        admission_type="URGENT",
        services=("MED",),
        labs=(f"Potassium: 3.1 mEq/L{FLAGGED}",),
        ordered=("Heparin",),
    ),
}
"""The same, as each protocol shows it."""
_LICENCES = {
    embedded.HUB_ID.lower(): "apache-2.0",
    "meta-llama/llama-3.1": "llama3.1",
    "meta-llama/meta-llama-3.1": "llama3.1",
}
"""By the beginning of the backbone's hub id."""


def model_card(
    run: RunDirectory,
    config: Config,
    backbone: BackboneSpec,
    checkpoint: Checkpoint,
    *,
    layout: Format,
    hub_id: str,
    personal: str = "",
) -> str:
    """Return the README of an export.

    Args:
        run: The run.
        config: Its configuration.
        backbone: What the adapter is for.
        checkpoint: Whose B it is.
        layout: Of the weights beside the card.
        hub_id: The backbone's; empty when it has none.
        personal: Hospital whose own B is in the weights; empty: the common B alone.
    """
    summary = run.summary()
    source = summary.source or CREDENTIALED
    adapter, train = config.adapter, config.train
    hospitals = len(summary.hospitals) or config.federation.hospitals
    where = checkpoint.facts
    counts = [f"{name} {where[name]}" for name in ("round", "step") if name in where]
    moment = ", ".join(counts) or "the only one"
    backbone_name = hub_id or Path(backbone.name).name
    lines = [
        "---",
        *_front(source, layout=layout, hub_id=hub_id),
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
            if config.data.protocol == ADMISSION
            else f"Task (data.protocol {config.data.protocol}): {ASKED[config.data.protocol]}. "
            "It reproduces what was ordered, it does not advise."
        ),
        "",
        "| | |",
        "|---|---|",
        f"| backbone | {markdown_text(backbone_name)} |",
        f"| backbone sha256 | `{backbone.fingerprint}` |",
        "| tokenizer | the backbone's own, with its chat template |",
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
        f"| privacy | {_privacy_line(summary) if not personal else 'none, see below'} |",
        "",
        *(_personal_lines(personal) if personal else _coverage_lines(summary)),
    ]
    if not personal and checkpoint.name == (summary.evaluation or {}).get("checkpoint"):
        lines += _metrics_lines(summary)
    lines += [
        *_format_lines(config),
        *_use_lines(layout, config, hub_id=hub_id, length=config.evaluation.max_new_tokens),
        *_serve_lines(layout, rank=adapter.rank, hub_id=hub_id),
    ]
    return "\n".join(lines)


def _front(source: str, *, layout: Format, hub_id: str) -> list[str]:
    """Return what the hub reads: base model, licence, library."""
    of_backbone = next(
        (one for start, one in _LICENCES.items() if hub_id.lower().startswith(start)), None
    )
    if not handling_of(source).is_open:
        licence = ["license: other", "license_name: data-use-agreement"]
    elif of_backbone:
        licence = [f"license: {of_backbone}"]
    else:
        licence = ["license: other", "license_name: as-the-backbone"]
    libraries = {"peft": "peft", "merged": "transformers", "gguf": "llama.cpp"}
    relation = {"peft": "adapter", "merged": "finetune", "gguf": "adapter"}
    return [
        *([f"base_model: {hub_id}", f"base_model_relation: {relation[layout]}"] if hub_id else []),
        *licence,
        f"library_name: {libraries[layout]}",
        "pipeline_tag: text-generation",
        "tags: [lora, federated-learning, research-only]",
    ]


def _weights_lines(config: Config) -> list[str]:
    """Say in which format the backbone was, where it was not the one that the adapter is for."""
    weights = config.model.weights
    if weights == "bf16":
        return []
    found = f"the backbone's projections in {weights}; the adapter is for the bf16 backbone"
    return [f"| trained on | {found} |"]


def _privacy_line(summary: Summary) -> str:
    privacy = summary.privacy
    if not privacy:
        return "trained without differential privacy"
    epsilon = privacy["epsilon"]
    if epsilon is None:
        return "no guarantee (epsilon is infinite)"
    return f"epsilon {epsilon:.3f}, delta {privacy['delta']:g}, per {privacy['unit']}"


def _personal_lines(hospital: str) -> list[str]:
    return [
        "## A personal adapter",
        "",
        (
            f"The weights are the common B plus one that {markdown_text(hospital)} trained for "
            "itself, without noise: no epsilon covers them. They can tell of its patients, and are "
            "for that hospital alone."
        ),
        "",
    ]


def _coverage_lines(summary: Summary) -> list[str]:
    """Say what the guarantee of a private run is about, and what it is not."""
    privacy = summary.privacy
    if not privacy or privacy["epsilon"] is None:
        return []
    unit = "any one patient" if privacy["unit"] == "patient" else "any one hospital's data"
    return [
        "## What the guarantee covers",
        "",
        (
            f"Covered: what the weights here tell of {unit} in the training splits, of all rounds "
            "together. A is drawn from a public seed and tells nothing."
        ),
        "",
        (
            "Not covered: the figures below (held-out patients, no noise), answers and reviews in "
            "the run directory, other runs on the same patients, which add up, and everything else "
            "that a hospital shows."
        ),
        "",
    ]


def _metrics_lines(summary: Summary) -> list[str]:
    metrics = summary.metrics
    first = next(iter(metrics.values()))
    rows = [
        f"| {markdown_text(model_name(model, summary))} | "
        + " | ".join(number(getattr(values, key)) for key, _ in COLUMNS)
        + " |"
        for model, values in metrics.items()
    ]
    return [
        f"## {first.samples} held-out admissions of {first.patients} patients",
        "",
        "| | " + " | ".join(name for _, name in COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
        *rows,
        "",
        (f"Sets of drugs at the {first.level} level, macro means; an unparseable answer counts 0."),
        "",
    ]


def _format_lines(config: Config) -> list[str]:
    """Show the prompt and the answer's format with an invented patient."""
    text, protocol = config.text, config.data.protocol
    system, user = messages(EXAMPLES[protocol], text)
    template = ["Its template:", "", *_text(text.template or OWN_TEMPLATE)]
    return [
        "## Prompt and answer",
        "",
        (
            "A chat of two messages, put through the tokenizer's template (one that prints the day "
            f"was given {PROMPT_DATE:%d %b %Y}). System:"
        ),
        "",
        *_text(system["content"]),
        'User; what is not known is "unknown", ages above 89 are "> 89":',
        "",
        *_text(user["content"]),
        *(template if protocol == ADMISSION else ()),
        "Answer, one drug a line, ended by the end token:",
        "",
        *_text(render_answer(["Furosemide", "Lisinopril"])),
    ]


def _text(content: str) -> list[str]:
    """Fence a text, with more backticks than any of its own."""
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", content)), 0)
    return [f"{fence}text", content.strip(), fence, ""]


def _use_lines(layout: Format, config: Config, *, hub_id: str, length: int) -> list[str]:
    """Return code that generates a list; llama.cpp's stands among the commands to serve."""
    if layout == "gguf":
        return []
    system, user = messages(EXAMPLES[config.data.protocol], config.text)
    base = hub_id or "FOLDER OF THE BACKBONE"
    model = "AutoModelForCausalLM.from_pretrained(BASE)"
    return [
        "## Generate a list",
        "",
        "```python",
        *(["from peft import PeftModel"] if layout == "peft" else []),
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"BASE = {json.dumps(base if layout == 'peft' else '.')}",
        "tokenizer = AutoTokenizer.from_pretrained(BASE)",
        f"model = PeftModel.from_pretrained({model}, '.')"
        if layout == "peft"
        else f"model = {model}",
        f"system = {json.dumps(system['content'])}",
        f"user = {json.dumps(user['content'])}",
        'chat = [{"role": "system", "content": system}, {"role": "user", "content": user}]',
        'made = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}',
        "tokens = tokenizer.apply_chat_template(chat, **made)",
        f"answer = model.generate(**tokens, max_new_tokens={length}, do_sample=False)",
        "length = tokens['input_ids'].shape[1]",
        "print(tokenizer.decode(answer[0, length:], skip_special_tokens=True))",
        "```",
        "",
    ]


def _serve_lines(layout: Format, *, rank: int, hub_id: str) -> list[str]:
    """Return how the weights are served, and an adapter merged first."""
    if layout == "merged":
        return _block("## Serve", "vllm serve .")
    if layout == "gguf":
        return _block("## Serve", "llama-server -m BACKBONE.gguf --lora adapter.gguf")
    served = next((limit for limit in VLLM_RANKS if limit >= rank), None)
    serve = f"vllm serve {hub_id or 'FOLDER'} --enable-lora --max-lora-rank {served} "
    return [
        *(
            _block("## Serve", f"{serve}--lora-modules fedrx=.")
            if served
            else [f"vLLM takes ranks up to {VLLM_RANKS[-1]}: serve the merged weights.", ""]
        ),
        *_block(
            "Merged into the backbone, for transformers and `vllm serve`; for llama.cpp:",
            "fedrx export RUN --format merged",
            "fedrx export RUN --format gguf",
        ),
    ]


def _block(heading: str, *commands: str) -> list[str]:
    return [heading, "", "```", *commands, "```", ""]
