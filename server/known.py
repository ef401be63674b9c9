"""What the server must know of backbone and adapter: as its launcher found it, else found here.

It computes with numpy alone. A launcher has hashed the backbone before a run begins or goes on,
and tells by run.json what came out, so that a simulation's server needs neither torch nor
transformers, and reads no weights a second time.
"""

from typing import TYPE_CHECKING

from common.config import Config
from common.model.adapter.layout import adapter_spec, meta_adapter
from common.records.run import Inputs, Layout
from common.rundir import RunDirectory

if TYPE_CHECKING:
    from common.model.adapter.falora import Adapter
    from common.model.backbone.load import BackboneSpec


def layout_record(config: Config, backbone: "BackboneSpec", adapter: "Adapter") -> Layout:
    """Return what run.json tells the server."""
    return Layout(
        backbone=backbone.fingerprint_as(config.model.weights, config.text),
        shapes=dict(adapter.shapes),
        trainable_parameters=adapter.held_parameters,
    )


def known(config: Config, run: RunDirectory) -> tuple[Layout, Inputs]:
    """Return layout and fingerprints of a run; of plain ``flwr run`` they are found here.

    Raises:
        UserError: if there is no such backbone.
    """
    record = run.record()
    if record and record.layout:
        return record.layout, record.inputs
    from common.model.backbone.load import resolve_backbone

    backbone = resolve_backbone(config.model.backbone)
    adapter = meta_adapter(backbone, adapter_spec(config.adapter))
    inputs = Inputs(backbone=backbone.fingerprint, a=adapter.a_fingerprint)
    return layout_record(config, backbone, adapter), inputs
