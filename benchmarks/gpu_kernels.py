"""Every public kernel function with inputs of its real sizes, and what it has to compute and to move at least.

A table for `gpu.py`, which times them, and `compile_kernels.py`, which runs them on the device of shapes ("meta") to
see what they launch. Operations are products of matrices, two FLOPs a multiply-add, over the keys that a query sees;
bytes are inputs read once and outputs written once, gradients too where the backward runs.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv4_bridge.mcore.kernels.attention import Reach
from dsv4_bridge.mcore.kernels.choice import Choice
from dsv4_bridge.mcore.kernels.index import IndexTerms
from dsv4_bridge.spec.flops import block_pairs, window_pairs
from dsv4_bridge.spec.spec import ModelSpec

Run = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        name: of the function, and of its kind of layer.
        inputs: what gets gradients where it is floating.
        run: called with the inputs and the choice of kernels.
        flops: of the forward pass.
        back: FLOPs of the backward over those of the forward; 0: it has none.
        more: bytes that are read beside the inputs.
    """

    name: str
    inputs: tuple[Tensor, ...]
    run: Run
    flops: float = 0
    back: float = 2
    more: int = 0

    def out(self, by: Choice) -> tuple[Tensor, ...]:
        """The forward pass."""
        found = self.run(*self.inputs, by)
        return (found,) if isinstance(found, Tensor) else found

    def least_bytes(self, outs: tuple[Tensor, ...], backward: bool) -> int:
        """What has to pass through memory: inputs and outputs; with the backward once more, and their gradients."""
        read, written = sum(map(nbytes, self.inputs)) + self.more, sum(map(nbytes, outs))
        wanted = sum(nbytes(t) for t in self.inputs if t.requires_grad)
        return read + written + (read + written + wanted if backward else 0)


def nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def cases(spec: ModelSpec, length: int, dtype: torch.dtype, device: str) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Name and maker of each case: made one at a time, for all together would not fit."""
    makers = (_attention, _indexer, _streams, _rows, _experts, _compressor)
    for maker in makers:
        yield from maker(spec, length, dtype, device)


Found = Iterator[tuple[str, Callable[[], Case]]]


def _maker(dtype: torch.dtype, device: str) -> Callable[..., Tensor]:
    def new(*shape: int, kind: torch.dtype = dtype, grad: bool = True, scale: float = 1.0) -> Tensor:
        made = torch.randn(shape, dtype=torch.float32, device=device).mul_(scale).to(kind)
        return made.requires_grad_(grad)

    return new


def spread_blocks(length: int, ratio: int, topk: int, device: str) -> Tensor:
    """Blocks for every query, evenly over those that it sees: [1, s, k] int64, -1 where there are fewer."""
    count = min(topk, length // ratio)
    visible = (torch.arange(length, device=device) + 1) // ratio
    j = torch.arange(count, device=device)
    every = torch.where(j < visible[:, None], j, -1)
    return torch.where(visible[:, None] > count, j * visible[:, None] // max(1, count), every).unsqueeze(0)


def _attention(spec: ModelSpec, s: int, dtype: torch.dtype, device: str) -> Found:
    from dsv4_bridge.mcore.kernels.attention import attend

    new, h, d = _maker(dtype, device), spec.num_attention_heads, spec.head_dim
    for kind, ratio in (("window", 0), ("CSA", 4), ("HCA", 128)):

        def make(kind: str = kind, ratio: int = ratio) -> Case:
            topk = spec.index_topk if ratio == 4 else None
            pairs = window_pairs(s, spec.sliding_window) + (block_pairs(s, ratio, topk) if ratio else 0)
            reach = Reach(spec.sliding_window, ratio, 128)
            chosen = spread_blocks(s, 4, spec.index_topk, device) if ratio == 4 else None
            inputs = [new(1, s, h, d), new(1, s, d), new(h, kind=torch.float32)]
            inputs += [new(1, s // ratio, d)] if ratio else []

            def run(q: Tensor, kv: Tensor, sink: Tensor, *rest: Any) -> Tensor:
                *blocks, by = rest
                return attend(q, kv, blocks[0] if blocks else None, chosen, sink, reach, by)

            more = 0 if chosen is None else nbytes(chosen)
            # Five products against two: scores, weights times values; and back, scores again and three gradients.
            return Case(f"attend, {kind}", tuple(inputs), run, 4 * h * d * pairs, 2.5, more)

        if s >= 4 * ratio or not ratio:
            yield f"attend, {kind}", make


def _indexer(spec: ModelSpec, s: int, dtype: torch.dtype, device: str) -> Found:
    from dsv4_bridge.mcore.kernels.index import choose_blocks
    from dsv4_bridge.mcore.kernels.indexer_loss import indexer_loss

    new, heads, width = _maker(dtype, device), spec.index_n_heads, spec.index_head_dim
    once = 2 * heads * (width + 1)

    def terms(grad: bool) -> tuple[Tensor, ...]:
        queries, keys = new(1, s, heads, width, grad=grad), new(1, s // 4, width, grad=grad)
        return queries, keys, new(1, s, heads, kind=torch.float32, grad=grad)

    def choose() -> Case:
        def run(q: Tensor, k: Tensor, w: Tensor, by: Choice) -> Tensor:
            return choose_blocks(IndexTerms(q, k, w), spec.index_topk, by)

        return Case("choose_blocks", terms(False), run, once * block_pairs(s, 4), 0)

    if s // 4 > spec.index_topk:
        yield "choose_blocks", choose

    def train() -> Case:
        h, d = spec.num_attention_heads, spec.head_dim
        q, kv, blocks, sink = (
            t.detach() for t in (new(1, s, h, d), new(1, s, d), new(1, s // 4, d), new(h, kind=torch.float32))
        )
        chosen, reach = spread_blocks(s, 4, spec.index_topk, device), Reach(spec.sliding_window, 4, 128)

        def run(queries: Tensor, keys: Tensor, weights: Tensor, by: Choice) -> Tensor:
            return indexer_loss(IndexTerms(queries, keys, weights), q, kv, blocks, chosen, sink, reach, by=by)

        pairs = block_pairs(s, 4, spec.index_topk)
        both = window_pairs(s, spec.sliding_window) + pairs
        # Gradients are made in the forward; scores of attention, then scores of the indexer and two gradients.
        return Case(
            "indexer_loss",
            terms(True),
            run,
            2 * h * d * both + 3 * once * pairs,
            0.01,
            sum(map(nbytes, (q, kv, blocks))),
        )

    yield "indexer_loss", train


def _streams(spec: ModelSpec, s: int, dtype: torch.dtype, device: str) -> Found:
    from dsv4_bridge.mcore.kernels import streams as k

    new, n, hidden = _maker(dtype, device), spec.hc_mult, spec.hidden_size
    outs, wide = n * (n + 2), torch.float32

    def mix() -> Case:
        inputs = (new(s, 1, n * hidden), new(outs, n * hidden, kind=wide, scale=0.02), new(outs, kind=wide))
        alphas = [new(1, kind=wide) for _ in range(3)]
        rule = k.MixRule(1e-6, 1e-6, 20)

        def run(x: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor, c: Tensor, by: Choice) -> tuple[Tensor, ...]:
            return k.mix(x, w, bias, (a, b, c), rule, by)

        return Case("mix", (*inputs, *alphas), run, 2 * s * outs * n * hidden)

    yield "mix", mix
    yield (
        "project",
        lambda: Case(
            "project",
            (new(s, 1, n * hidden), new(outs, n * hidden, kind=wide, scale=0.02)),
            lambda x, w, by: k.project(x, w, 1e-6, by),
            2 * s * outs * n * hidden,
        ),
    )
    yield (
        "sinkhorn",
        lambda: Case(
            "sinkhorn",
            (new(s, 1, n, n, kind=wide).detach().exp().requires_grad_(),),
            lambda x, by: k.sinkhorn(x, 20, 1e-6, by),
        ),
    )
    yield (
        "collapse",
        lambda: Case("collapse", (new(s, 1, n * hidden), new(s, 1, n, kind=wide)), k.collapse),
    )
    yield (
        "expand",
        lambda: Case(
            "expand",
            (new(s, 1, hidden), new(s, 1, n, hidden), new(s, 1, n), new(s, 1, n, n)),
            k.expand,
        ),
    )


def _rows(spec: ModelSpec, s: int, dtype: torch.dtype, device: str) -> Found:
    from dsv4_bridge.mcore.kernels.norm import inverse_rms, rms_norm
    from dsv4_bridge.mcore.kernels.rotary import norm_rotate, rotate

    new, h, d = _maker(dtype, device), spec.num_attention_heads, spec.head_dim

    def turn() -> Tensor:
        angles = torch.rand(s, 1, 1, spec.qk_rope_head_dim // 2, device=device)
        return torch.complex(angles.cos(), angles.sin())

    def turned() -> Case:
        by_angle = turn()
        return Case("rotate", (new(s, 1, h, d),), lambda x, by: rotate(x, by_angle, by=by))

    yield "rotate", turned
    yield "inverse_rms", lambda: Case("inverse_rms", (new(s, 1, h, d),), lambda x, by: inverse_rms(x, 1e-6, by))

    def normed_and_turned() -> Case:
        by_angle = turn()
        return Case("norm_rotate", (new(s, 1, h, d),), lambda x, by: norm_rotate(x, by_angle, 1e-6, by))

    yield "norm_rotate", normed_and_turned
    inputs = (spec.hidden_size,)
    yield (
        "rms_norm",
        lambda: Case("rms_norm", (new(s, 1, *inputs), new(*inputs)), lambda x, w, by: rms_norm(x, w, 1e-6, by)),
    )


def _experts(spec: ModelSpec, s: int, dtype: torch.dtype, device: str) -> Found:
    from dsv4_bridge.mcore.kernels.grouped import clamped_swiglu, grouped_linear

    new, hidden, width = _maker(dtype, device), spec.hidden_size, spec.moe_intermediate_size
    rows, experts = s * spec.num_experts_per_tok, spec.n_routed_experts
    yield (
        "clamped_swiglu",
        lambda: Case(
            "clamped_swiglu",
            (new(rows, 2 * width), new(rows, kind=torch.float32)),
            lambda x, w, by: clamped_swiglu(x, w, 10.0, by),
        ),
    )

    def grouped() -> Case:
        stack = new(experts, 2 * width, hidden, grad=False, scale=0.02)
        weights = tuple(w.requires_grad_() for w in stack.unbind())
        at = [rows * j // experts for j in range(experts + 1)]
        counts = [b - a for a, b in itertools.pairwise(at)]  # even, for the kernel is torch's
        return Case(
            "grouped_linear",
            (new(rows, hidden), *weights),
            lambda x, *rest: grouped_linear(x, counts, rest[:-1]),
            2 * rows * hidden * 2 * width,
        )

    if device != "meta":
        yield "grouped_linear", grouped


def _compressor(spec: ModelSpec, s: int, dtype: torch.dtype, device: str) -> Found:
    from dsv4_bridge.mcore.kernels.pool import pool

    new, width = _maker(dtype, device), spec.head_dim
    for ratio in (4, 128):

        def make(ratio: int = ratio) -> Case:
            wide = 2 * width if ratio == 4 else width
            inputs = (new(1, s, wide), new(1, s, wide), new(ratio, wide, kind=torch.float32))
            return Case(f"pool, {ratio}", inputs, lambda kv, gate, ape, by: pool(kv, gate, ape, ratio, ratio == 4, by))

        yield f"pool, {ratio}", make
