"""Manifold-constrained hyper-connections: several residual streams, mixed around every sub-layer.

Streams are [s, b, n*h], stream-major; n streams of width h. The mathematics is transformers'
DeepseekV4HyperConnection: eps inside the root, the mixing matrix used transposed,
weights computed and applied in float32.
"""

import torch
from torch import Tensor

from ..config import DeepSeekV4Config
from ..kernels.streams import MixRule, collapse, expand, mix, project
from .basics import mark_sequence_parallel, new_parameter
from .floats import KeepsFloat32

# The operations on whole streams are bound by memory, so each makes few passes and, in the backward, one gradient
# of the streams; autograd by single operations makes eleven copies of them.


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
        config = self.config
        rule = MixRule(config.layernorm_epsilon, config.mhc_eps, config.mhc_sinkhorn_iterations)
        alphas = self.alpha_pre, self.alpha_post, self.alpha_res
        return mix(streams, self.mapping_proj.weight, self.bias, alphas, rule, config.kernel_choice)

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
        apart = streams.unflatten(-1, (self.n, -1))
        return expand(output, apart, post.to(dtype), mix.to(dtype), self.config.kernel_choice).flatten(-2)


class _Mapping(KeepsFloat32):
    float32_names = ("weight",)

    def __init__(self, shape: tuple[int, int], config: DeepSeekV4Config):
        super().__init__()
        self.weight = new_parameter(shape, config, torch.float32)
        if config.perform_initialization and config.init_method is not None:
            config.init_method(self.weight)


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
    by = config.kernel_choice
    mapped = project(streams, fn, config.layernorm_epsilon, by)
    return collapse(streams, torch.sigmoid(mapped * scale + base) + config.mhc_eps, by)
