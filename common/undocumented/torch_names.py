"""torch: operators that have no documented Python name.

Seen alike in 2.11.0, 2.13.0 and 2.14.1. Without the flash pair there is no log-sum-exp of a CPU
attention; without ``silu_backward`` the gradient of a gate takes three more passes. The CUDA pair
is what ``varlen_attn`` and SDPA call, without their limits on heads and their cost on the host;
it and ``scaled_mm``, the product of fp8 values with scales for rows, were tried on an H200 under
2.11.0.
"""

import torch

flash_attention_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
silu_backward = torch.ops.aten.silu_backward
flash_attention_cuda = torch.ops.aten._flash_attention_forward
cudnn_attention = torch.ops.aten._scaled_dot_product_cudnn_attention
scaled_mm = torch._scaled_mm
