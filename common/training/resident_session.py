"""The resident backbone of one process: loaded once, shared by the hospitals it serves."""

import functools
import os
from pathlib import Path

import torch

from common.config import AdapterConfig, Config, ModelConfig
from common.data.partition import Hospital
from common.files import write_json
from common.model.adapter.layout import adapter_spec
from common.model.backbone.load import BackboneSpec, loads, resolve_backbone
from common.model.session import Session, open_session
from common.training.hospital_data import HospitalData, encode_hospital

_encoded: dict[tuple[Config, str], HospitalData] = {}


@functools.lru_cache(maxsize=1)
def backbone_spec(name: str) -> BackboneSpec:
    """Resolve the backbone once per process."""
    return resolve_backbone(name)


def session_of(config: Config) -> Session:
    """Return this process's session, loading the backbone the first time."""
    train = config.train
    return _session(
        config.model,
        config.adapter,
        train.device,
        train.dtype,
        train.threads,
        train.recompute,
        train.batch_size * train.max_length,
    )


@functools.lru_cache(maxsize=1)
def _session(
    model: ModelConfig,
    adapter: AdapterConfig,
    device: str,
    dtype: str,
    threads: int,
    recompute: str,
    batch_tokens: int,
) -> Session:
    return open_session(
        backbone_spec(model.backbone),
        adapter_spec(adapter),
        device=device,
        dtype=dtype,
        attention=model.attention,
        threads=threads or None,
        recompute=recompute,
        batch_tokens=batch_tokens,
        kernels=model.kernels,
        weights=model.weights,
    )


def close_session() -> None:
    """Let go of the backbone, before one with another adapter is opened."""
    _session.cache_clear()
    _encoded.clear()


def tokens_of(config: Config, hospital: Hospital, session: Session) -> HospitalData:
    """Return a hospital's tokens, encoded once per process."""
    key = (config, hospital.name)
    if key not in _encoded:
        _encoded[key] = encode_hospital(hospital, session, config)
    return _encoded[key]


def report_loads(config: Config) -> None:
    """Write how often this process has loaded weights, and its threads; stays on the machine."""
    folder = Path(config.run.directory) / "workers"
    facts = {"backbone_loads": loads(), "threads": torch.get_num_threads()}
    write_json(folder / f"{os.getpid()}.json", facts)
