"""Manifold-constrained hyper-connections: several residual streams, mixed around every sub-layer.

Streams are [s, b, n*h], stream-major; n streams of width h. The mathematics is transformers'
DeepseekV4HyperConnection: eps inside the root (trap 3), the mixing matrix used transposed (trap 1),
weights computed and applied in float32.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..config import DeepSeekV4Config
from .basics import inverse_rms, mark_sequence_parallel, new_parameter
from .floats import KeepsFloat32


class _Sinkhorn(torch.autograd.Function):
    """Alternate column and row normalisation; the backward repeats the forward instead of storing it.

    Computed as [n, n, tokens]: sums over four numbers that lie next to each other are no work for a
    vector unit (measured 3 to 7 times slower).
    """

    @staticmethod
    def forward(ctx, start: Tensor, iterations: int, eps: float) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(start)
        ctx.iterations, ctx.eps = iterations, eps
        matrix = _tokens_last(start)
        for axis in _axes(iterations):
            matrix.div_(matrix.sum(axis, keepdim=True).add_(eps))
        return _tokens_first(matrix, start.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (start,) = ctx.saved_tensors
        matrix = _tokens_last(start)
        steps = []
        for axis in _axes(ctx.iterations):
            total = matrix.sum(axis, keepdim=True).add_(ctx.eps)
            matrix = matrix / total
            steps.append((axis, matrix, total))
        pull = _tokens_last(grad)
        for axis, normalised, total in reversed(steps):
            pull.sub_((pull * normalised).sum(axis, keepdim=True)).div_(total)
        return _tokens_first(pull, start.shape), None, None


def _tokens_last(matrices: Tensor) -> Tensor:
    """[…, n, n] -> a new [n, n, tokens]."""
    return matrices.reshape(-1, *matrices.shape[-2:]).permute(1, 2, 0).clone(memory_format=torch.contiguous_format)


def _tokens_first(matrices: Tensor, shape: torch.Size) -> Tensor:
    # Contiguous, for a batched product clones strided matrices one by one.
    return matrices.permute(2, 0, 1).reshape(shape).contiguous()


def _axes(iterations: int) -> list[int]:
    return [0] + [1, 0] * (iterations - 1)


def sinkhorn(start: Tensor, iterations: int, eps: float) -> Tensor:
    """Make a positive matrix nearly doubly stochastic: columns, then (iterations - 1) times rows and columns.

    Args:
        start: […, n, n] float32, positive.
        iterations: 20 in the released models.
        eps: added to every sum.
    """
    result = _Sinkhorn.apply(start, iterations, eps)
    assert isinstance(result, Tensor)
    return result


# The three operations on whole streams. They are bound by memory, so each makes one pass and, in the
# backward, one gradient of the streams; autograd by single operations makes eleven copies of them.


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx, streams: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        inverse = inverse_rms(streams, eps)
        # The projection is linear: scaling its few outputs costs less than scaling its input.
        mapped = F.linear(streams.to(weight.dtype), weight).mul_(inverse)
        ctx.save_for_backward(streams, weight, inverse, mapped)
        return mapped

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        streams, weight, inverse, mapped = (t.flatten(0, -2) if t.dim() > 2 else t for t in ctx.saved_tensors)
        grad = grad.reshape(mapped.shape)
        wide, scaled = streams.to(weight.dtype), grad * inverse
        shrink = (grad * mapped).sum(-1, keepdim=True) * inverse.square() / -streams.shape[-1]
        grad_streams = (wide * shrink).addmm_(scaled, weight)
        return grad_streams.to(streams.dtype).view(ctx.saved_tensors[0].shape), scaled.mT @ wide, None


def project(streams: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normed streams times weight^T: [s, b, n*h], [m, n*h] float32 -> [s, b, m] float32."""
    result = _Project.apply(streams, weight, eps)
    assert isinstance(result, Tensor)
    return result


class _Collapse(torch.autograd.Function):
    """[…, n, h], [..., n] -> […, h]."""

    @staticmethod
    def forward(ctx, streams: Tensor, weights: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(streams, weights)
        return torch.matmul(weights.unsqueeze(-2), streams.to(weights.dtype)).squeeze(-2).to(streams.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        streams, weights = ctx.saved_tensors
        grad = grad.to(weights.dtype)
        grad_streams = (weights.unsqueeze(-1) * grad.unsqueeze(-2)).to(streams.dtype)
        return grad_streams, _dots(streams, grad)


class _Expand(torch.autograd.Function):
    """[…, h], [..., n, h], [..., n], [..., n, n] -> […, n, h]; see HyperConnection.expand."""

    @staticmethod
    def forward(ctx, output: Tensor, streams: Tensor, post: Tensor, mix: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(output, streams, post, mix)
        mixed = torch.matmul(mix.mT.contiguous(), streams)
        return mixed.addcmul_(post.unsqueeze(-1), output.unsqueeze(-2))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        output, streams, post, mix = ctx.saved_tensors
        grad_output = torch.matmul(post.unsqueeze(-2), grad).squeeze(-2)
        grad_mix = torch.matmul(streams, grad.mT)
        return grad_output, torch.matmul(mix, grad), _dots(grad, output), grad_mix


def _dots(streams: Tensor, x: Tensor) -> Tensor:
    """Dot of each stream with x: […, n, h], […, h] -> […, n] in x's type; a stream at a time, to stay small."""
    return torch.stack([(stream * x).sum(-1) for stream in streams.unbind(-2)], -1)


class HyperConnection(KeepsFloat32):
    """The mixing around one sub-layer.

    `mapping_proj.weight` [n*n+2n, n*h], `bias` [n*n+2n] and the three `alpha_*` [1] are float32: the
    released `hc_*_fn`, `hc_*_base` and the three numbers of `hc_*_scale`.
    """

    float32_names = ("bias", "alpha_pre", "alpha_post", "alpha_res")

    def __init__(self, config: DeepSeekV4Config):
        super().__init__()
        self.config = config
        self.n = config.num_residual_streams
        size = self.n * (self.n + 2)
        self.mapping_proj = _Mapping((size, self.n * config.hidden_size), config)
        self.bias = new_parameter((size,), config, torch.float32)
        self.alpha_pre = new_parameter((1,), config, torch.float32)
        self.alpha_post = new_parameter((1,), config, torch.float32)
        self.alpha_res = new_parameter((1,), config, torch.float32)
        torch.nn.init.zeros_(self.bias)
        for alpha in (self.alpha_pre, self.alpha_post, self.alpha_res):
            torch.nn.init.ones_(alpha)
        mark_sequence_parallel(config, *self.parameters())

    def forward(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Collapse the streams for a sub-layer.

        Args:
            streams: [s, b, n*h].

        Returns:
            The sub-layer's input [s, b, h], and what `expand` needs: post [s, b, n] and mixing
            matrix [s, b, n, n], both float32.
        """
        n, eps = self.n, self.config.mhc_eps
        mapped = project(streams, self.mapping_proj.weight, self.config.layernorm_epsilon)
        pre, post, mix = mapped.split([n, n, n * n], dim=-1)
        bias_pre, bias_post, bias_mix = self.bias.split([n, n, n * n])
        pre = torch.sigmoid(pre * self.alpha_pre + bias_pre) + eps
        post = 2 * torch.sigmoid(post * self.alpha_post + bias_post)
        mix = torch.softmax((mix * self.alpha_res + bias_mix).unflatten(-1, (n, n)), dim=-1) + eps
        return collapse(streams, pre), post, sinkhorn(mix, self.config.mhc_sinkhorn_iterations, eps)

    def expand(self, output: Tensor, streams: Tensor, post: Tensor, mix: Tensor) -> Tensor:
        """Write a sub-layer's output back: stream j = post[j] * output + sum over i of mix[i, j] * stream i.

        Args:
            output: [s, b, h].
            streams: [s, b, n*h], as `forward` got them.
            post: [s, b, n].
            mix: [s, b, n, n].

        Returns:
            [s, b, n*h].
        """
        dtype = streams.dtype
        result = _Expand.apply(output, streams.unflatten(-1, (self.n, -1)), post.to(dtype), mix.to(dtype))
        assert isinstance(result, Tensor)
        return result.flatten(-2)


class _Mapping(KeepsFloat32):
    float32_names = ("weight",)

    def __init__(self, shape: tuple[int, int], config: DeepSeekV4Config):
        super().__init__()
        self.weight = new_parameter(shape, config, torch.float32)
        if config.perform_initialization and config.init_method is not None:
            config.init_method(self.weight)


def collapse(streams: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of the streams, in float32: [s, b, n*h], [s, b, n] -> [s, b, h] in the streams' type."""
    result = _Collapse.apply(streams.unflatten(-1, (weights.shape[-1], -1)), weights)
    assert isinstance(result, Tensor)
    return result


def new_head(module: torch.nn.Module, config: DeepSeekV4Config) -> None:
    """Give `module` the three parameters of the learned head: hc_head_fn [n, n*h], _base [n], _scale [1]."""
    n = config.num_residual_streams
    module.hc_head_fn = new_parameter((n, n * config.hidden_size), config, torch.float32)
    module.hc_head_base = new_parameter((n,), config, torch.float32)
    module.hc_head_scale = new_parameter((1,), config, torch.float32)
    if config.perform_initialization and config.init_method is not None:
        config.init_method(module.hc_head_fn)
    torch.nn.init.zeros_(module.hc_head_base)
    torch.nn.init.ones_(module.hc_head_scale)
    mark_sequence_parallel(config, module.hc_head_fn, module.hc_head_base, module.hc_head_scale)


HEAD_NAMES = ("hc_head_fn", "hc_head_base", "hc_head_scale")


def collapse_by_head(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, config: DeepSeekV4Config) -> Tensor:
    """The learned head: [s, b, n*h] -> [s, b, h] (transformers' DeepseekV4HyperHead)."""
    mapped = project(streams, fn, config.layernorm_epsilon)
    return collapse(streams, torch.sigmoid(mapped * scale + base) + config.mhc_eps)
