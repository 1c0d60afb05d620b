"""What stands in front of a sub-layer, for the few tokens of a step of decoding: compiled for the CPU, no gradients.

By torch it takes sixty operations on tensors of a few numbers, or two hundred with the released twenty iterations
of Sinkhorn: a fourth of a small model's step. Here it is one call. Sums over channels are float32 in an order of the
compiler's, what the numbers of a token go through is float64; results are as near to the formula as torch's.
"""

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...codec._kernels import kernel

if TYPE_CHECKING:
    from .streams import MixRule


# As torch has it: a division by zero is inf or NaN. Sums may be cut into vectors.
@kernel(error_model="numpy", fastmath={"reassoc", "nsz", "contract"})
def _mix(  # type: ignore[no-untyped-def]
    streams, weight, bias, pre, post, res, norm_eps, eps, iterations, collapsed, posts, mixing
) -> None:
    tokens, n = posts.shape
    width = streams.shape[1]
    channels = width // n
    mapped = np.empty(len(bias), np.float64)
    matrix = np.empty((n, n), np.float64)
    for t in range(tokens):
        row = streams[t]
        square = np.float32(0)
        for c in range(width):
            square += row[c] * row[c]
        inverse = 1.0 / math.sqrt(square / width + norm_eps)
        for j in range(len(bias)):
            dot = np.float32(0)
            for c in range(width):
                dot += row[c] * weight[j, c]
            alpha = pre[0] if j < n else post[0] if j < 2 * n else res[0]
            mapped[j] = dot * inverse * alpha + bias[j]
        for c in range(channels):
            collapsed[t, c] = 0
        for i in range(n):
            share = np.float32(1.0 / (1.0 + math.exp(-mapped[i])) + eps)
            for c in range(channels):
                collapsed[t, c] += share * row[i * channels + c]
            posts[t, i] = 2.0 / (1.0 + math.exp(-mapped[n + i]))
        for i in range(n):
            top = mapped[(2 + i) * n]
            for j in range(n):
                top = max(top, mapped[(2 + i) * n + j])
            total = 0.0
            for j in range(n):
                matrix[i, j] = math.exp(mapped[(2 + i) * n + j] - top)
                total += matrix[i, j]
            for j in range(n):
                matrix[i, j] = matrix[i, j] / total + eps
        for half in range(2 * iterations - 1):  # columns, then rows and columns in turn
            for i in range(n):
                total = eps
                for j in range(n):
                    total += matrix[i, j] if half % 2 else matrix[j, i]
                for j in range(n):
                    if half % 2:
                        matrix[i, j] /= total
                    else:
                        matrix[j, i] /= total
        for i in range(n):
            for j in range(n):
                mixing[t, i, j] = matrix[i, j]


def mix(
    streams: Tensor, weight: Tensor, bias: Tensor, alphas: tuple[Tensor, Tensor, Tensor], n: int, rule: "MixRule"
) -> tuple[Tensor, Tensor, Tensor]:
    """`streams.mix` of float32 or bfloat16 on the CPU; arguments and results as there, n streams."""
    shape = streams.shape[:-1]
    tokens, width = shape.numel(), streams.shape[-1]
    collapsed = torch.empty((tokens, width // n))
    post, mixing = torch.empty((*shape, n)), torch.empty((*shape, n, n))
    _mix(
        _array(streams.float().reshape(tokens, width)),
        *(_array(t) for t in (weight, bias, *alphas)),
        *rule,
        collapsed.numpy(),
        post.view(tokens, n).numpy(),
        mixing.view(tokens, n, n).numpy(),
    )
    return collapsed.view(*shape, -1).to(streams.dtype), post, mixing


def _array(tensor: Tensor) -> Any:
    return tensor.detach().contiguous().numpy()
