"""FLOPs of a forward pass and of training, in closed form, term by term. Pure numbers.

Counted are products of matrices and vectors, two FLOPs a multiply-add: what the mathematics needs. A query
meets the keys it sees and no others, documents of a packed row do not meet, and each of MTP's input
projections runs as often as the model runs it. Not counted: what works element by element (norms,
rotations, softmax, activations, gates, Sinkhorn), lookups, the optimizer.

The gradient of a product costs one such product for each side that has a gradient. Two sides never have
one: frozen weights (LoRA), and the indexer, whose choice is frozen by construction unless it is trained.

`published` is the formula that published throughputs of this model are given in (see docs/concepts/flops.md);
tests/planning/test_flops.py holds `count_flops` equal to what torch's own counter sees of the model.

Symbols: H hidden_size; h heads; d head_dim; k chosen blocks; n streams.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import NamedTuple

from ..errors import BridgeError, short
from .lora import Lora, targets
from .plan import check_computed
from .spec import ModelSpec, replace_spec

RECOMPUTE = (None, "full", "moe")
CONVENTIONS = ("published", "exact")


@dataclass(frozen=True)
class Terms:
    """FLOPs by kind of work, over trunk and MTP blocks alike.

    Attributes:
        projections: of queries, keys and attention's output.
        window: queries with keys and weights with values of the sliding window.
        compressed: the same for compressed entries: all visible (HCA) or the chosen (CSA).
        indexer: its projections and scores.
        compressor: projections of the compressors; the indexer's are the indexer's.
        experts: routed and shared.
        router: scores of all experts.
        hyper_connections: maps, collapse, mixing and expansion of the streams, and the learned heads.
        mtp: the two input projections of MTP depths.
        logits: the output layer, once a depth more with MTP.
        adapters: of LoRA.
    """

    projections: float = 0
    window: float = 0
    compressed: float = 0
    indexer: float = 0
    compressor: float = 0
    experts: float = 0
    router: float = 0
    hyper_connections: float = 0
    mtp: float = 0
    logits: float = 0
    adapters: float = 0

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self.items().values())

    def items(self) -> dict[str, float]:
        """Term -> FLOPs, in the order above."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def __add__(self, other: "Terms") -> "Terms":
        return Terms(*(a + b for a, b in zip(self.items().values(), other.items().values(), strict=True)))

    def over(self, tokens: float) -> "Terms":
        """Each divided by a number of tokens."""
        return Terms(*(value / tokens for value in self.items().values()))


@dataclass(frozen=True)
class FlopCount:
    """FLOPs of one pass over some tokens.

    Attributes:
        tokens: how many.
        forward: the forward pass.
        input_gradients: products that carry gradients on to activations.
        weight_gradients: products that make gradients of weights.
        recomputed: forward work that the backward pass does again; no part of `training`.
    """

    tokens: int
    forward: Terms
    input_gradients: Terms
    weight_gradients: Terms
    recomputed: Terms

    @property
    def training(self) -> Terms:
        """Forward and backward, without what is computed twice: what MFU counts."""
        return self.forward + self.input_gradients + self.weight_gradients


class _Work(NamedTuple):
    """Multiply-adds of one kind: a product with a weight, or of two activations."""

    term: str
    products: int
    weight: bool = True
    layer: bool = True  # inside a decoder layer: what full recompute does again
    learned: int | None = None  # products that gradients go through, where these are fewer


def count_flops(
    spec: ModelSpec,
    lengths: int | Sequence[int],
    *,
    lora: Lora | None = None,
    train_indexer: bool = False,
    recompute: str | None = None,
    logits_again: bool = False,
) -> FlopCount:
    """FLOPs of sequences of these lengths, forward and backward.

    Args:
        spec: the model; its MTP runs as in training (`spec.without_draft()` has none), a DSpark drafter does not.
        lengths: tokens of one sequence, or of each document: documents do not meet, packed or not.
        lora: adapters on frozen weights; None: every weight is trained.
        train_indexer: whether the indexer has gradients (its inputs never have), of the blocks that are chosen: its
            objective looks at no others once attention is sparse. What that compares with is not counted.
        recompute: None; `full`, every layer once more; `moe`, experts and router once more.
        logits_again: whether losses are computed in chunks, whose logits the backward makes once more.

    Raises:
        BridgeError: lengths that are none, or an unknown recompute or adapter target.
    """
    check_computed(spec, "counting FLOPs")
    lengths = _checked(lengths)
    if recompute not in RECOMPUTE:
        raise BridgeError(f"counting FLOPs: recompute is {short(recompute)}, expected full, moe or None")
    forward, inputs, weights, again = ({f.name: 0 for f in fields(Terms)} for _ in range(4))
    for work in _works(spec, lengths, lora):
        once = 2 * work.products
        detached = work.term == "indexer"
        trained = (lora is None or work.term == "adapters") if not detached else train_indexer
        forward[work.term] += once
        if work.weight:
            inputs[work.term] += 0 if detached else once
            weights[work.term] += once if trained else 0
        elif trained or not detached:
            inputs[work.term] += 2 * (once if work.learned is None else 2 * work.learned)
        repeated = {"full": work.layer, "moe": work.term in ("experts", "router")}.get(recompute or "", False)
        if repeated or (logits_again and work.term == "logits"):
            again[work.term] += once
    return FlopCount(sum(lengths), Terms(**forward), Terms(**inputs), Terms(**weights), Terms(**again))


@cache
def share_flops(spec: ModelSpec, length: int, ranks: int) -> tuple[float, ...]:
    """Training FLOPs of every context-parallel rank on one sequence: later ranks see more blocks.

    A query's work depends on what is in front of it alone: a rank's is that of the tokens up to its last one, without
    that of the tokens in front of its first.
    """
    ends = [length * rank // ranks for rank in range(1, ranks + 1)]
    sums = [count_flops(spec, end).training.total for end in ends]
    return tuple(upto - before for before, upto in zip((0.0, *sums[:-1]), sums, strict=True))


@cache
def forward_costs(spec: ModelSpec, length: int) -> tuple[tuple[float, ...], float, float]:
    """Forward FLOPs a token, of sequences of `length` tokens: of each decoder layer, all MTP depths, and the head."""

    def cost(works: Iterator[_Work]) -> float:
        return sum(2 * work.products for work in works) / length

    count = spec.num_hidden_layers
    layers = tuple(cost(_layer(spec, ratio, (length,))) for ratio in spec.compress_ratios[:count])
    draft = [
        cost(_layer(spec, spec.compress_ratios[count + k], (length,))) + cost(_head(spec, length, k + 1))
        for k in range(spec.mtp_layers)
    ]
    return layers, sum(draft), cost(_head(spec, length, 0))


def _works(spec: ModelSpec, lengths: Sequence[int], lora: Lora | None) -> Iterator[_Work]:
    tokens, depths = sum(lengths), spec.mtp_layers
    for ratio in spec.compress_ratios[: spec.num_hidden_layers + depths]:
        yield from _layer(spec, ratio, lengths)
    for depth in range(1 + depths):
        yield from _head(spec, tokens, depth)
    if lora:
        yield _Work("adapters", tokens * adapter_work(spec, lora))


def _head(spec: ModelSpec, tokens: int, depth: int) -> Iterator[_Work]:
    """What stands beside the layers: the output of the trunk (depth 0), or input and output of an MTP depth."""
    hidden, n = spec.hidden_size, spec.hc_mult
    yield _Work("logits", tokens * hidden * spec.vocab_size, layer=False)
    yield _Work("hyper_connections", tokens * n * n * hidden, layer=False)  # the learned head's map
    yield _Work("hyper_connections", tokens * n * hidden, False, False)
    if depth:
        # One token's embedding, and each of the n streams before.
        yield _Work("mtp", tokens * (1 + n) * hidden * hidden, layer=False)


def _layer(spec: ModelSpec, ratio: int, lengths: Sequence[int]) -> Iterator[_Work]:
    """One decoder layer, or the body of an MTP depth."""
    tokens, hidden, n = sum(lengths), spec.hidden_size, spec.hc_mult
    heads = spec.num_attention_heads * spec.head_dim  # h*d
    low, group = spec.q_lora_rank, spec.o_lora_rank
    queries_keys = low * (hidden + heads) + hidden * spec.head_dim
    yield _Work("projections", tokens * (queries_keys + heads * group + spec.o_groups * group * hidden))
    # Twice: queries with keys, and weights with values, which are the keys.
    yield _Work("window", 2 * heads * sum(window_pairs(s, spec.sliding_window) for s in lengths), False)
    if ratio:
        chosen = spec.index_topk if ratio == 4 else None
        yield _Work("compressed", 2 * heads * sum(block_pairs(s, ratio, chosen) for s in lengths), False)
        yield _Work("compressor", tokens * 2 * hidden * spec.head_dim * (2 if ratio == 4 else 1))
    if ratio == 4:
        yield from _indexer(spec, lengths)
    # Sums over the row's two sides: gate, up and down, of the chosen and the shared experts.
    wide = spec.num_experts_per_tok * spec.moe_intermediate_size + spec.shared_intermediate_size
    yield _Work("experts", tokens * 3 * hidden * wide)
    yield _Work("router", tokens * hidden * spec.n_routed_experts)
    for _ in ("attention", "experts"):
        yield _Work("hyper_connections", tokens * n * (n + 2) * n * hidden)  # the map of all streams
        # Collapse to one, mix n with n, and write the output back to each.
        yield _Work("hyper_connections", tokens * (n + n * n + n) * hidden, False)


def _indexer(spec: ModelSpec, lengths: Sequence[int]) -> Iterator[_Work]:
    heads, width = spec.index_n_heads, spec.index_head_dim
    yield _Work("indexer", sum(lengths) * 2 * spec.hidden_size * 2 * width)  # its compressor
    # Where all blocks are chosen there is nothing to score.
    scored = [s for s in lengths if s // 4 > spec.index_topk]
    yield _Work("indexer", sum(scored) * heads * (spec.q_lora_rank * width + spec.hidden_size))
    # Every visible block by each head, and the heads' sum.
    every, chosen = (sum(block_pairs(s, 4, most) for s in scored) for most in (None, spec.index_topk))
    yield _Work("indexer", heads * (width + 1) * every, False, learned=heads * (width + 1) * chosen)


def window_pairs(length: int, window: int) -> int:
    """Queries times the window keys each sees: the sum of min(t, window) for t = 1 … length."""
    full = max(0, length - window)
    start = length - full
    return start * (start + 1) // 2 + full * window


def block_pairs(length: int, ratio: int, chosen: int | None = None) -> int:
    """Queries times the blocks each meets: the sum of min(t // ratio, chosen) for t = 1 … length."""
    if chosen is not None and length // ratio > chosen:
        start = ratio * chosen  # the first query that sees as many
        return block_pairs(start, ratio) + (length - start) * chosen
    whole, rest = divmod(length, ratio)
    return ratio * whole * (whole - 1) // 2 + whole * (rest + 1)


def adapter_work(spec: ModelSpec, lora: Lora) -> int:
    """Multiply-adds that adapters add to one token, over all layers.

    Raises:
        BridgeError: a target that may not carry an adapter, or a rank below 1.
    """
    # As many experts as a token is routed to.
    reached = replace_spec(spec, n_routed_experts=spec.num_experts_per_tok)
    total = 0
    for target in targets(reached, lora.keys):
        out, into = target.shape
        # The grouped projection has one block of its input for each group.
        total += lora.rank * (out + into * (spec.o_groups if target.items[0].row.role == "groups" else 1))
    return total


def published(spec: ModelSpec, seq_length: int, lengths: Sequence[int] | None = None) -> Terms:
    """Training FLOPs of a token in the convention of published throughputs (Megatron-Bridge's formula).

    Forward plus backward as three times the forward pass, everything trained. Terms that grow with the
    sequence take the mean of lengths weighted by tokens where `lengths` are given. Router and
    hyper-connections are left out.

    Args:
        spec: the model; its MTP depths count as layers.
        seq_length: tokens of a row.
        lengths: of the documents, where rows are packed.
    """
    seq = _checked(seq_length)[0]
    documents = _checked(lengths) if lengths is not None else [seq]
    mean = sum(s * s for s in documents) / sum(documents)
    hidden, d, low, group = spec.hidden_size, spec.head_dim, spec.q_lora_rank, spec.o_lora_rank
    heads, depths = spec.num_attention_heads * d, spec.mtp_layers
    ratios = spec.compress_ratios[: spec.num_hidden_layers + depths]
    layers, csa, hca = len(ratios), ratios.count(4), ratios.count(128)
    chosen = min(spec.index_topk, seq / 4)
    met = chosen * (1 - 4 * chosen / (2 * seq))
    queries = low * (hidden + heads + 1) + hidden * d + d
    index = 2 * hidden * 2 * spec.index_head_dim + low * spec.index_n_heads * spec.index_head_dim
    index += hidden * spec.index_n_heads + spec.index_n_heads * spec.index_head_dim / 4 * mean
    wide = spec.moe_intermediate_size * spec.num_experts_per_tok + spec.shared_intermediate_size
    return Terms(
        projections=6 * layers * (queries + heads * group + spec.o_groups * group * hidden),
        window=6 * layers * 2 * heads * spec.sliding_window,
        compressed=6 * heads * (csa * 2 * met + hca * mean / 128),
        indexer=6 * csa * index,
        compressor=6 * 2 * hidden * d * (csa * 2 + hca),
        experts=6 * layers * 3 * hidden * wide,
        mtp=6 * depths * (3 * hidden + 2 * hidden * hidden),
        logits=6 * (1 + depths) * hidden * spec.vocab_size,
    )


def flops_per_token(spec: ModelSpec, seq_length: int, *, convention: str = "exact", lora: Lora | None = None) -> float:
    """Training FLOPs of a token, for MFU: forward and backward, nothing computed twice.

    Args:
        spec: the model.
        seq_length: tokens of a row.
        convention: `exact`, or `published` to compare with published throughputs (then all is trained).
        lora: see `count_flops`.

    Raises:
        BridgeError: see `count_flops`; an unknown convention.
    """
    return model_flops(spec, [seq_length], convention=convention, lora=lora) / seq_length


def model_flops(
    spec: ModelSpec,
    lengths: Sequence[int],
    *,
    convention: str = "exact",
    seq_length: int | None = None,
    lora: Lora | None = None,
    train_indexer: bool = False,
) -> float:
    """Training FLOPs of a step over documents of these lengths: divide by seconds and peak for MFU.

    Args:
        spec: the model.
        lengths: of all documents of the step.
        convention: see `flops_per_token`.
        seq_length: of a row, for the published convention; by default the longest document.
        lora: see `count_flops`.
        train_indexer: see `count_flops`.
    """
    if convention not in CONVENTIONS:
        raise BridgeError(f"counting FLOPs: convention {convention!r}, expected {' or '.join(CONVENTIONS)}")
    lengths = _checked(lengths)
    if convention == "published":
        return published(spec, seq_length or max(lengths), lengths).total * sum(lengths)
    return count_flops(spec, lengths, lora=lora, train_indexer=train_indexer).training.total


def _checked(lengths: int | Sequence[int]) -> list[int]:
    found = [lengths] if isinstance(lengths, int) else list(lengths)
    if wrong := [s for s in found if type(s) is not int or s < 1] or (["no sequence"] if not found else []):
        raise BridgeError(f"counting FLOPs: length {short(wrong[0])}, expected tokens")
    return found
