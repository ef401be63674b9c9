"""What a source's tag allows: what may leave the machine, and what stands on every artefact."""

from collections.abc import Iterable
from dataclasses import dataclass

SYNTHETIC, DEMO, CREDENTIALED = "synthetic", "demo", "credentialed"


@dataclass(frozen=True, kw_only=True)
class Handling:
    """The rules of one tag."""

    is_open: bool
    """Rows may leave the machine: to a judge elsewhere, into a report, into a traceback."""
    report: str
    """What a run's report says of its figures."""
    card: str
    """What the model card of an exported adapter says."""


HANDLING: dict[str, Handling] = {
    SYNTHETIC: Handling(
        is_open=True,
        report="Synthetic data: these figures prove that the system works, nothing about care.",
        card="It was trained on synthetic data and knows nothing about care.",
    ),
    DEMO: Handling(
        is_open=True,
        report="MIMIC-IV demo (100 patients, open): figures prove correctness, not quality.",
        card="It was trained on the MIMIC-IV Clinical Database Demo (100 patients, Open Database "
        "License): it proves that the training works, not that its answers are good.",
    ),
    CREDENTIALED: Handling(
        is_open=False,
        report="Credentialed data: this report shows aggregates only. Handle it as agreed.",
        card="It was trained on credentialed data. Weights can reveal what they were trained on: "
        "do not share or publish them beyond what your data use agreement allows.",
    ),
}
"""By tag, the freest first."""


def handling_of(tag: object) -> Handling:
    """Return the rules of a tag; an unknown one counts as credentialed.

    >>> handling_of("demo").is_open, handling_of("somebody's").is_open, handling_of(None).is_open
    (True, False, False)
    """
    return HANDLING[_known(tag)]


def strictest(tags: Iterable[object]) -> str:
    """Return the tag whose rules hold for data of all of them; of none, and in doubt, credentialed.

    >>> strictest(["synthetic", "demo"]), strictest(["demo", "?"]), strictest([])
    ('demo', 'credentialed', 'credentialed')
    """
    order = list(HANDLING)
    return max(map(_known, tags), key=order.index, default=CREDENTIALED)


def _known(tag: object) -> str:
    return tag if isinstance(tag, str) and tag in HANDLING else CREDENTIALED
