"""A tiny random Llama and its tokenizer, built in code: the same on every machine, in a second.

It knows nothing; it exists so that the whole way of the data can be driven without a download.
"""

import hashlib
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from common.model.backbone.skeleton import shaped_like
from common.seeds import torch_stream

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONFIG: Any = SimpleNamespace(
    vocab_size=1024,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    hidden_act="silu",
    attention_bias=False,
    mlp_bias=False,
    max_position_embeddings=4096,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=1,
)
"""2 layers, width 64, grouped-query attention, as fields of transformers' LlamaConfig."""

START, END = "<|im_start|>", "<|im_end|>"
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_TOKENS = {
    "bos_token": START,
    "eos_token": END,
    "pad_token": END,
    "chat_template": _CHAT_TEMPLATE,
}
# Frequent strings of prompts and drug lists; what is not here is spelled in bytes.
_WORDS = (
    "system user assistant Sex Age Height Weight BMI Diagnoses Drugs unknown kg cm List the drugs "
    "for this hospital stay one a line Sodium Chloride Potassium Magnesium Calcium Sulfate "
    "Phosphate Acetaminophen Heparin Insulin Furosemide Metoprolol Lisinopril Aspirin Docusate "
    "Senna Bisacodyl Pantoprazole Omeprazole Ondansetron Morphine Hydromorphone Oxycodone "
    "Vancomycin Cefepime Ceftriaxone Piperacillin Levofloxacin Metronidazole Warfarin Atorvastatin "
    "Simvastatin Gabapentin Lorazepam Haloperidol Prednisone Albuterol Ipratropium Levothyroxine "
    "Tartrate Succinate Hydrochloride Acute Chronic unspecified kidney disease failure heart "
    "atrial fibrillation hypertension hyperlipidemia diabetes mellitus without complication type "
    "essential primary long term current use of personal history sepsis pneumonia anemia urinary "
    "tract infection respiratory with hypoxia organism other disorder syndrome and or in to due "
    "coronary artery native depressive episode tobacco esophageal reflux hypothyroidism asthma"
)


def tiny_config() -> "LlamaConfig":
    """Return the tiny Llama's configuration, as transformers' own."""
    from transformers import LlamaConfig

    return LlamaConfig(**vars(CONFIG))


def tiny_weights() -> dict[str, Tensor]:
    """Draw the tiny Llama's weights, in fp32 on the CPU, from a named stream."""
    generator = torch_stream(0, "tiny-backbone")
    weights = {}
    # A head of its own is drawn too, which the tie then drops.
    for name, meta in sorted(shaped_like(CONFIG).named_parameters(remove_duplicate=False)):
        if meta.ndim == 1:
            weights[name] = torch.ones(meta.shape)
        else:
            # Wider than Llama's 0.02, so that the attention of an untrained model is not flat.
            deviation = 0.08 if "embed" in name else 1.0 / meta.shape[1] ** 0.5
            weights[name] = torch.empty(meta.shape).normal_(0.0, deviation, generator=generator)
    return weights


def tiny_model() -> "LlamaForCausalLM":
    """Build the tiny Llama in fp32 on the CPU."""
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(tiny_config())
    model.load_state_dict(tiny_weights(), strict=False, assign=True)
    model.tie_weights()
    # Buffers are not among the weights: build the rotary frequencies anew on the CPU.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    return model.eval()


def tiny_tokenizer() -> "PreTrainedTokenizerFast":
    """Build a byte-level BPE with a chat template; as in SmolLM2, pad and end are one token."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=_byte_pairs(), **_TOKENS)


def tiny_facts() -> dict[str, Any]:
    """Return what decides what the tiny backbone computes; transformers is not asked."""
    weights = hashlib.sha256()
    for name, tensor in tiny_weights().items():
        weights.update(name.encode())
        weights.update(tensor.numpy().tobytes())
    tokenizer = {**_TOKENS, "model": hashlib.sha256(_byte_pairs().to_str().encode()).hexdigest()}
    return {"config": vars(CONFIG), "weights": weights.hexdigest(), "tokenizer": tokenizer}


def _byte_pairs() -> "Tokenizer":
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    words = _WORDS.split()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG.vocab_size,
        special_tokens=[AddedToken(START, special=True), AddedToken(END, special=True)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator([*words, *(" " + word for word in words)], trainer)
    return core
