"""What one process keeps from message to message, and from stage to stage of a run."""

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from common.config import Config
from common.data.dataset import Dataset, open_hospitals, what_decides
from common.data.partition import Hospital
from common.files import write_json
from common.model.adapter.layout import adapter_spec
from common.model.backbone.load import BackboneSpec, resolve_backbone
from common.model.backbone.reading import Destination
from common.model.session import Session, early_destination, open_session
from common.provenance import peak_device_bytes
from common.records.run import WorkerFacts
from common.training.hospital_data import HospitalData, encode_hospital


def destination_of(config: Config) -> Destination | None:
    """Say where a session's weights are read beforehand, if they are."""
    model, train = config.model, config.train
    return early_destination(train.device, train.dtype, model.weights, model.kernels)


class Worker:
    """One backbone with its adapter and one data set, open at a time, and its hospitals' tokens.

    Attributes:
        loads: By run's folder, how often it has loaded weights.
    """

    def __init__(self) -> None:
        self.loads: Counter[str] = Counter()
        self._trained: dict[str, tuple[int, float]] = {}
        self._backbone: BackboneSpec | None = None
        self._session: Session | None = None
        self._opened: tuple[object, ...] = ()
        self._tokens: dict[tuple[Config, str], HospitalData] = {}
        self._data: tuple[tuple[object, ...], Dataset] | None = None

    def data(self, config: Config, progress: Callable[[str], None] | None = None) -> Dataset:
        """Return the data that a configuration asks for, opened once; the last one is kept.

        Args:
            config: See ``common.data.dataset.what_decides``.
            progress: Called with one line for each step of opening it.

        Raises:
            UserError: see ``open_hospitals``.
        """
        if self._data is None or self._data[0] != what_decides(config):
            self.forget_data()
            self.keep_data(config, open_hospitals(config, progress=progress))
        assert self._data is not None
        return self._data[1]

    def keep_data(self, config: Config, data: Dataset) -> None:
        """Keep what a configuration opens, read by whoever hands it on."""
        self._data = what_decides(config), data

    def forget_data(self) -> None:
        """Keep no data: the next that is asked for is read."""
        self._data = None

    def backbone_to_open(
        self, config: Config, progress: Callable[[str], None] | None = None
    ) -> BackboneSpec:
        """Return the backbone of a session that will be opened, resolved once.

        A GPU has its weights already.

        Args:
            config: The session's.
            progress: Called with one line when something takes long.
        """
        name = config.model.backbone
        if self._backbone is None or self._backbone.name != name:
            destination = destination_of(config)
            if destination:
                self._close()
            self._backbone = resolve_backbone(name, progress=progress, destination=destination)
        return self._backbone

    def _close(self) -> None:
        self._session = None
        self._tokens.clear()

    def session(self, config: Config) -> Session:
        """Return the session that a configuration asks for, opened once.

        One that was opened otherwise is let go of first: two backbones do not fit.
        """
        model, train = config.model, config.train
        tokens = train.batch_size * train.max_length
        settings = (train.device, train.dtype, train.threads, train.recompute, tokens)
        asked = (model, config.adapter, *settings)
        if self._session is None or self._opened != asked:
            self._close()
            self._session = open_session(
                self.backbone_to_open(config),
                adapter_spec(config.adapter),
                device=train.device,
                dtype=train.dtype,
                attention=model.attention,
                threads=train.threads or None,
                recompute=train.recompute,
                batch_tokens=tokens,
                kernels=model.kernels,
                weights=model.weights,
            )
            self._opened = asked
            self.loads[config.run.directory] += 1
        return self._session

    def tokens(self, config: Config, hospital: Hospital) -> HospitalData:
        """Return a hospital's tokens, encoded once."""
        session, key = self.session(config), (config, hospital.name)
        if key not in self._tokens:
            run = config.run.directory  # a sweep in one process has many: one at a time is kept
            for other in [one for one in self._tokens if one[0].run.directory != run]:
                del self._tokens[other]
            self._tokens[key] = encode_hospital(hospital, session, config)
        return self._tokens[key]

    def count(self, config: Config, tokens: int, seconds: float) -> None:
        """Add what was trained for a run, where it may be told."""
        before = self._trained.get(config.run.directory, (0, 0.0))
        if tokens:
            self._trained[config.run.directory] = before[0] + tokens, before[1] + seconds

    def loads_of(self, config: Config) -> int:
        """Return how often a run's weights were loaded: once, if another run had them open."""
        return max(1, self.loads[config.run.directory])

    def report(self, config: Config) -> None:
        """Write how often weights were loaded, and how training goes; stays on the machine."""
        folder = Path(config.run.directory) / "workers"
        tokens, seconds = self._trained.get(config.run.directory, (0, 0.0))
        facts = WorkerFacts(
            backbone_loads=self.loads_of(config),
            threads=torch.get_num_threads(),
            tokens=tokens,
            training_seconds=round(seconds, 3),
            peak_device_bytes=peak_device_bytes(),
        )
        write_json(folder / f"{os.getpid()}.json", facts.as_json())
