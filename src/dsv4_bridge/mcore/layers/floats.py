"""Parameters and buffers that stay float32 whatever the model is cast to.

megatron-core's Float16Module calls `module.bfloat16()`, which would round them.
"""

from collections.abc import Callable
from typing import Any

import torch


class KeepsFloat32(torch.nn.Module):
    """A module whose tensors named in `float32_names` follow it to other devices, not to other types."""

    float32_names: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        kept = set(self.float32_names)

        def guarded(tensor: torch.Tensor) -> torch.Tensor:
            changed = fn(tensor)
            return changed if changed.dtype == tensor.dtype else tensor.to(changed.device)

        params = {n: self._parameters.pop(n) for n in kept & set(self._parameters)}
        buffers = {n: self._buffers.pop(n) for n in kept & set(self._buffers)}
        super()._apply(fn, recurse)
        for param in params.values():
            if param is not None:
                with torch.no_grad():
                    param.data = guarded(param.data)
                    if param.grad is not None:
                        param.grad = guarded(param.grad)
        for name, buffer in buffers.items():
            buffers[name] = buffer if buffer is None else guarded(buffer)
        self._parameters.update(params)
        self._buffers.update(buffers)
        return self
