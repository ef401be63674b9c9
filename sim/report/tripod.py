"""``fedrx report --tripod-llm``: the reporting checklist, filled with what a run knows.

Items are numbered as in Gallifant et al., "The TRIPOD-LLM reporting guideline for studies using
large language models", Nature Medicine 31, 60-69 (2025), doi 10.1038/s41591-024-03425-5: 19 main
items on 49 numbered lines (its abstract counts 50 subitems; the items of its separate checklist for
abstracts, item 2, are not among them). The wording is ours and short: authors read the guideline.
What only people know is left to the "author". All of it stands in ``pages/tripod-llm.md.jinja``.
"""

from dataclasses import asdict
from pathlib import Path

from common.config import OWN_TEXT, Config
from common.data.handling import CREDENTIALED
from common.data.protocols import ASKED, system_prompt
from common.files import write_text
from common.privacy.settings import is_private
from common.records.summary import Summary
from common.rundir import RunDirectory
from sim.pages.fill import fill

FILE = "tripod-llm.md"


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
    write_text(file, checklist(run.config(), run.summary()))
    return file


def checklist(config: Config, summary: Summary) -> str:
    """Return the checklist with what a run knows, and nothing that it does not."""
    protocol = config.data.protocol
    evaluated = summary.evaluation.settings if summary.evaluation else {}
    return fill(
        "tripod-llm.md.jinja",
        config=config,
        summary=summary,
        source=summary.source or CREDENTIALED,
        # The evaluation's settings before the run's: the lists behind the figures are its.
        lists={**asdict(config.evaluation), **evaluated},
        backbone=Path(summary.backbone.name).name if summary.backbone else "",
        private=is_private(config),
        asked=ASKED[protocol],
        system=system_prompt(config.text, protocol),
        # Of prompts of their own, the authors know.
        own_text=config.text == OWN_TEXT,
    )
