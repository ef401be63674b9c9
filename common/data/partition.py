"""Splits and hospitals, always by patient.

A patient's split depends on the patient and the seed alone, so that adding a patient moves no
other; the same holds for the ``iid`` scheme. Attribute schemes go by the patient's first sampled
admission.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from common.config import DataConfig, PartitionConfig
from common.data.cleaning.assemble import ATTRIBUTES as COLUMNS
from common.data.missing import apply_policies, fit_medians, policies_of
from common.data.protocols import split_shares
from common.data.samples import UNKNOWN, Admission
from common.errors import SettingError, UserError
from common.seeds import stream
from common.wire.cohort import hospital_names

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
ATTRIBUTES = {name.replace("_", "-"): name for name in COLUMNS}
ANY_SIZE = 0
"""``min_patients`` of a hospital that is never too small, not even without training samples."""
_DIRICHLET_CLASS = "service"
_DIRICHLET_ATTEMPTS = 1000


@dataclass(frozen=True, kw_only=True)
class Hospital:
    """The samples of one hospital, split by patient."""

    name: str
    train: tuple[Admission, ...]
    validation: tuple[Admission, ...]
    test: tuple[Admission, ...]
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Samples left out by a missing-value policy or a limit, by reason."""

    @property
    def admissions(self) -> tuple[Admission, ...]:
        """All samples, train first."""
        return self.train + self.validation + self.test

    @property
    def patients(self) -> int:
        """Number of patients."""
        return len({one.patient for one in self.admissions})

    @property
    def samples(self) -> int:
        """Number of samples in all splits."""
        return len(self.admissions)


def split_of(patient: int, *, seed: int, validation_fraction: float, test_fraction: float) -> Split:
    """Return the split of a patient, from a hash of the patient and the seed alone.

    >>> split_of(7, seed=0, validation_fraction=0.0, test_fraction=1.0)
    'test'
    """
    place = _uniform("split", seed, patient)
    if place < test_fraction:
        return "test"
    return "validation" if place < test_fraction + validation_fraction else "train"


def assign_hospitals(
    admissions: Sequence[Admission],
    config: PartitionConfig,
    *,
    hospitals: int,
    data: DataConfig,
) -> tuple[Hospital, ...]:
    """Deal patients to hospitals, split them, and apply the missing-value policies.

    Args:
        admissions: All samples; those of a patient in the order of time.
        config: Scheme, seed, concentration and smallest size.
        hospitals: Number of hospitals; 1 puts everything into ``hospital-1``.
        data: Split seed, split shares, missing-value policies and the limit on training samples.

    Returns:
        Hospitals in the order of their names. No patient is in two hospitals or two splits.

    Raises:
        UserError: A hospital would be smaller than ``min_patients`` or have no training samples,
            unless ``min_patients`` is ``ANY_SIZE``.
    """
    first = _first(admissions)
    home = _homes(first, config, hospitals)
    rooms: list[dict[Split, list[Admission]]] = [
        {split: [] for split in SPLITS} for _ in range(hospitals)
    ]
    validation, test = split_shares(data)
    split = {
        patient: split_of(
            patient,
            seed=data.split_seed,
            validation_fraction=validation,
            test_fraction=test,
        )
        for patient in first
    }
    for one in admissions:
        rooms[home[one.patient]][split[one.patient]].append(one)
    policies = policies_of(data)
    named = tuple(
        _limited(_hospital(name, room, policies), data)
        for name, room in zip(hospital_names(hospitals), rooms, strict=True)
    )
    for hospital in named:
        _check_size(hospital, config, hospitals, len(first))
    return named


def _first(admissions: Iterable[Admission]) -> dict[int, Admission]:
    """Return the first admission of each patient."""
    first: dict[int, Admission] = {}
    for one in admissions:
        first.setdefault(one.patient, one)
    return first


def _hospital(
    name: str, room: Mapping[Split, Sequence[Admission]], policies: Mapping[str, str]
) -> Hospital:
    medians = fit_medians(room["train"], policies)
    kept = {split: apply_policies(room[split], policies, medians) for split in SPLITS}
    dropped = Counter[str]()
    for _, reasons in kept.values():
        dropped.update(reasons)
    return Hospital(
        name=name,
        train=kept["train"][0],
        validation=kept["validation"][0],
        test=kept["test"][0],
        dropped=dict(dropped),
    )


def _limited(hospital: Hospital, data: DataConfig) -> Hospital:
    """Keep ``data.train_samples`` training samples, if there are more."""
    surplus = len(hospital.train) - data.train_samples
    if data.train_samples == 0 or surplus <= 0:
        return hospital
    draw = stream(data.split_seed, "train-samples", hospital.name)
    places = sorted(draw.permutation(len(hospital.train))[: data.train_samples].tolist())
    return replace(
        hospital,
        train=tuple(hospital.train[place] for place in places),
        dropped={**hospital.dropped, "beyond_train_samples": surplus},
    )


def _check_size(hospital: Hospital, config: PartitionConfig, hospitals: int, patients: int) -> None:
    if config.min_patients == ANY_SIZE:
        return
    fix = "use fewer hospitals, another partition.scheme or partition.seed, or more patients"
    setting = f"federation.hospitals={hospitals} with partition.scheme={config.scheme}"
    if hospital.patients < config.min_patients:
        raise SettingError(
            f"{setting} leaves {hospital.name} with {hospital.patients} of {patients} patients",
            allowed=f"at least partition.min-patients={config.min_patients} each",
            fix=fix,
        )
    if not hospital.train:
        raise SettingError(
            f"{setting} leaves {hospital.name} without training samples",
            allowed="at least one training sample in each hospital",
            fix=fix,
        )


def _homes(
    first: Mapping[int, Admission], config: PartitionConfig, hospitals: int
) -> dict[int, int]:
    if hospitals == 1:
        return dict.fromkeys(first, 0)
    if config.scheme == "iid":
        return {
            patient: int(_uniform("hospital", config.seed, patient) * hospitals)
            for patient in first
        }
    if config.scheme == "dirichlet":
        return _dirichlet(first, config, hospitals)
    if config.scheme == "site":
        return _by_site(first, config, hospitals)
    return _by_attribute(first, ATTRIBUTES[config.scheme], config, hospitals)


def _by_attribute(
    first: Mapping[int, Admission], attribute: str, config: PartitionConfig, hospitals: int
) -> dict[int, int]:
    """Give whole groups to hospitals.

    With fewer groups than hospitals, the largest group is halved by hash until they suffice.
    """
    groups: dict[tuple[str, int], list[int]] = {
        (value, 0): members for value, members in _classes(first, attribute, config).items()
    }
    serial = 0
    while len(groups) < hospitals:
        key = max(groups, key=lambda k: (len(groups[k]), k))
        members = groups.pop(key)
        if len(members) < 2:
            raise SettingError(
                f"federation.hospitals={hospitals} for {len(first)} patients",
                allowed=f"1 to {len(first)}",
                fix="use fewer hospitals or more patients",
            )
        half = len(members) // 2
        groups[key[0], serial + 1], groups[key[0], serial + 2] = members[:half], members[half:]
        serial += 2
    return _dealt(groups, hospitals)


def _dealt(groups: Mapping[Any, Sequence[int]], hospitals: int) -> dict[int, int]:
    """Give whole groups to hospitals, the largest first to the smallest hospital so far."""
    sizes = [0] * hospitals
    home: dict[int, int] = {}
    for _, members in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])):
        place = sizes.index(min(sizes))
        sizes[place] += len(members)
        home.update(dict.fromkeys(members, place))
    return home


def pooled_sites(admissions: Sequence[Admission], config: PartitionConfig) -> str:
    """Say how many sites are below ``min_patients``, and so share one pool; empty if none."""
    small, whole = _sites(_first(admissions), config)
    if config.scheme != "site" or not small:
        return ""
    patients = sum(map(len, small.values()))
    return (
        f"{len(small)} of {len(small) + len(whole)} sites have fewer than partition.min-patients="
        f"{config.min_patients} patients: their {patients} patients are pooled"
    )


def _sites(
    first: Mapping[int, Admission], config: PartitionConfig
) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Return the patients of the sites that are too small, and of the others."""
    sites = _classes(first, "site", config)
    small = {site: found for site, found in sites.items() if len(found) < config.min_patients}
    return small, {site: found for site, found in sites.items() if site not in small}


def _by_site(
    first: Mapping[int, Admission], config: PartitionConfig, hospitals: int
) -> dict[int, int]:
    """Give whole sites to hospitals, those below ``min_patients`` as one pool; none is divided."""
    small, groups = _sites(first, config)
    if small.keys() | groups.keys() <= {UNKNOWN}:
        raise UserError(
            "partition.scheme=site for data that names no sites",
            allowed="eICU's tables, or a MEDS data set with a column of hospitals",
            fix="set another partition.scheme",
        )
    if small:
        groups[""] = [patient for members in small.values() for patient in members]
    if len(groups) < hospitals:
        raise SettingError(
            f"federation.hospitals={hospitals} with partition.scheme=site for {len(groups)} sites"
            + f", of which one is a pool of {len(small)}" * bool(small),
            allowed=f"1 to {len(groups)}",
            fix="lower federation.hospitals, or partition.min-patients",
        )
    return _dealt(groups, hospitals)


def _dirichlet(
    first: Mapping[int, Admission], config: PartitionConfig, hospitals: int
) -> dict[int, int]:
    """Deal each service's patients by shares from Dirichlet(alpha), redrawn until all are served.

    Source: Hsu et al. 2019, arXiv 1909.06335 (label-skewed clients), with the first admission's
    service as the label.
    """
    classes = _classes(first, _DIRICHLET_CLASS, config)
    for attempt in range(_DIRICHLET_ATTEMPTS):
        draw = stream(config.seed, "partition", "dirichlet", attempt)
        home: dict[int, int] = {}
        for _, members in sorted(classes.items()):
            shares = draw.dirichlet(np.full(hospitals, config.alpha))
            edges = np.cumsum(shares) * len(members)
            places = np.searchsorted(edges[:-1], np.arange(len(members)), side="right")
            home.update(zip(members, places.tolist(), strict=True))
        sizes = np.bincount(list(home.values()), minlength=hospitals)
        if sizes.min() >= config.min_patients:
            return home
    raise UserError(
        f"partition.alpha={config.alpha:g} gives no {hospitals} hospitals of at least "
        f"{config.min_patients} patients in {_DIRICHLET_ATTEMPTS} draws",
        allowed="a larger alpha deals more evenly",
        fix="raise partition.alpha, or lower federation.hospitals or partition.min-patients",
    )


def _classes(
    first: Mapping[int, Admission], attribute: str, config: PartitionConfig
) -> dict[str, list[int]]:
    """Patients by attribute value, in hash order."""
    classes: dict[str, list[int]] = {}
    for patient in sorted(first, key=lambda one: (_uniform("order", config.seed, one), one)):
        classes.setdefault(getattr(first[patient], attribute), []).append(patient)
    return classes


def _uniform(purpose: str, seed: int, patient: int) -> float:
    digest = hashlib.sha256(f"{purpose}:{seed}:{patient}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
