"""A run's data, opened once: what reads it once hands it on."""

from dataclasses import dataclass, replace
from pathlib import Path

from common.config import Config, DataConfig
from common.data.partition import Hospital, assign_hospitals, pooled_sites
from common.data.prepare import load_samples
from common.data.protocols import require_own_template
from common.data.samples import Admission, Progress, SampleTable


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """The samples of one configuration and the hospitals that they are dealt to."""

    samples: SampleTable
    hospitals: tuple[Hospital, ...]

    @property
    def source(self) -> str:
        """The source tag: ``synthetic``, ``demo`` or ``credentialed``."""
        return self.samples.source

    @property
    def digest(self) -> str:
        """sha256 over the samples: equal digests mean equal samples."""
        return self.samples.digest

    @property
    def train(self) -> list[Admission]:
        """The training samples of all hospitals."""
        return [one for hospital in self.hospitals for one in hospital.train]


def what_decides(config: Config) -> tuple[object, ...]:
    """Return the settings that decide what ``open_hospitals`` returns or refuses.

    Names and order of the drugs are left out: they are read where samples become text or are
    scored.

    >>> from common.configio import from_flat
    >>> what_decides(from_flat({"data.drug-order": "set"})) == what_decides(Config())
    True
    >>> what_decides(from_flat({"partition.seed": 1})) == what_decides(Config())
    False
    """
    own = DataConfig()
    data = replace(
        config.data,
        normalisation=own.normalisation,
        drug_map=own.drug_map,
        drug_order=own.drug_order,
    )
    return data, config.partition, config.federation.hospitals, config.text


def open_hospitals(
    config: Config, *, cache_dir: Path | None = None, progress: Progress | None = None
) -> Dataset:
    """Read the samples of ``data.path`` and deal them to ``federation.hospitals``.

    Args:
        config: Its data, partition and number of hospitals count.
        cache_dir: Cache folder (default: the user's).
        progress: Called with one line for each step.

    Raises:
        UserError: Tables that cannot be used, or a hospital that would be too small.
    """
    require_own_template(config)
    samples = load_samples(config.data, cache_dir=cache_dir, progress=progress)
    if progress is not None:
        progress("dealing patients to hospitals")
        if pooled := pooled_sites(samples.admissions, config.partition):
            progress(pooled)
    hospitals = assign_hospitals(
        samples.admissions,
        config.partition,
        hospitals=config.federation.hospitals,
        data=config.data,
    )
    return Dataset(samples=samples, hospitals=hospitals)
