"""What is known of a run before anything is started: its data, hospitals and backbone."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common.config import Config
from common.configio import file_keys, flatten, from_flat
from common.data.dataset import Dataset
from common.errors import UserError
from common.evaluation.answers import choose_cases
from common.evaluation.lists import check_lists
from common.model.adapter.falora import Adapter
from common.model.adapter.layout import adapter_spec, meta_adapter
from common.model.backbone.load import BackboneSpec, resolve_backbone
from common.privacy.mechanism.isolation import check_backbone
from common.privacy.settings import is_private
from common.records.run import DataFacts, Inputs
from common.training.budget import checkpoint_steps, steps_in_all
from common.training.worker import Worker, destination_of
from sim.flower.superlink import free_port
from sim.process.early import check_settings
from sim.process.progress import Console
from sim.report.data_description import sizes_of

BUILT_IN = ("synthetic", "embedded", "tiny")
"""Data and backbones that are no folders, even where a folder has their name."""


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What is known before anything is started."""

    data: Dataset
    backbone: BackboneSpec
    adapter: Adapter
    """On the meta device: shapes, and A's fingerprint."""


def prepare(
    config: Config, console: Console, worker: Worker, *, trains_here: bool = False
) -> Preparation:
    """Read the data, deal the hospitals and find the backbone.

    Args:
        config: Complete configuration.
        console: Where progress is shown.
        worker: Opens the data, where the run before did not, and keeps it.
        trains_here: Whether the worker's session trains, in this process.

    Raises:
        UserError: for everything that can be known to fail before the run starts.
    """
    say = partial(console.say, style="dim")
    free_port(config.run.port)
    if trains_here and destination_of(config):
        # Before the checks: they import what the weights are read beside.
        worker.backbone_to_open(config, progress=say)
    check_settings(config)
    data = worker.data(config, progress=say)
    for hospital in data.hospitals:
        checkpoint_steps(config, steps_in_all(config, len(hospital.train)).value)
    choose_cases(data.hospitals, samples=config.evaluation.samples, seed=config.evaluation.seed)
    check_lists(data.hospitals, config)
    if trains_here:
        backbone = worker.backbone_to_open(config, progress=say)
    else:
        backbone = resolve_backbone(config.model.backbone, progress=say)
    if is_private(config):
        check_backbone(backbone)
    adapter = meta_adapter(backbone, adapter_spec(config.adapter))
    return Preparation(data=data, backbone=backbone, adapter=adapter)


def fingerprints(preparation: Preparation) -> Inputs:
    """Return what identifies a run's inputs: a resumed run must read the same."""
    return Inputs(
        samples=preparation.data.digest,
        backbone=preparation.backbone.fingerprint,
        a=preparation.adapter.a_fingerprint,
    )


def require_same_inputs(begun: Inputs, preparation: Preparation) -> None:
    """Compare data, backbone and A with what a run began with.

    Raises:
        UserError: naming what changed.
    """
    for (name, before), (_, now) in zip(begun, fingerprints(preparation), strict=True):
        if now != before:
            raise UserError(
                f"the run's {name} changed since it began: {before} -> {now}",
                fix="bring the same data and backbone back, or start a new run",
            )


def data_facts(preparation: Preparation) -> DataFacts:
    """Return what data.json holds."""
    table = preparation.data.samples
    return DataFacts(
        source=table.source,
        file_hashes=dict(table.file_hashes),
        counts={name: value for name, value in table.counts.as_json().items() if name != "age"},
        hospitals=tuple(map(sizes_of, preparation.data.hospitals)),
    )


def with_absolute_paths(config: Config) -> Config:
    """Make existing paths absolute, since workers run elsewhere; names (``synthetic``) stay."""
    flat = flatten(config)
    return from_flat({key: _absolute(str(flat[key])) for key in file_keys()}, base=config)


def _absolute(path: str) -> str:
    place = Path(path).expanduser()
    return str(place.absolute()) if path not in ("", *BUILT_IN) and place.exists() else path
