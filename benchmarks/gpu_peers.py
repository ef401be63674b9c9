"""What others run on the same card: transformers + PEFT, with Liger's kernels, and ``generate``.

Each function takes a random Llama from `gpu_paper_run.py` and returns a step or a call to time.
"""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import peft
import torch

from common.text.batches import Encoded

IGNORED = -100
PEERS = {
    "peft, checkpointing": (False, True),
    "peft": (False, False),
    "peft + liger, checkpointing": (True, True),
    "peft + liger": (True, False),
}
"""Name -> (Liger's kernels, gradient checkpointing); Liger patches transformers, so it is last."""


def has_liger() -> bool:
    """Say whether liger-kernel can be imported."""
    return importlib.util.find_spec("liger_kernel") is not None


def padded(data: Sequence[Encoded], device: torch.device) -> dict[str, torch.Tensor]:
    """Lay samples side by side, padded to the longest, with labels on the answers."""
    longest = max(len(one.input_ids) for one in data)
    ids = torch.zeros(len(data), longest, dtype=torch.int64)
    labels, mask = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
    for row, one in enumerate(data):
        tokens = torch.tensor(one.input_ids)
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
        labels[row, one.answer_start : len(tokens)] = tokens[one.answer_start :]
    batch = {"input_ids": ids, "labels": labels}
    if not bool(mask.all()):
        batch["attention_mask"] = mask
    return {name: tensor.to(device) for name, tensor in batch.items()}


def lora_step(model: Any, rank: int, *, liger: bool, checkpointing: bool) -> Callable[..., None]:
    """Return PEFT's step on a padded batch: forward, backward, SGD.

    Args:
        model: A random Llama; it is changed.
        rank: Of LoRA, on q and v.
        liger: Patch the model with liger-kernel.
        checkpointing: As recipes for 48 GB cards have it.
    """
    if liger and next(model.parameters()).is_cuda:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(model=model)
    model.set_attn_implementation("sdpa")
    lora = peft.LoraConfig(r=rank, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    wrapped = peft.get_peft_model(model, lora, autocast_adapter_dtype=False)
    if checkpointing:
        wrapped.gradient_checkpointing_enable({"use_reentrant": False})
        wrapped.enable_input_require_grads()
    wrapped.train()
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-3)

    def step(batch: dict[str, torch.Tensor]) -> None:
        optimizer.zero_grad()
        wrapped(**batch, use_cache=False).loss.backward()
        optimizer.step()

    return step


def answer(model: Any, prompts: Sequence[Sequence[int]], tokens: int) -> None:
    """Greedy ``generate`` on one left-padded batch, to a fixed number of tokens."""
    device = next(model.parameters()).device
    longest = max(map(len, prompts))
    rows = [[0] * (longest - len(one)) + list(one) for one in prompts]
    masks = [[0] * (longest - len(one)) + [1] * len(one) for one in prompts]
    with torch.inference_mode():
        model.generate(
            torch.tensor(rows, device=device),
            attention_mask=torch.tensor(masks, device=device),
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=1,
        )
