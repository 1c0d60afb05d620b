"""Bytes that one micro-batch leaves on a rank between forward and backward. Pure numbers.

Derived from what the modules of `mcore` and megatron-core 0.19's experts, router and loss save for
their backward, each storage counted once; held within 1 % of what autograd saves by
tests/mcore/test_rank_memory.py and, of fused kernels, tests/mcore/test_kernel_memory.py.

Symbols: T tokens of a micro-batch, T1 = T / tp of them under sequence parallelism; H hidden_size;
n hyper-connection streams; h heads and g output groups of a rank; d head_dim; e bytes of the model's type.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

from ..parallel.layout import Chunk
from ..spec.lora import Lora
from ..spec.spec import ModelSpec

DTYPE_BYTES = {"bf16": 2, "float32": 4}
# Tokens whose logits a rank holds at a time: at the released vocabulary, 1 GB in float32.
LOSS_CHUNK = 2048


@dataclass(frozen=True)
class Shape:
    """What activations depend on, besides the model.

    Attributes:
        batch: rows of a micro-batch.
        length: tokens a row; of those of a rank, under context parallelism.
        dtype: bf16 or float32.
        tp: tensor-parallel ranks; sequence parallelism goes with them.
        etp: expert-tensor-parallel ranks.
        recompute: full recompute: a layer keeps its input only.
        lora: adapters on frozen weights; None: all weights are trained.
        fused: by the fused kernels of a GPU, with experts of the grouped layout; else by the torch definitions.
        cp: context-parallel ranks; what is counted is the last one, which sees most compressed entries.
        loss_chunk: tokens whose logits a rank holds at a time; 0: all.
        indexer: whether the indexers learn along with the model.
    """

    batch: int = 1
    length: int = 4096
    dtype: str = "bf16"
    tp: int = 1
    etp: int = 1
    recompute: bool = False
    lora: Lora | None = None
    fused: bool = False
    cp: int = 1
    loss_chunk: int = LOSS_CHUNK
    indexer: bool = False

    @property
    def e(self) -> int:
        """Bytes of one value of the model's type."""
        return DTYPE_BYTES[self.dtype]

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.batch * self.length

    @property
    def own(self) -> int:
        """Tokens of a rank under sequence parallelism."""
        return self.tokens // self.tp

    def reads(self, *keys: str) -> bool:
        """Whether one of these linears needs its input again: its weight or an adapter is trained."""
        return self.lora is None or any(key in self.lora.keys for key in keys)

    def between(self, *keys: str) -> int:
        """Bytes a token between the two matrices of the adapters that these linears have."""
        return sum(key in self.lora.keys for key in keys) * self.lora.rank * self.e if self.lora else 0


def _norm(width: int, shape: Shape) -> int:
    """RMSNorm in float32, a token: its input, the root, and the normed input that the weight's gradient needs.

    The fused one computes the last anew, and has no float32 copies.
    """
    if shape.fused:
        return width * shape.e + 4
    return (8 if shape.lora is None else 4) * width + 4


def _mixing(spec: ModelSpec, shape: Shape) -> int:
    """A hyper-connection around one sub-layer, a token: streams, weights and their steps, the sub-layer's output."""
    n, e = spec.hc_mult, shape.e
    project = n * spec.hidden_size * e + 4 * (1 + n * (n + 2))
    # Sigmoids, softmax, collapse's weights, sinkhorn's start; of the fused one, collapse's weights.
    steps = 4 * (n if shape.fused else 3 * n + 2 * n * n)
    return project + steps + (spec.hidden_size + n + n * n) * e


def _attention(spec: ModelSpec, ratio: int, shape: Shape) -> int:
    """The attention sub-layer behind its norm, all tokens: every rank has whole sequences and its heads."""
    e, d, low = shape.e, spec.head_dim, shape.dtype != "float32"
    heads, groups = spec.num_attention_heads // shape.tp, spec.o_groups // shape.tp
    token = spec.hidden_size * e  # what the projections read
    token += _norm(spec.q_lora_rank, shape) + spec.q_lora_rank * e * shape.reads("attn.wq_b")
    if shape.fused:  # q in front of its norm and rotation; the output, and a sum for every head
        token += heads * (d * e + d * e + 4)
    else:
        token += heads * (d * e + 4 + e * low)  # q in front of its norm, and the inverse root
    token += _norm(d, shape)
    before = shape.batch * (spec.sliding_window - 1) * d * e if shape.cp > 1 else 0  # keys of the rank before
    token += (heads * d + d) * e  # rotated q, and keys that are values
    # In front of both output projections.
    token += (heads * d * shape.reads("attn.wo_a") + groups * spec.o_lora_rank * shape.reads("attn.wo_b")) * e
    token += shape.between("attn.wq_a", "attn.wq_b", "attn.wkv", "attn.wo_b") + groups * shape.between("attn.wo_a")
    return shape.tokens * token + before + _compressed(spec, ratio, shape)


def _compressed(spec: ModelSpec, ratio: int, shape: Shape) -> int:
    """The compressor, and of a CSA layer the chosen blocks and, where it learns, the indexer."""
    every = shape.length * shape.cp // ratio if ratio else 0
    if not every:
        return 0
    found = _compressor(spec, ratio, spec.head_dim, shape)
    if ratio == 4:
        everything = every <= spec.index_topk  # one table for all rows
        found += 8 * shape.length * (every if everything else shape.batch * spec.index_topk)
    if ratio == 4 and shape.indexer:
        # Its keys stay as their gradient, and so do its queries and the weights of its heads.
        found += _compressor(spec, ratio, spec.index_head_dim, shape)
        found += shape.tokens * spec.index_n_heads * (spec.index_head_dim * shape.e + 4)
    return found


def _compressor(spec: ModelSpec, ratio: int, d: int, shape: Shape) -> int:
    """Gate and projection of every slot, and entries of `d` channels."""
    e, batch, several = shape.e, shape.batch, shape.cp > 1
    # Of the whole row; those that end on this rank, and at ratio 4 one that another makes.
    every = shape.length * shape.cp // ratio
    blocks = every - shape.length * (shape.cp - 1) // ratio
    wide = 2 if ratio == 4 else 1
    slots = batch * (blocks + (several and ratio == 4)) * ratio * wide
    tokens = shape.tokens + several * batch * (ratio * wide - 1)  # with the tail of the rank before
    copy = e if shape.dtype != "float32" else 0  # the gate in the model's type
    # Blocks of ratio 128 are views of the projection, of ratio 4 copies of it: they overlap.
    kept = slots * d * e if ratio == 4 else tokens * d * e * (1 + several)
    entries = blocks * (batch * (_norm(d, shape) + d * e) + spec.qk_rope_head_dim * 4)
    found = entries + (2 * tokens * wide * d * e if shape.fused else slots * d * (4 + copy) + kept)
    if several:  # gathered from all ranks, and which of them this one sees
        found += every * (batch * d * e + 8)
    return found


def _experts(spec: ModelSpec, shape: Shape) -> int:
    """The MoE sub-layer behind its norm: router, dispatch, routed rows, shared expert; balanced routing."""
    e, hidden, k, experts = shape.e, spec.hidden_size, spec.num_experts_per_tok, spec.n_routed_experts
    first, second = (shape.reads(*(f"ffn.experts.{w}" for w in ws)) for ws in (("w1", "w3"), ("w2",)))
    router = hidden * e + 8 * experts + 8 * k + 4 * (k + 1)
    # A rank's experts see the tokens of its expert-tensor-parallel group.
    dispatch = shape.etp * (5 * experts + 8 * k)
    width = spec.moe_intermediate_size // shape.etp
    # Gate and up, both clamped, silu, product; the weighted product where fc2 is trained, the input where fc1 is.
    # The fused activation keeps gate and up alone.
    row = hidden * e * first + ((2 if shape.fused else 6) + second) * width * e + 4
    row += shape.between("ffn.experts.w1", "ffn.experts.w2")  # gate and up share theirs
    shared = (5 + shape.reads("ffn.shared_experts.w2")) * spec.shared_intermediate_size // shape.tp * e
    shared += shape.between(*(f"ffn.shared_experts.{w}" for w in ("w1", "w2", "w3")))
    return shape.own * (router + dispatch + shape.etp * k * row) + shape.tokens * shared


def layer_bytes(spec: ModelSpec, ratio: int, shape: Shape) -> int:
    """One decoder layer, or the body of an MTP layer, without recompute.

    Args:
        spec: the model.
        ratio: its compress ratio.
        shape: the micro-batch and how it is cut.
    """
    mixed = shape.own * 2 * (_mixing(spec, shape) + _norm(spec.hidden_size, shape))
    return mixed + _attention(spec, ratio, shape) + _experts(spec, shape)


def stream_bytes(spec: ModelSpec, shape: Shape) -> int:
    """All streams, as a layer gets them and a stage sends them: what a layer keeps under full recompute."""
    return shape.own * spec.hc_mult * spec.hidden_size * shape.e


def _head(spec: ModelSpec, shape: Shape) -> int:
    """The learned head that makes one stream of all, and the norm behind it."""
    n = spec.hc_mult
    return stream_bytes(spec, shape) + shape.own * (4 + 12 * n + _norm(spec.hidden_size, shape))


def _loss(spec: ModelSpec, shape: Shape) -> int:
    """Output layer and cross entropy of one head: its input, and logits, or of chunks the labels."""
    entered, logits = shape.own * spec.hidden_size * shape.e, logit_bytes(spec, shape)
    if _seen_together(shape) < shape.tokens:
        return entered + 8 * shape.tokens
    return entered * (shape.lora is None) + logits


def _seen_together(shape: Shape) -> int:
    """Tokens that a head computes the loss of at a time."""
    together = shape.batch * shape.tp  # a place of every row and rank
    most = max(1, shape.loss_chunk // together) * together
    return min(most, shape.tokens) if shape.loss_chunk else shape.tokens


def logit_bytes(spec: ModelSpec, shape: Shape) -> int:
    """What cross entropy keeps of the tokens whose logits are there at a time: float32 logits, mask and targets."""
    return _seen_together(shape) * (4 * spec.vocab_size // shape.tp + 9)


def head_sum_bytes(spec: ModelSpec, shape: Shape) -> int:
    """The float32 sum of a trained head's gradient, which the backward of a loss in chunks adds up in."""
    summed = shape.lora is None and _seen_together(shape) < shape.tokens
    return summed * 4 * spec.vocab_size // shape.tp * spec.hidden_size


def _draft_input(spec: ModelSpec, shape: Shape) -> int:
    """What one MTP layer makes its body's input of: embeddings and the streams before, normed and projected."""
    n, hidden, trained = spec.hc_mult, spec.hidden_size, shape.lora is None
    token = trained * (_norm(hidden, shape) + hidden * shape.e)  # embedding
    if shape.fused:
        return shape.own * (token + n * (4 + trained * hidden * shape.e)) + shape.tokens * 8 * trained
    # The streams in front of their norm are the head's, and kept by it; in bf16 the norm has a copy.
    token += n * (trained * 4 * hidden + 4 + trained * hidden * shape.e)
    token += n * hidden * 4 * (shape.dtype != "float32")
    return shape.own * token + shape.tokens * 8 * trained


def _body(spec: ModelSpec, ratio: int, shape: Shape) -> int:
    """What a layer keeps."""
    return stream_bytes(spec, shape) if shape.recompute else layer_bytes(spec, ratio, shape)


def _ratios(spec: ModelSpec, chunk: Chunk) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Compress ratios of a chunk's decoder layers, and of its MTP layers."""
    ratios = spec.compress_ratios
    return ratios[chunk.start : chunk.stop], ratios[spec.num_hidden_layers :][: chunk.mtp]


def _rotations(spec: ModelSpec, chunk: Chunk, shape: Shape) -> int:
    """Turns of the positions, shared by the layers of a kind."""
    return 4 * spec.qk_rope_head_dim * shape.length * len({bool(r) for rs in _ratios(spec, chunk) for r in rs})


@lru_cache(maxsize=1 << 14)  # layouts that are compared have most of it in common
def chunk_bytes(spec: ModelSpec, chunk: Chunk, shape: Shape) -> int:
    """What one micro-batch leaves in a pipeline chunk."""
    layers, drafts = _ratios(spec, chunk)
    kinds = Counter((*layers, *drafts))
    found = sum(_body(spec, ratio, shape) * times for ratio, times in kinds.items())
    found += 0 if shape.recompute else _rotations(spec, chunk, shape)
    if chunk.embedding and shape.lora is None:
        found += 8 * shape.tokens
    if chunk.embedding and shape.lora and not shape.recompute:
        # Nothing in front of the first adapters has a gradient: the streams stay, for what is added to them.
        n, hidden = spec.hc_mult, spec.hidden_size
        found -= shape.own * (_norm(hidden, shape) + 4 * (1 + n * (n + 2)) + 4 * (3 * n + 2 * n * n))
    heads = chunk.loss + len(drafts)
    found += heads * (_head(spec, shape) + _loss(spec, shape))
    return found + len(drafts) * (_draft_input(spec, shape) + 12 * shape.tokens)


@lru_cache(maxsize=1 << 14)
def recomputed_bytes(spec: ModelSpec, chunk: Chunk, shape: Shape) -> int:
    """How far the backward of one micro-batch rises above what the forward left: chunks of logits, full recompute.

    With the chunks goes the sum of their gradients of the head.

    The main loss is computed again while all is there. When a layer is, what stands behind it is done with and gone:
    losses before MTP layers, these before decoder layers.
    """
    chunked = chunk.loss and _seen_together(shape) < shape.tokens
    again = logit_bytes(spec, shape) + head_sum_bytes(spec, shape) if chunked else 0
    if not shape.recompute:
        return again
    stream, head = stream_bytes(spec, shape), _head(spec, shape)
    layers, drafts = _ratios(spec, chunk)
    below = 8 * shape.tokens if chunk.embedding and shape.lora is None else 0
    own = {ratio: layer_bytes(spec, ratio, shape) for ratio in {*layers, *drafts}}
    points = []
    for ratio in layers:
        points.append(below + own[ratio])
        below += stream
    for ratio in drafts:
        below += head + _draft_input(spec, shape)
        points.append(below + own[ratio])
        below += stream
    return max(again, max(points) + _rotations(spec, chunk, shape) - chunk_bytes(spec, chunk, shape))


def in_flight(held: Sequence[int], rank: int, ranks: int, micro_batches: int) -> int:
    """The most that a rank keeps at a time, in megatron-core's 1F1B schedules.

    Warm-up forwards of rank p: pp - p - 1 with one chunk a rank, 2 (pp - p - 1) + (vp - 1) pp with several;
    then one forward and one backward by turns. Micro-batches go through a chunk in groups of pp.

    Args:
        held: bytes that one micro-batch leaves in each chunk of the rank.
        rank: p.
        ranks: pp.
        micro_batches: of a step.
    """
    virtual = len(held)
    if virtual == 1:
        return held[0] * min(ranks - rank, micro_batches)
    # The pattern repeats: no more micro-batches than fill the pipeline need be followed.
    total = min(micro_batches, 4 * ranks) * virtual
    warm = min(2 * (ranks - rank - 1) + (virtual - 1) * ranks, total)
    now = most = 0
    forward = (held[(k // ranks) % virtual] for k in range(total))
    backward = (held[virtual - 1 - (k // ranks) % virtual] for k in range(total))
    for size in islice(forward, warm):
        now += size
    most = now
    for size in forward:
        now += size
        most = max(most, now)
        now -= next(backward)
    return most


def cache_bytes(spec: ModelSpec, chunks: Sequence[Chunk], shape: Shape) -> int:
    """What decoding remembers of `shape.length` tokens a row: windows, unfinished blocks, compressed entries.

    Every tensor-parallel rank has all of it: there is one key head.
    """
    ratios = [r for c in chunks for r in spec.compress_ratios[c.start : c.stop]]
    return shape.batch * shape.e * sum(_layer_cache(spec, r, shape.length) for r in ratios)


def _layer_cache(spec: ModelSpec, ratio: int, capacity: int) -> int:
    found = spec.sliding_window * spec.head_dim
    for width in (spec.head_dim, spec.index_head_dim)[: {0: 0, 4: 2}.get(ratio, 1)]:
        slots, wide = (2 * ratio, 2 * width) if ratio == 4 else (ratio, width)
        found += 2 * slots * wide + max(1, capacity // ratio) * width
    return found
