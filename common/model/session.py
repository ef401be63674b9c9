"""A backbone with its adapter, open for training and generation on one device.

Every automatic choice (device, dtype, attention kernel, recomputation) is kept with its reason.
"""

import contextlib
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common.choice import AMX, ASKED, AVX, GPU_HAS_BF16, GPU_LACKS_BF16, NEITHER, Choice, is_device
from common.errors import SettingError
from common.limits import available_cpus
from common.model.adapter.falora import Adapter, AdapterSpec, attach
from common.model.backbone.load import BackboneSpec, load_model, load_tokenizer
from common.model.backbone.reading import Destination
from common.model.kernels.attention import Packing, choose_attention, register
from common.model.kernels.choice import choose_kernels, kernels_named
from common.model.kernels.elementwise import TORCH, Kernels
from common.model.kernels.frozen import choose_weights, quantiser_of
from common.model.memory import choose_recompute

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

    from common.model.kernels.fused_layer import KeepKeys
    from common.text.batches import PackedBatch

PRIMITIVES = "64"
"""Compiled products that oneDNN keeps; each length of a pass needs about 20."""
LENGTHS_APART = 3
"""Lengths of the segments that a CPU keeps apart in one pass, so that a layer finds its products
compiled by the one before: with six of them a private step took three times as long (AMX)."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(kw_only=True)
class Session:
    """One resident backbone with its adapter.

    Attributes:
        spec: Which backbone.
        model: transformers' Llama with the adapter in place; only the adapter is trainable.
        tokenizer: The backbone's tokenizer.
        adapter: The trainable state.
        device: Where it runs.
        dtype: Arithmetic of backbone and activations: ``fp32`` or ``bf16`` (B stays fp32).
        attention: Kernel of the packed batches.
        recompute: Which activations the backward pass computes again.
        kernels: Who does the elementwise work.
        weights: Format of the frozen weights.
        functions: What ``kernels`` names.
    """

    spec: BackboneSpec
    model: "LlamaForCausalLM"
    tokenizer: "PreTrainedTokenizerBase"
    adapter: Adapter
    device: Choice[str]
    dtype: Choice[str]
    attention: Choice[str]
    recompute: Choice[str]
    kernels: Choice[str] = field(default=Choice("torch", "not chosen"))
    weights: Choice[str] = field(default=Choice("bf16", "not chosen"))
    functions: Kernels = field(default=TORCH)

    @property
    def torch_device(self) -> torch.device:
        """The device as torch names it."""
        return torch.device(self.device.value)

    @property
    def shortens(self) -> bool:
        """Whether the last layer goes on with the labelled tokens alone.

        It is the same function, a fiftieth faster at 32 layers; its products round otherwise, so
        CPUs, whose runs are compared value by value, keep all tokens.
        """
        return self.torch_device.type != "cpu" and self.lean

    @property
    def keeps_apart(self) -> bool:
        """Whether one pass can compute each segment as if it were alone (on a GPU: has passed)."""
        return self.lean and (self.torch_device.type == "cpu" or self.functions.by_row)

    @property
    def lean(self) -> bool:
        """Whether packed batches take our own layers."""
        from common.model.kernels.fused_layer import LeanLayer

        return type(self.model.model.layers[-1]) is LeanLayer

    def label_states(self, batch: "PackedBatch", *, apart: bool = False) -> Tensor:
        """Run the backbone; returns [N, D] final hidden states where a label is predicted.

        Args:
            batch: Segments laid end to end, on the device.
            apart: See ``hidden_states``.
        """
        if self.shortens:
            if not batch.repeats:
                return self.hidden_states(batch, at=batch.label_positions_N, apart=apart)
            at, back_N = torch.unique_consecutive(batch.label_positions_N, return_inverse=True)
            return self.hidden_states(batch, at=at, apart=apart)[back_N]
        return self.hidden_states(batch, apart=apart)[batch.label_positions_N]

    def hidden_states(
        self,
        batch: "PackedBatch",
        *,
        keep: "KeepKeys | None" = None,
        at: Tensor | None = None,
        apart: bool = False,
    ) -> Tensor:
        """Run the backbone on a packed batch that lies on the device.

        Args:
            batch: Segments laid end to end.
            keep: Called by each lean layer with its number, keys and values (both [T, G, E]).
            at: [N] packed indices, each at most once, of the tokens that are wanted (lean layers
                only); all when None.
            apart: Compute each segment by the same calls as if it were alone (lean layers only).

        Returns:
            [T, D] (with ``at``: [N, D]) final hidden states, before the language-model head.
        """
        packing = Packing.of(batch, self.attention.value, self.torch_device, apart=apart)
        with self._around_layers(packing, shortened=at is not None):
            out = self.model.model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                # transformers hands a 4-D mask on as it is; packed kernels read `packing` instead,
                # so no [T, T] mask is ever built.
                attention_mask=packing.bounds_device.view(1, 1, 1, -1),
                use_cache=False,
                packing=packing,
                keep=keep,
                at=at,
            )
        hidden: Tensor = out.last_hidden_state.squeeze(0)
        return hidden

    def _around_layers(
        self, packing: Packing, *, shortened: bool
    ) -> contextlib.AbstractContextManager[None]:
        last = packing.rows_at if shortened else packing.rows
        if packing.rows is None or last is None or self.functions.by_row:
            return contextlib.nullcontext()
        from common.model.kernels.fused_layer import around_layers_by_part

        return around_layers_by_part(self.model.model, packing.rows, last)


def device_kind(requested: str) -> str:
    """Return ``auto``, ``cpu`` or ``cuda``.

    Raises:
        UserError: If ``train.device`` names something else.

    >>> device_kind("cuda:1")
    'cuda'
    """
    if requested != "auto" and not is_device(requested):
        raise SettingError(
            f"train.device={requested!r}",
            allowed="auto, cpu, cuda, cuda:N",
            fix="set train.device",
        )
    return requested.partition(":")[0]


def choose_device(requested: str) -> Choice[str]:
    """Choose the device.

    Args:
        requested: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        UserError: If a CUDA device is asked for that is not there.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if requested == "auto":
        if count:
            return Choice("cuda", f"{torch.cuda.get_device_name(0)} is there")
        return Choice("cpu", "no CUDA device")
    if device_kind(requested) == "cuda" and int(requested.partition(":")[2] or 0) >= count:
        raise SettingError(
            f"train.device={requested}: {count} CUDA device(s) here",
            fix="set train.device to auto or cpu",
        )
    return Choice(requested, "asked for")


def choose_dtype(requested: str, device: torch.device) -> Choice[str]:
    """Choose the backbone's arithmetic: bf16 where the processor computes in it, else fp32.

    Raises:
        UserError: If it is neither ``auto``, ``fp32`` nor ``bf16``.
    """
    if requested in DTYPES:
        return Choice(requested, ASKED)
    if requested != "auto":
        raise SettingError(
            f"train.dtype={requested!r}", allowed="auto, fp32, bf16", fix="set train.dtype"
        )
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Choice("bf16", GPU_HAS_BF16)
        return Choice("fp32", GPU_LACKS_BF16)
    able = torch.cpu.get_capabilities()
    if able.get("amx_tile"):
        return Choice("bf16", AMX)
    if able.get("avx512_bf16"):
        return Choice("bf16", AVX)
    return Choice("fp32", NEITHER)


def limit_primitive_cache() -> None:
    """Bound oneDNN's cache of compiled products, unless the user has.

    Packed batches have ever new lengths, and each length compiles its own products; unbounded
    (1,024 by default) they cost a worker about 15 MB a step. oneDNN reads these when first used.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, PRIMITIVES)


def early_destination(device: str, dtype: str, weights: str, kernels: str) -> Destination | None:
    """Say where ``open_session`` will want the weights, if they may be read there beforehand.

    What a CPU needs is mapped and not read.

    Args:
        device: As ``open_session`` takes it.
        dtype: Likewise.
        weights: Likewise.
        kernels: Likewise.

    Raises:
        UserError: If something asked for cannot be had here.
    """
    on = torch.device(choose_device(device).value)
    if on.type == "cpu":
        return None
    arithmetic = DTYPES[choose_dtype(dtype, on).value]
    chosen = choose_weights(weights, on, arithmetic).value, choose_kernels(kernels, on).value
    return Destination(device=on, dtype=arithmetic, quantiser=quantiser_of(*chosen))


def open_session(
    spec: BackboneSpec,
    adapter: AdapterSpec,
    *,
    device: str = "auto",
    dtype: str = "auto",
    attention: str = "auto",
    threads: int | None = None,
    recompute: str = "auto",
    batch_tokens: int = 0,
    kernels: str = "auto",
    weights: str = "bf16",
) -> Session:
    """Load a backbone and attach an adapter to it.

    Args:
        spec: From ``resolve_backbone``.
        adapter: What to attach.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: ``auto``, ``fp32`` or ``bf16``.
        attention: ``auto`` or one of ``attention.KERNELS``.
        threads: CPU threads of this process; None: torch's own, as far as they may be used.
        recompute: ``auto``, ``none``, ``mlp``, ``half`` or ``all``.
        batch_tokens: Longest packed batch, for the choice of what is recomputed; 0 when unknown.
        kernels: ``auto`` or one of ``kernels.CANDIDATES``.
        weights: One of ``frozen.WEIGHTS``.

    Raises:
        UserError: If something asked for cannot be had here.
    """
    limit_primitive_cache()
    # torch starts as many threads as the machine has cores, whatever a container or job may use.
    torch.set_num_threads(threads or min(torch.get_num_threads(), available_cpus()))
    device_choice = choose_device(device)
    on = torch.device(device_choice.value)
    dtype_choice = choose_dtype(dtype, on)
    arithmetic = DTYPES[dtype_choice.value]
    attention_choice = choose_attention(attention, on, arithmetic)
    kernels_choice = choose_kernels(kernels, on)
    weights_choice = choose_weights(weights, on, arithmetic)
    tokenizer = load_tokenizer(spec)
    quantiser = quantiser_of(weights_choice.value, kernels_choice.value)
    model = load_model(spec, device=on, dtype=arithmetic, quantiser=quantiser)
    model.set_attn_implementation(register())
    functions = kernels_named(kernels_choice.value)
    attached = attach(model, adapter)
    from common.model.kernels import fused_layer as lean

    recompute_choice = Choice("none", "this Llama's layers are transformers' own")
    if lean.supported(model):
        recompute_choice = choose_recompute(
            recompute,
            shape=spec.shape,
            adapter=adapter,
            value_bytes=arithmetic.itemsize,
            batch_tokens=batch_tokens,
            device=on,
        )
        lean.install(model, recompute_choice.value, functions)
    return Session(
        spec=spec,
        model=model,
        tokenizer=tokenizer,
        adapter=attached,
        device=device_choice,
        dtype=dtype_choice,
        attention=attention_choice,
        recompute=recompute_choice,
        kernels=kernels_choice,
        weights=weights_choice,
        functions=functions,
    )
