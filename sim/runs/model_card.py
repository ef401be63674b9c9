"""The model card of an exported adapter: what it is, what it may be used for, how it is used."""

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
from common.records.run import Settings
from common.records.summary import Summary
from common.rundir import Checkpoint, RunDirectory
from common.template import OWN_TEMPLATE
from common.text.prompts import messages, render_answer
from sim.pages.fill import fill
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
_DECIDING = {"method", "decoding", "formulary", "frequencies"}
"""What the card tells of an evaluation; settings that an earlier FedRx wrote may lack some."""
_ORDERS = {
    "first-start": "in the order in which the drugs were first started",
    "name": "in the order of the alphabet",
    "shuffled": "in a new random order in every pass",
    "set": "as a set, without an order",
}
"""How a list is learned, by ``data.drug-order``."""


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
    summary, protocol = run.summary(), config.data.protocol
    source = summary.source or CREDENTIALED
    moment = checkpoint.facts.model_dump(include={"round", "step"}, exclude_unset=True)
    handling = handling_of(source)
    licences = (one for start, one in _LICENCES.items() if hub_id.lower().startswith(start))
    system, user = (one["content"] for one in messages(EXAMPLES[protocol], config.text))
    evaluated = summary.evaluation.checkpoint if summary.evaluation else ""
    answered = not personal and checkpoint.name == evaluated
    metrics = summary.metrics if answered else {}
    way = summary.evaluation.settings if summary.evaluation and metrics else {}
    way = way if way.keys() >= _DECIDING else {}
    return fill(
        "card.md.jinja",
        config=config,
        summary=summary,
        backbone=backbone,
        layout=layout,
        hub_id=hub_id,
        backbone_name=markdown_text(hub_id or Path(backbone.name).name),
        personal=markdown_text(personal),
        title=CARD_TITLE,
        notice=NOTICE,
        source=source,
        handling=handling,
        licence=next(licences, None) if handling.is_open else None,
        own_task=protocol == ADMISSION,
        asked=ASKED[protocol],
        targets=adapter_spec(config.adapter).targets,
        checkpoint=checkpoint.name,
        moment=", ".join(f"{unit} {at}" for unit, at in moment.items()) or "the only one",
        guarantee="none, see below" if personal else _privacy_line(summary),
        columns=[name for _, name in COLUMNS],
        rows=[
            [
                markdown_text(model_name(model, summary)),
                *(number(getattr(values, key)) for key, _ in COLUMNS),
            ]
            for model, values in metrics.items()
        ],
        how_listed=_how_listed(way),
        order=_ORDERS[config.data.drug_order],
        written_otherwise=bool(way) and (way["method"], way["decoding"]) != ("generate", "greedy"),
        prompt_date=f"{PROMPT_DATE:%d %b %Y}",
        system=system,
        user=user,
        prompt=config.text.template or OWN_TEMPLATE,
        example=render_answer(["Furosemide", "Lisinopril"]),
        vllm_rank=next((rank for rank in VLLM_RANKS if rank >= config.adapter.rank), None),
        largest_rank=VLLM_RANKS[-1],
    )


def _how_listed(way: Settings) -> str:
    """Say how an evaluation's lists came about; nothing where its settings are not known."""
    if not way:
        return ""
    names = (
        "a given list of drugs (`evaluation.formulary`)"
        if way["formulary"]
        else "the hospital's own formulary (what its training patients were ordered)"
    )
    if way["method"] == "score":
        cut = (
            "how often the hospital's training patients were ordered a drug counted beside the "
            "score, by a weight chosen on its validation patients, and every list was as long as "
            "those of its training patients on average"
            if way["frequencies"]
            else "the ranking was cut at a threshold chosen on the hospital's validation patients"
        )
        return (
            f"The model did not write its lists in this table: each name of {names} was scored, "
            f"and {cut} (`evaluation.method = score`, `evaluation.frequencies = "
            f"{str(way['frequencies']).lower()}`)."
        )
    held = {
        "greedy": "freely, the likeliest token at a time",
        "grammar": "held to the answer's format",
        "formulary": f"held to the names of {names}, each once",
    }[str(way["decoding"])]
    return (
        f"The model wrote its lists in this table {held} (`evaluation.method = generate`, "
        f"`evaluation.decoding = {way['decoding']}`)."
    )


def _privacy_line(summary: Summary) -> str:
    privacy = summary.privacy
    if not privacy:
        return "trained without differential privacy"
    if not privacy.guarantees:
        return "no guarantee (epsilon is infinite)"
    return f"epsilon {privacy.epsilon:.3f}, delta {privacy.delta:g}, per {privacy.unit}"
