"""transformers: the class of a Llama's layers, which only its module names.

Seen alike in 5.17.0 and 5.24.0.
"""

from transformers.models.llama.modeling_llama import LlamaDecoderLayer
