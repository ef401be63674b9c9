"""What the adapter of a backbone looks like, from shapes alone: no weights are read."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from common.config import AdapterConfig
from common.errors import SettingError
from common.model.adapter.scheme import A, part_of
from common.model.adapter.spec import AdapterSpec, draw_a

if TYPE_CHECKING:
    from common.model.adapter.falora import Adapter
    from common.model.backbone.load import BackboneSpec


def adapter_spec(config: AdapterConfig) -> AdapterSpec:
    """Translate the configuration section.

    Raises:
        UserError: for a personal B beside an A that is trained: the two would not add up.
    """
    if config.personal and config.mode != "fa-lora":
        raise SettingError(
            f"adapter.personal with adapter.mode={config.mode}: B_global + B_own needs one A",
            allowed="adapter.mode = fa-lora",
            fix="set adapter.personal = false, or another adapter.mode",
        )
    return AdapterSpec(
        targets=tuple(
            dict.fromkeys(name.strip() for name in config.targets.split(",") if name.strip())
        ),
        rank=config.rank,
        alpha=config.alpha,
        seed=config.seed,
        initialiser=config.initialiser,
        mode=config.mode,
    )


def initial_tensors(
    shapes: Mapping[str, tuple[int, ...]], spec: AdapterSpec
) -> dict[str, NDArray[np.float32]]:
    """Return what training starts from: B zero, and A as drawn where it is held.

    Args:
        shapes: Of the held tensors, by wire key.
        spec: Draws A.
    """
    return {
        key: draw_a(spec, key.rpartition(".")[0], shape[1])
        if part_of(key) == A
        else np.zeros(shape, dtype=np.float32)
        for key, shape in shapes.items()
    }


def meta_adapter(backbone: "BackboneSpec", spec: AdapterSpec) -> "Adapter":
    """Attach the adapter to the backbone's shape on the meta device.

    A is drawn on the CPU from its seed all the same, so its fingerprint is the real one.
    """
    from common.model.adapter.falora import attach
    from common.model.backbone.llama_config import read_llama_config
    from common.model.backbone.skeleton import shaped_like
    from common.model.backbone.tiny import CONFIG as TINY

    folder = backbone.folder
    config = read_llama_config(folder, backbone.name) if folder else TINY
    return attach(shaped_like(config), spec)
