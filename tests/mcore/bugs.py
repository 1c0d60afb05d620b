"""Mistakes to put back into the package for the length of a test; `traps.py` names them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pytest import MonkeyPatch
from torch.nn import functional as F

from dsv4_bridge.mcore.layers import block, moe, mtp
from dsv4_bridge.mcore.layers.basics import RMSNorm
from dsv4_bridge.mcore.layers.moe import BiasRouter, HashRouter
from dsv4_bridge.spec.table import ROWS

Bug = Callable[[MonkeyPatch], None]
Make = Callable[[Callable], Callable]


@dataclass(frozen=True)
class Trap:
    """Number and title, the check, and bugs by name."""

    number: int
    title: str
    check: Callable[[], None]
    bugs: dict[str, Bug]


def put(where: Any, name: str, make: Make) -> Bug:
    """A bug that puts `make(original)` in the original's place."""

    def bug(patch: MonkeyPatch) -> None:
        patch.setattr(where, name, make(getattr(where, name)))

    return bug


def clamp_off(forward: Callable) -> Callable:
    def unclamped(self: Any, *args: Any, **kwargs: Any) -> Any:
        limit, self.config.activation_func_clamp_value = self.config.activation_func_clamp_value, None
        try:
            return forward(self, *args, **kwargs)
        finally:
            self.config.activation_func_clamp_value = limit

    return unclamped


def clamp_behind(forward: Callable) -> Callable:
    """The gate is clamped behind silu instead of in front of it."""

    def late(self: Any, *args: Any, **kwargs: Any) -> Any:
        limit, silu = self.config.activation_func_clamp_value, self.config.activation_func
        self.config.activation_func = lambda x: silu(x).clamp(max=limit)
        try:
            return clamp_off(forward)(self, *args, **kwargs)
        finally:
            self.config.activation_func = silu

    return late


def weight_behind(forward: Callable) -> Callable:
    """The routing weight multiplies an expert's output."""

    def late(self: Any, x: torch.Tensor, counts: torch.Tensor, weight: torch.Tensor) -> Any:
        out, bias = forward(self, x, counts, torch.ones_like(weight))
        return out * weight.unsqueeze(-1), bias

    return late


def weights_from_biased_scores(patch: MonkeyPatch) -> None:
    route, choose = moe.topk_routing_with_score_function, BiasRouter.choose
    biases = []

    def noting(self: BiasRouter, *args: Any) -> torch.Tensor:
        biases.append(self.expert_bias)
        return choose(self, *args)

    def biased(logits: torch.Tensor, topk: int, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        weights, chosen = route(logits, topk, **kwargs)
        if not biases:
            return weights, chosen
        scores = F.softplus(logits).sqrt() + biases.pop()
        scores = scores.gather(1, chosen) if kwargs["dense_output"] else scores * chosen
        return scores / scores.sum(-1, keepdim=True) * kwargs["scaling_factor"], chosen

    patch.setattr(BiasRouter, "choose", noting)
    patch.setattr(moe, "topk_routing_with_score_function", biased)


def ids_kept_on_a_module(patch: MonkeyPatch) -> None:
    """The hash router reads the ids that the last forward pass left behind."""
    kept: dict[str, Any] = {}
    forward, choose = block.HyperConnectedBlock.forward, HashRouter.choose

    def keep(self: Any, hidden: Any, rotary: Any, input_ids: Any = None, *rest: Any) -> Any:
        kept["ids"] = input_ids
        return forward(self, hidden, rotary, input_ids, *rest)

    patch.setattr(block.HyperConnectedBlock, "forward", keep)
    patch.setattr(HashRouter, "choose", lambda self, logits, ids: choose(self, logits, kept["ids"]))


def stored_through_bf16(store: Callable) -> Callable:
    def rounded(into: torch.Tensor, values: torch.Tensor, *rest: Any) -> None:
        store(into, values if values.is_floating_point() else values.bfloat16().to(values.dtype), *rest)

    return rounded


def no_integers_stored(store: Callable) -> Callable:
    return lambda into, values, *rest: store(into, values, *rest) if values.is_floating_point() else None


def swapped(a: str, b: str) -> Make:
    """The tensors of two rows go to each other's place, in layers that have both."""
    names = {row.key: row.megatron for row in ROWS if row.key in (a, b)}

    def make(live_names: Callable) -> Callable:
        def swapping(item: Any, *rest: Any) -> Any:
            found, other = live_names(item, *rest), {a: b, b: a}.get(item.row.key)
            if other is None or item.block.ratio != 4:
                return found
            return tuple(name.replace(str(names[item.row.key]), str(names[other])) for name in found)

        return swapping

    return make


def alphas_reversed(live_names: Callable) -> Callable:
    def reverse(item: Any, *rest: Any) -> Any:
        found = live_names(item, *rest)
        return found[::-1] if len(found) == 3 else found

    return reverse


def ratios_swapped(init: Callable) -> Callable:
    """4 is taken for 128, and 128 for 4."""
    return lambda self, config, ratio, *rest, **more: init(self, config, {4: 128, 128: 4}.get(ratio, 0), *rest, **more)


def hadamard_on_queries(queries: Callable) -> Callable:
    def rotated(self: Any, *args: Any) -> torch.Tensor:
        matrix = torch.ones(1, 1)
        while len(matrix) < self.width:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        return queries(self, *args) @ matrix * self.width**-0.5

    return rotated


def heads_interleaved(by_group: Callable) -> Callable:
    """Group g gets heads g, g + groups, … instead of neighbours."""

    def interleaved(self: Any, out: torch.Tensor) -> torch.Tensor:
        return by_group(self, out.unflatten(2, (-1, self.groups)).transpose(2, 3).flatten(2, 3))

    return interleaved


def norm_with_eps(eps: float) -> Make:
    def forward(self: RMSNorm, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), eps).to(x.dtype)

    return lambda _: forward


def an_entry_an_expert(sharded: Callable) -> Callable:
    """megatron's other form, `singleton_local_shards`."""

    def singletons(self: Any, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> Any:
        return sharded(self, prefix, sharded_offsets, (metadata or {}) | {"singleton_local_shards": True})

    return singletons


def default_ratios(make: Callable) -> Callable:
    """The schedule that transformers takes where a config names none."""

    def made(**fields: Any) -> Any:
        count = len(fields["csa_compress_ratios"])
        return make(**fields | {"csa_compress_ratios": (128, 128, *(128, 4) * count)[:count]})

    return made


def mtp_not_loaded(find: Callable) -> Callable:
    def partial(model: Any) -> Any:
        plan, found = find(model)
        return plan, {name: here for name, here in found.items() if not name.startswith("mtp.")}

    return partial


def mean_of_streams(streams: torch.Tensor, *head: Any) -> torch.Tensor:
    """In place of the learned head."""
    return streams.unflatten(-1, (head[-1].num_residual_streams, -1)).mean(-2)


def contracted_streams(forward: Callable) -> Callable:
    """Multi-token prediction starts from one stream, repeated."""

    def contracted(self: mtp.MTPLayer, streams: torch.Tensor, *rest: Any) -> Any:
        one = mean_of_streams(streams, self.config)
        return forward(self, one.repeat(1, 1, self.config.num_residual_streams), *rest)

    return contracted


class _Wide(torch.nn.Module):
    """A linear that is handed streams as [s, b, n, h]."""

    def __init__(self, linear: torch.nn.Module, n: int):
        super().__init__()
        self.linear, self.n = linear, n

    def forward(self, x: torch.Tensor) -> Any:
        out, bias = self.linear(x.unflatten(1, (-1, self.n)))
        return out.flatten(1, 2), bias


def streams_in_four_dimensions(forward: Callable) -> Callable:
    def wide(self: mtp.MTPLayer, *args: Any) -> Any:
        linear = self.h_proj
        self.h_proj = _Wide(linear, self.config.num_residual_streams)
        try:
            return forward(self, *args)
        finally:
            self.h_proj = linear

    return wide


def streams_contracted_between_stages(forward: Callable) -> Callable:
    def contracted(self: Any, *args: Any, **kwargs: Any) -> Any:
        hidden, streams = forward(self, *args, **kwargs)
        return hidden, streams if hidden is not None else mean_of_streams(streams, self.config)

    return contracted
