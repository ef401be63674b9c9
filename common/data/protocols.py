"""What is asked of a sample, and what may be known of it: the rules of ``data.protocol``.

``admission`` reconstructs a whole stay's list from its discharge diagnoses. ``visits`` is the task
of the literature on drug recommendation (GAMENet, Shang et al., AAAI 2019; SafeDrug, Yang et al.,
IJCAI 2021; MoleRec, Yang et al., WWW 2023): patients with two visits or more, each visit's list
from its own diagnoses and procedures and from the earlier visits; the first visit is a sample
without earlier ones, as in SafeDrug. ``first-24h`` stands at the bedside: what was
known 24 hours after admission, and what was ordered later and not before.
"""

from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Final

from common.config import OWN_TEXT, Config, DataConfig, TextConfig
from common.data.names import normalise_string
from common.errors import UserError

if TYPE_CHECKING:
    from common.data.samples import Admission

ADMISSION: Final = "admission"
VISITS: Final = "visits"
FIRST_24H: Final = "first-24h"
PROTOCOLS: Final = (ADMISSION, VISITS, FIRST_24H)
KNOWN_FOR = timedelta(hours=24)
"""What happens before this much of a stay has passed is known under ``first-24h``."""
FEWEST_VISITS = 2
"""Samples of a patient that ``visits`` asks for."""
MOST_LABS = 24
"""Laboratory results of a sample under ``first-24h``."""
FLAGGED = ", abnormal"
"""End of a result that the laboratory flagged."""
_VISITS_SHARE = 1 / 6
_LATER_PROMPT = (
    "List the drugs that will be ordered after the first 24 hours of this hospital stay and were "
    "not ordered before, one a line."
)
ASKED = {
    ADMISSION: "the drugs of a stay from its discharge diagnoses",
    VISITS: "the drugs of a stay of patients with two visits or more, from its discharge "
    "diagnoses, its procedures and the earlier visits",
    FIRST_24H: "the drugs ordered after the first 24 hours of a stay and not before, from what "
    "is known then",
}
"""What each protocol asks for, in words."""


def split_shares(data: DataConfig) -> tuple[float, float]:
    """Return the shares of patients to validate and to test.

    The literature's split, 2/3, 1/6 and 1/6 by patient, is a part of ``visits``.

    >>> split_shares(DataConfig())
    (0.1, 0.2)
    >>> split_shares(DataConfig(protocol="visits")) == (1 / 6, 1 / 6)
    True

    Raises:
        UserError: If other shares are set for ``visits``.
    """
    shares = (data.validation_fraction, data.test_fraction)
    if data.protocol != VISITS:
        return shares
    usual = DataConfig()
    fixed = (_VISITS_SHARE, _VISITS_SHARE)
    if shares not in ((usual.validation_fraction, usual.test_fraction), fixed):
        raise UserError(
            f"data.validation-fraction={shares[0]:g} and data.test-fraction={shares[1]:g} with "
            "data.protocol=visits, which fixes them",
            allowed="1/6 and 1/6, as in the literature",
            fix="leave both out",
        )
    return fixed


def known_items(admission: "Admission") -> Iterator[str]:
    """Yield what a sample's prompt shows, but for the patient's sex, age and measures.

    Whatever else stands in an admission - under ``first-24h`` above all the diagnoses of its own
    stay - is not read.

    >>> from common.data.samples import Admission, Visit
    >>> past = Visit(diagnosis_codes=("10:I10",), drugs=("Aspirin",))
    >>> one = Admission(patient=1, admission=1, sex="F", age=50, diagnosis_codes=("10:J18",),
    ...     earlier=(past,), ordered=("Heparin",))
    >>> list(known_items(one))
    ['10:J18']
    >>> from dataclasses import replace
    >>> list(known_items(replace(one, protocol="visits")))
    ['10:J18', 'earlier 10:I10', 'earlier drug aspirin']
    >>> labs = (f"Sodium: 128 mEq/L{FLAGGED}",)
    >>> list(known_items(replace(one, protocol="first-24h", earlier=(), labs=labs)))
    ['admission type unknown', 'lab Sodium abnormal', 'ordered heparin']
    """
    if admission.protocol != FIRST_24H:
        yield from admission.diagnosis_codes
    if admission.protocol == ADMISSION:
        return
    for name in admission.procedures:
        yield f"procedure {name}"
    for visit in admission.earlier:
        yield from (f"earlier {code}" for code in visit.diagnosis_codes)
        yield from (f"earlier procedure {name}" for name in visit.procedures)
        yield from (f"earlier drug {normalise_string(name)}" for name in visit.drugs)
    if admission.protocol != FIRST_24H:
        return
    yield f"admission type {admission.admission_type}"
    for service in admission.services:
        yield f"service {service}"
    for text in admission.labs:
        yield f"lab {text.rpartition(': ')[0]}" + " abnormal" * text.endswith(FLAGGED)
    for drug in admission.ordered:
        yield f"ordered {normalise_string(drug)}"


def system_prompt(text: TextConfig, protocol: str) -> str:
    """Return the system message: the user's, or what the protocol asks in its own words.

    >>> system_prompt(TextConfig(), "visits")
    'List the drugs for this hospital stay, one a line.'
    >>> system_prompt(TextConfig(system_prompt="Which drugs?"), "first-24h")
    'Which drugs?'
    """
    if protocol == FIRST_24H and text.system_prompt == OWN_TEXT.system_prompt:
        return _LATER_PROMPT
    return text.system_prompt.strip()


def require_own_template(config: Config) -> None:
    """Refuse a template of the user's where a prompt shows more than it has a place for.

    Raises:
        UserError: If there is one, and the protocol is not ``admission``.
    """
    if config.text.template and config.data.protocol != ADMISSION:
        raise UserError(
            f"text.template with data.protocol={config.data.protocol}: a template has no place "
            "for earlier visits, results and orders",
            allowed=f"a template with data.protocol={ADMISSION}",
            fix="leave text.template empty",
        )


def not_ordered(drugs: tuple[str, ...], admission: "Admission") -> tuple[str, ...]:
    """Return the drugs that are not known to be ordered already.

    >>> from common.data.samples import Admission
    >>> one = Admission(patient=1, admission=1, sex="F", age=50, ordered=("Insulin",))
    >>> not_ordered(("Aspirin", "INSULIN"), one)
    ('Aspirin',)
    """
    if not admission.ordered:
        return drugs
    ordered = set(map(normalise_string, admission.ordered))
    return tuple(drug for drug in drugs if normalise_string(drug) not in ordered)


def require_protocol(config: Config, served: tuple[str, ...], why: str) -> None:
    """Refuse a run whose task a verb does not serve.

    Args:
        config: Of the run.
        served: Of ``PROTOCOLS``.
        why: What the others lack, in a clause.

    Raises:
        UserError: If the run's is not among those served.
    """
    protocol = config.data.protocol
    if protocol not in served:
        raise UserError(
            f"the run has data.protocol={protocol}, and {why}",
            allowed=f"a run with data.protocol={' or '.join(served)}",
            fix="name such a run; fedrx evaluate and fedrx report serve this one",
        )
