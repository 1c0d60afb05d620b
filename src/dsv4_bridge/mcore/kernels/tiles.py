"""What Triton kernels share."""

import torch
import triton
import triton.language as tl

from .choice import interpreted

# Triton's interpreter computes with numpy, which has no bfloat16: its products of such tiles are wrong.
WIDEN = tl.constexpr(interpreted())


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block may have; an H100's where there is no card."""
    if device.type != "cuda":
        return 227 << 10
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)


@triton.jit
def dot(a, b):
    """The product of two tiles in float32; float32 tiles are multiplied as such, not as TF32."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")
