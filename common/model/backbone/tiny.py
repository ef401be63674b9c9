"""A tiny random Llama and its tokenizer, built in code: the same on every machine, in a second.

It knows nothing; it exists so that the whole way of the data can be driven without a download.
"""

from typing import TYPE_CHECKING

import torch

from common.seeds import torch_stream

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

START, END = "<|im_start|>", "<|im_end|>"
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
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
    """Return the tiny Llama's shape: 2 layers, width 64, grouped-query attention."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=1024,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def tiny_model() -> "LlamaForCausalLM":
    """Build the tiny Llama in fp32 on the CPU; its weights come from a named stream."""
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(tiny_config())
    model = model.to_empty(device="cpu")
    generator = torch_stream(0, "tiny-backbone")
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                # Wider than Llama's 0.02, so that the attention of an untrained model is not flat.
                deviation = 0.08 if "embed" in name else 1.0 / parameter.shape[1] ** 0.5
                parameter.normal_(0.0, deviation, generator=generator)
    # to_empty leaves buffers unset: build the rotary frequencies anew on the CPU.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    model.tie_weights()
    return model.eval()


def tiny_tokenizer() -> "PreTrainedTokenizerFast":
    """Build a byte-level BPE with a chat template; as in SmolLM2, pad and end are one token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    words = _WORDS.split()
    trainer = trainers.BpeTrainer(
        vocab_size=tiny_config().vocab_size,
        special_tokens=[AddedToken(START, special=True), AddedToken(END, special=True)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator([*words, *(" " + word for word in words)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        chat_template=_CHAT_TEMPLATE,
    )
