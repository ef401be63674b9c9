"""bitsandbytes, imported without what its CPU backend does on import.

On a processor with AVX-512 it asks a package ``kernels``, where there is one, to fetch compiled
code from the Hugging Face hub, and logs that there is none. We ask for 4-bit blocks and back, which
it brings itself. Seen in 0.50.2.
"""

import functools
import logging
import sys
from typing import Any


@functools.cache
def blockwise() -> Any:
    """Return ``bitsandbytes.functional``: ``quantize_4bit`` and ``dequantize_4bit``.

    Raises:
        ImportError: If bitsandbytes is not installed.
    """
    noisy, modules = logging.getLogger("bitsandbytes.backends.cpu.ops"), vars(sys)["modules"]
    level, there = noisy.level, "kernels" in modules
    noisy.setLevel(logging.CRITICAL)
    try:
        modules.setdefault("kernels", None)  # which makes its import fail
        from bitsandbytes import functional
    finally:
        noisy.setLevel(level)
        if not there:
            del modules["kernels"]
    return functional
