"""Which kernel computes a function: the torch definition, Triton's beside it, or one for few tokens on a CPU."""

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import BridgeError

KERNELS = ("auto", "torch", "triton")
_TYPES = (torch.float32, torch.bfloat16)
# Tokens up to which a compiled loop over them is taken. Measured on one thread, it beats torch's many operations
# 7 times at one token, and they are even at 32 tokens of the released width, at 200 of a small one.
_FEW = 16
# Blocks from which the indexer's choice goes by a compiled loop over them: those of 64 thousand tokens.
_LONG = 1 << 14


@dataclass(frozen=True)
class Choice:
    """How kernels are chosen.

    Attributes:
        kernels: `torch`: the definitions; `auto`: Triton where all tensors lie on a CUDA device in float32 or
            bfloat16, and what is compiled for few tokens or very many blocks on a CPU; `triton`: always, on the CPU by
            Triton's interpreter.
        deterministic: Triton's backwards add up in a fixed order, which costs time.
    """

    kernels: str = "auto"
    deterministic: bool = False

    def fused(self, *tensors: Tensor | None) -> bool:
        """Whether Triton computes what is asked of these tensors; None and those that hold no floats do not count.

        Raises:
            BridgeError: `triton`, of tensors for which there is no kernel.
        """
        if self.kernels not in ("auto", "triton"):
            return False
        if self.kernels == "auto" and not any(t is not None and t.is_cuda for t in tensors):
            return False
        floats = [t for t in tensors if t is not None and t.is_floating_point()]
        typed = all(t.dtype in _TYPES for t in floats)
        if self.kernels == "auto":
            return typed and all(t.is_cuda for t in floats)
        if not typed or not (interpreted() or all(t.is_cuda for t in floats)):
            met = ", ".join(sorted({f"{str(t.dtype).removeprefix('torch.')} on {t.device.type}" for t in floats}))
            raise BridgeError(
                "choosing a kernel: kernels='triton' computes float32 and bfloat16 on a CUDA device, or by Triton's "
                f"interpreter (TRITON_INTERPRET=1 in the environment), and came to {met}; kernels='auto' takes torch "
                "there"
            )
        return True

    def few(self, tokens: Tensor, *others: Tensor) -> bool:
        """Whether a kernel for few tokens on a CPU computes [s, b, width] of them, where nobody asks for gradients."""
        return (
            self.kernels == "auto"
            and not torch.is_grad_enabled()
            and tokens.numel() <= _FEW * tokens.shape[-1]
            and tokens.dtype in _TYPES
            and all(t.dtype is torch.float32 for t in others)
            and all(t.device.type == "cpu" for t in (tokens, *others))
        )

    def long(self, blocks: int, *tensors: Tensor) -> bool:
        """Whether the kernel for very many blocks on a CPU chooses among so many of them."""
        narrow = all(t.dtype in _TYPES and t.device.type == "cpu" for t in tensors)
        return self.kernels == "auto" and blocks >= _LONG and narrow


AUTO = Choice()


def interpreted() -> bool:
    """Whether Triton's interpreter stands in for a GPU: the variable that it reads when it is imported."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
