"""``fedrx report --tripod-llm``: the reporting checklist, filled with what a run knows.

Items are numbered as in Gallifant et al., "The TRIPOD-LLM reporting guideline for studies using
large language models", Nature Medicine 31, 60-69 (2025), doi 10.1038/s41591-024-03425-5: 19 main
items on 49 numbered lines (its abstract counts 50 subitems; the items of its separate checklist for
abstracts, item 2, are not among them). The wording here is ours and short: authors read the
guideline. What only people know is left to the "author".
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from common.config import OWN_TEXT, Config
from common.data.handling import CREDENTIALED
from common.data.protocols import ADMISSION, ASKED, FIRST_24H, system_prompt
from common.files import write_text
from common.privacy.budget.receipts import INFINITY
from common.privacy.settings import is_private
from common.records.summary import Summary
from common.rundir import RunDirectory

FILE = "tripod-llm.md"
AUTHOR = "author"
ITEMS: Mapping[str, str] = {
    "1": "title: kind of study, task, population, outcome",
    "2": "abstract, by its own checklist",
    "3a": "clinical context and why a model, with what exists",
    "3b": "for whom and by whom it would be used",
    "4": "aims, and which stage: new model, fine-tuning, evaluation",
    "5a": "where training, tuning and evaluation data come from, and why these",
    "5b": "what the data hold, and how they are distributed",
    "5c": "oldest and newest text of training and evaluation",
    "5d": "preparation and checks of the data, the same everywhere or not",
    "5e": "missing values, imbalance, what was left out and why",
    "6a": "the model: name, version, end of training",
    "6b": "architecture, fine-tuning, alignment",
    "6c": "how text was generated: prompt and settings",
    "6d": "raw and processed output",
    "6e": "classification, probabilities, thresholds",
    "7a": "metrics of the outputs' quality against a standard",
    "7b": "what the metrics mean for the use, and their agreement with people",
    "7c": "the outcome and how predictions are computed",
    "7d": "assessors: qualification, instruction, agreement",
    "7e": "what the model was compared with",
    "8a": "annotation: guidelines with examples",
    "8b": "annotation: how many people, overlap, agreement",
    "8c": "annotation: who the annotators are",
    "9a": "prompts: how they were made and chosen",
    "9b": "prompts: data they were made with",
    "10": "preparation before summarising",
    "11": "instructions and data of instruction tuning",
    "12": "compute: machines, time, cost",
    "13": "ethics approval and consent",
    "14a": "funding",
    "14b": "conflicts of interest",
    "14c": "protocol",
    "14d": "registration",
    "14e": "availability of the data",
    "14f": "availability of the code",
    "15": "involvement of patients and the public",
    "16a": "flow of patients and texts through the study",
    "16b": "characteristics by source and split, sample sizes",
    "16c": "important variables, development against evaluation",
    "16d": "patients and outcomes in each analysis",
    "17": "results by the metrics named before",
    "18": "updating of the model and what it did",
    "19a": "interpretation, fairness included",
    "19b": "limitations and what they do to the results",
    "19c": "known difficulties of the data for this task",
    "19d": "intended use: input, user, oversight",
    "19e": "poor or missing input in use",
    "19f": "what users must do and know",
    "19g": "next steps",
}
"""Numbers and our own short wording."""


def write_checklist(run: RunDirectory, target: Path | None = None) -> Path:
    """Write the checklist as Markdown.

    Args:
        run: A run with figures.
        target: File to write, or a folder for it; default the run directory.

    Returns:
        The file.
    """
    named = (target or run.path).expanduser().absolute()
    file = named / FILE if named.is_dir() else named
    file.parent.mkdir(parents=True, exist_ok=True)
    known = answers(run.config(), run.summary())
    lines = [
        "# TRIPOD-LLM",
        "",
        "Filled from one run of FedRx; the numbers are the guideline's (Nature Medicine 31, 60-69,",
        f'2025), the wording is not. "{AUTHOR}": the run does not know it, the authors do.',
        "",
        "| item | about | answer |",
        "|---|---|---|",
        *(
            f"| {number} | {about} | {known.get(number, AUTHOR)} |"
            for number, about in ITEMS.items()
        ),
        "",
    ]
    write_text(file, "\n".join(lines))
    return file


def answers(config: Config, summary: Summary) -> dict[str, str]:
    """Return what a run knows, by item; nothing that it does not."""
    adapter, train, data = config.adapter, config.train, config.data
    source = summary.source or CREDENTIALED
    hospitals = len(summary.hospitals)
    sizes = [one for one in summary.hospitals if one.patients is not None]
    known = {
        "4": "fine-tuning of a frozen model by low-rank adapters, and its evaluation",
        "5a": f"{source} data through `data.path`; training, validation and held-out patients of "
        f"each hospital, split by patient (data.split-seed {data.split_seed})",
        "5d": f"names of drugs compared at level {data.normalisation}; rows left out are counted "
        "by reason in data.json",
        "5e": f"missing height {data.missing_height}, weight {data.missing_weight}, BMI "
        f"{data.missing_bmi}; diagnoses beyond train.max-length {train.max_length} left out of "
        "prompts",
        "6b": f"{adapter.mode}, rank {adapter.rank}, alpha {adapter.alpha:g} on "
        f"{adapter.targets}; {train.optimizer}, learning rate {train.learning_rate:g}; "
        f"{_trained_by(config, hospitals)}; no alignment; {_privacy(config, summary)}",
        "7a": "precision, recall, Jaccard and F1 of drug sets per admission, share of answers in "
        "the format; intervals by bootstrap over patients",
        "7c": f"{_outcome(data.protocol)}; predictions as in 6c, metrics as in 7a",
        "9b": "none",
        "14f": "FedRx, Apache-2.0; source digest in environment.json",
        "19b": "what was ordered is learnt, right or wrong: the task does not advise"
        if data.protocol == FIRST_24H
        else "diagnoses are coded at discharge: the task reconstructs a list, it does not advise",
        "19d": "research only, not for clinical use",
    }
    if config.text == OWN_TEXT:  # of prompts of their own, the authors know
        known["9a"] = "one fixed prompt, not tuned"
    if summary.backbone:
        known["6a"] = (
            f"{_cell(Path(summary.backbone.name).name)}, sha256 "
            f"{summary.backbone.fingerprint[:12]}; B sha256 {summary.b_sha256[:12]}"
        )
    if summary.seconds and summary.device:
        known["12"] = (
            f"{summary.seconds:.0f} s on {summary.device}, peak memory "
            f"{summary.peak_rss_bytes / 2**30:.2f} GiB, {summary.workers or 1} worker(s)"
        )
    if sizes:
        known["16d"] = (
            f"{hospitals} hospital(s), {sum(one.patients or 0 for one in sizes)} patients, "
            f"{sum(one.samples or 0 for one in sizes)} admissions"
        )
    known |= _lists(config, summary)
    known |= _results(summary)
    return known


def _outcome(protocol: str) -> str:
    if protocol == ADMISSION:
        return "the drugs ordered during the whole stay"
    return f"{ASKED[protocol]} (data.protocol {protocol})"


def _lists(config: Config, summary: Summary) -> dict[str, str]:
    """How the lists behind the figures came about: the evaluation's settings before the run's."""
    settings = {
        **asdict(config.evaluation),
        **(summary.evaluation.settings if summary.evaluation else {}),
    }
    user = f'template "{config.text.template}"' if config.text.template else "FedRx's own template"
    protocol = config.data.protocol
    shown = "diagnoses" if protocol == ADMISSION else f"what data.protocol={protocol} shows"
    prompt = _cell(
        f'system message "{system_prompt(config.text, protocol)}", patient and {shown} as user '
        f"message ({user})"
    )
    if settings["method"] == "score":
        counted = settings.get("frequencies", False)
        cut = "at the training lists' mean length" if counted else "at a threshold"
        fitted = (
            "recalibration (Platt, with training frequencies)"
            if counted
            else ("threshold and recalibration (Platt)")
        )
        return {
            "6c": f"{prompt}; no text is generated: every drug of the formulary gets the "
            "probability that the model says it first (method score)",
            "6d": f"a ranking of the formulary's drugs, cut {cut} into a list",
            "6e": f"{fitted} from each hospital's validation patients; in summary.json",
        }
    return {
        "6c": f"{prompt}; no sampling, at most {settings['max_new_tokens']} tokens, method "
        f"{settings['method']}, decoding {settings['decoding']}",
        "6d": "text, one drug a line, read strictly into a list; an answer out of the format is "
        "none",
    }


def _results(summary: Summary) -> dict[str, str]:
    """What evaluation, judge and reviewers gave."""
    known = {}
    figures = {name: one.f1 for name, one in summary.metrics.items() if one.f1 is not None}
    if "fedrx" in figures:
        known["17"] = (
            f"F1 {figures['fedrx']:.3f} on {summary.metrics['fedrx'].samples} held-out admissions; "
            "all figures and intervals in summary.json"
        )
    others = [f"{name} (F1 {f1:.3f})" for name, f1 in figures.items() if name != "fedrx"]
    if others:
        known["7e"] = "; ".join(others)
    if summary.review:
        people, alpha = len(summary.review.reviewers), summary.review.agreement.alpha_drugs
        known["8b"] = (
            f"{people} reviewer(s) of {summary.review.cases} cases, Krippendorff's alpha "
            f"{'undefined' if alpha is None else f'{alpha:.3f}'} over drugs"
        )
        known["8a"] = "keep, remove or unsure for each drug; 1 to 5 for each list; blinded"
    if summary.judge:
        known["7b"] = f"LLM judge {_cell(summary.judge.model)}: appropriateness in summary.json"
        agreement = summary.review.judge if summary.review else None
        if agreement and agreement.agree is not None:
            share = f"{agreement.agree:.0%} of {agreement.drugs} drugs"
            known["7b"] += f"; agrees with the reviewers on {share}"
    return known


def _trained_by(config: Config, hospitals: int) -> str:
    if config.federation.hospitals == 1 or hospitals <= 1:
        return f"one node, seed {config.train.seed}"
    return (
        f"{hospitals} hospitals, {config.federation.rounds} rounds of "
        f"{config.federation.local_steps} steps, {config.federation.strategy}, seed "
        f"{config.train.seed}"
    )


def _privacy(config: Config, summary: Summary) -> str:
    if not is_private(config) or not summary.privacy:
        return "no differential privacy"
    privacy = summary.privacy
    if privacy.epsilon == INFINITY:
        return "noise without a guarantee"
    return (
        f"differential privacy: epsilon {privacy.epsilon:.3f}, delta {privacy.delta:g} per "
        f"{privacy.unit}"
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
