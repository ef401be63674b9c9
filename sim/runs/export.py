"""``fedrx export``: a run's adapter for PEFT, merged into the backbone, or for llama.cpp.

Each folder has a model card that says what the weights are and how a list is generated with them.
"""

import re
import shutil
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save

from client.personal import b_of
from common.config import Config
from common.errors import UserError
from common.files import new_folder, write_bytes, write_json, write_text
from common.model.adapter.falora import Adapter
from common.model.adapter.layout import adapter_spec, meta_adapter
from common.model.backbone.llama_config import read_llama_config
from common.model.backbone.load import (
    BackboneSpec,
    load_model,
    load_tokenizer,
    resolve_backbone,
    without_progress_bars,
)
from common.rundir import RunDirectory
from common.tensor_files import Tensors
from sim.process.open_run import require_same
from sim.runs.model_card import CARD_TITLE, Format, model_card

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
GGUF_FILE = "adapter.gguf"
CARD_FILE = "README.md"
FOLDERS: dict[Format, str] = {"peft": "adapter", "merged": "merged", "gguf": "gguf"}
_WRITTEN = (
    *(CONFIG_FILE, WEIGHTS_FILE, GGUF_FILE, CARD_FILE, "config.json", "generation_config.json"),
    *(
        "model*.safetensors",
        "model.safetensors.index.json",
        "tokenizer*",
        "special_tokens_map.json",
    ),
    *("chat_template.jinja", "vocab.json", "merges.txt", "added_tokens.json"),
)
"""What an export may have written; another folder's files are not replaced."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def export_run(
    run: RunDirectory,
    target: Path | None = None,
    *,
    checkpoint: str | None = None,
    layout: Format = "peft",
    base_model: str = "",
    personal: str = "",
) -> Path:
    """Write a run's adapter in one of the layouts, with a model card.

    ``peft``: adapter_config.json and adapter_model.safetensors (fp32), which PEFT and vLLM load;
    no weights of the backbone are read. ``merged``: the backbone with W + s B A in its projections,
    rounded to the backbone's own dtype, which transformers and vLLM load. ``gguf``: adapter.gguf
    (fp32), which llama.cpp loads with ``--lora``.

    Args:
        run: Any run directory with a checkpoint.
        target: Folder to write; default ``adapter``, ``merged`` or ``gguf`` in the run directory,
            of a personal adapter with ``-HOSPITAL``.
            An earlier export there is replaced.
        checkpoint: Name of a checkpoint; default the last.
        layout: ``peft``, ``merged`` or ``gguf``.
        base_model: Hub id of a backbone that is a local folder.
        personal: Hospital whose own B is added, where the run has trained one.

    Returns:
        The folder.

    Raises:
        UserError: If there is no checkpoint, the target holds other files, ``base_model`` is no
            hub id, the backbone or A are not those of the run, or there is no such own B.
    """
    config, loaded = run.config(), run.load_checkpoint(checkpoint)
    default = "-".join(filter(None, (FOLDERS[layout], personal)))
    folder = (target or run.path / default).expanduser().absolute()
    if not _replaceable(folder):
        raise UserError(
            f"{folder} holds something else",
            allowed="a new or empty folder, or an earlier export",
            fix="name another folder",
        )
    backbone = resolve_backbone(config.model.backbone)
    hub_id = _hub_id(backbone, base_model)
    adapter = meta_adapter(backbone, adapter_spec(config.adapter))
    begun = run.inputs()
    require_same("the backbone", backbone.fingerprint, begun.backbone, "model.backbone")
    require_same("A", adapter.a_fingerprint, begun.a, "adapter.seed")
    tensors = lora_tensors(adapter, b_of(run, loaded, personal))
    card = model_card(
        run, config, backbone, loaded, layout=layout, hub_id=hub_id, personal=personal
    )
    with new_folder(folder) as written:
        written.mkdir()
        if layout == "peft":
            write_json(written / CONFIG_FILE, peft_config(config, hub_id))
            write_bytes(written / WEIGHTS_FILE, save(peft_tensors(tensors)))
        elif layout == "merged":
            _write_merged(written, backbone, tensors, scale=adapter.spec.scale)
        else:
            _write_gguf(written / GGUF_FILE, backbone, tensors, alpha=adapter.spec.alpha)
        write_text(written / CARD_FILE, card)
        shutil.rmtree(folder, ignore_errors=True)
    return folder


def _replaceable(folder: Path) -> bool:
    """Tell whether a folder is new, empty, or what an earlier export has written, and no more."""
    if not folder.exists():
        return True
    names = {path.name for path in folder.iterdir()}
    card = folder / CARD_FILE
    ours = card.is_file() and CARD_TITLE in card.read_text(encoding="utf-8", errors="replace")
    return not names or (
        ours and all(any(fnmatch(name, one) for one in _WRITTEN) for name in names)
    )


def _hub_id(backbone: BackboneSpec, named: str) -> str:
    """Return under which name others find the backbone; empty for one that has none.

    A folder's name is never one: who loads the adapter would look for it on the hub.
    """
    if named and not _HUB_ID.fullmatch(named):
        raise UserError(
            f"--base-model {named}",
            allowed="a hub id, OWNER/NAME",
            fix="name the model whose files the backbone's folder holds",
        )
    return named or backbone.hub_id


def peft_config(config: Config, hub_id: str) -> dict[str, object]:
    """Return adapter_config.json as PEFT's LoraConfig and vLLM read it."""
    adapter = config.adapter
    whole = float(adapter.alpha).is_integer()
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": hub_id or None,
        "r": adapter.rank,
        "lora_alpha": int(adapter.alpha) if whole else adapter.alpha,
        "target_modules": list(adapter_spec(adapter).targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }


def lora_tensors(adapter: Adapter, b: Tensors) -> Tensors:
    """Return A and B of every module (fp32) as ``MODULE.lora_A`` and ``MODULE.lora_B``.

    Args:
        adapter: Gives A as it is drawn, where no round trains it.
        b: All that a run holds of the adapter, by wire key.
    """
    everything = adapter.drawn_a() | b
    return {
        key: np.asarray(value, dtype=np.float32, order="C") for key, value in everything.items()
    }


def peft_tensors(tensors: Tensors) -> Tensors:
    """Name A and B as PEFT does."""
    return {f"base_model.model.{key}.weight": value for key, value in tensors.items()}


def _write_merged(folder: Path, backbone: BackboneSpec, tensors: Tensors, *, scale: float) -> None:
    """Write the backbone with W + s B A, summed in fp32 and rounded to its own dtype."""
    dtype = torch.float32
    if backbone.folder is not None:
        dtype = read_llama_config(backbone.folder, backbone.name).dtype or torch.bfloat16
    model = load_model(backbone, device=torch.device("cpu"), dtype=dtype)
    for key in tensors:
        module, _, letter = key.rpartition(".")
        if letter == "lora_B":
            a, b = (torch.from_numpy(tensors[f"{module}.lora_{one}"]) for one in "AB")
            weight = model.get_submodule(module).weight
            weight.copy_(weight.float() + scale * (b @ a))
    with without_progress_bars():
        model.save_pretrained(folder)
    load_tokenizer(backbone).save_pretrained(folder)


def _write_gguf(file: Path, backbone: BackboneSpec, tensors: Tensors, *, alpha: float) -> None:
    """Write A and B under llama.cpp's names, B's rows of q and k in the order of its rotation.

    Llama's halves of a head are rotated against each other; llama.cpp rotates neighbours, and
    keeps the rows of q_proj and k_proj interleaved. The rows of an update are those of its B.
    """
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, backbone.shape.layers)
    heads = {"q_proj": backbone.shape.heads, "k_proj": backbone.shape.kv_heads}
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for key, value in tensors.items():
        module, _, letter = key.rpartition(".")
        count = heads.get(module.rpartition(".")[2])
        if letter == "lora_B" and count:
            value = interleaved(value, count)
        writer.add_tensor(f"{names.get_name(module)}.weight.{letter.lower()}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleaved(b_DR: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Put the rows of each head's two halves in turn.

    >>> interleaved(np.arange(8.0).reshape(8, 1), 2).ravel().tolist()
    [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]
    """
    d, r = b_DR.shape
    return np.ascontiguousarray(
        b_DR.reshape(heads, 2, d // heads // 2, r).swapaxes(1, 2).reshape(d, r)
    )
