"""The data sources: a new one stands here, and ``data.path`` may name its data."""

from pathlib import Path

from common.config import DataConfig
from common.data.eicu.source import EICU
from common.data.icd import Diagnosis
from common.data.meds.source import Meds
from common.data.mimic.source import MimicIV
from common.data.source import Source
from common.data.synthetic.source import Synthetic

SOURCES: tuple[Source, ...] = (Synthetic(), Meds(), EICU(), MimicIV())
"""In the order in which they are asked; the last is taken for what nobody claims."""


def source_for(path: str) -> Source:
    """Return the source that ``data.path`` belongs to.

    >>> type(source_for("synthetic")).__name__
    'Synthetic'
    """
    return next((source for source in SOURCES if source.claims(path)), SOURCES[-1])


def identifiers_of(config: DataConfig) -> str:
    r"""Return a regular expression of the source's ids; of all sources where its data is not here.

    >>> print(identifiers_of(DataConfig(path="synthetic")))
    [1-3]\d{7}
    """
    own = source_for(config.path)
    if isinstance(own, Synthetic) or Path(config.path).expanduser().exists():
        return own.identifiers
    return "|".join(dict.fromkeys(source.identifiers for source in SOURCES))


def titles_of(config: DataConfig) -> list[Diagnosis]:
    """Return the diagnoses that ``data.path`` has a title for, beyond those of its samples.

    Raises:
        UserError: Its tables cannot be read.
    """
    folder = Path(config.path).expanduser().absolute()
    return source_for(config.path).titles(folder, config)
