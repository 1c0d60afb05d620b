"""Which layers a pipeline stage holds: the rules, the written form, and a solver.

A layout is a list of chunks in the order that data flows through them; chunk c lies on pipeline rank
c % pp. Its written form is megatron-core's: `E` embedding, `t` decoder layer, `m` MTP layer, `L` loss,
`|` between chunks, `*n` and `(…)*n` for repeats, commas ignored: `Et*11|t*11|t*11|t*10mL`.

Rules (megatron.md section 5):
1. hash layers stand in the chunk of the embedding, for token ids reach no other;
2. the last decoder layer stands in the last chunk, for what passes between chunks is all streams, and
   the last layer's chunk makes one of them;
3. MTP layers and the loss stand there too: MTP needs the streams;
4. no chunk is empty.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby, pairwise

from ..errors import BridgeError
from ..spec.spec import ModelSpec

_MOST_CHUNKS = 4096
_LETTERS = {"E": "embedding", "t": "decoder layer", "m": "MTP layer", "L": "loss"}


@dataclass(frozen=True)
class Chunk:
    """What one chunk holds.

    Attributes:
        start: its first decoder layer.
        stop: the layer behind its last.
        embedding: whether it embeds the tokens.
        mtp: its MTP layers.
        loss: whether it has the output layer.
    """

    start: int
    stop: int
    embedding: bool = False
    mtp: int = 0
    loss: bool = False

    @property
    def letters(self) -> str:
        """One letter a piece, without repeats."""
        return "E" * self.embedding + "t" * (self.stop - self.start) + "m" * self.mtp + "L" * self.loss


@dataclass(frozen=True)
class Layout:
    """Chunks in the order of the data, over `pp` ranks."""

    chunks: tuple[Chunk, ...]
    pp: int

    @property
    def vp(self) -> int:
        """Chunks a rank."""
        return len(self.chunks) // self.pp

    def of_rank(self, rank: int) -> tuple[Chunk, ...]:
        """The chunks of one pipeline rank."""
        return self.chunks[rank :: self.pp]

    def to_list(self) -> list[list[str]]:
        """Plain lists of megatron's layer names, for `pipeline_model_parallel_layout` and run_config.yaml."""
        names = {"E": "embedding", "t": "decoder", "m": "mtp", "L": "loss"}
        return [[names[x] for x in chunk.letters] for chunk in self.chunks]

    def __str__(self) -> str:
        return "|".join(_short(chunk.letters) for chunk in self.chunks)


def _short(letters: str) -> str:
    runs = ((letter, len(list(run))) for letter, run in groupby(letters))
    return "".join(letter if count == 1 else f"{letter}*{count}" for letter, count in runs)


def parse_layout(text: str, pp: int, spec: ModelSpec) -> Layout:
    """Read the written form.

    Args:
        text: e.g. `Et*11|t*11|t*11|t*10mL`.
        pp: pipeline ranks.
        spec: the model, whose rules the layout must keep.

    Raises:
        BridgeError: not a layout, or a rule broken, which one and by which chunk.
    """
    return layout_of([list(part) for part in _unrolled(text).split("|")], pp, spec, text)


def _unrolled(text: str) -> str:
    plain = text.replace(",", "").replace(" ", "")
    for pattern in (r"\(([^()]*)\)\*(\d{1,4})", r"([A-Za-z|])\*(\d{1,4})"):
        plain = re.sub(pattern, lambda found: found[1] * int(found[2]), plain)
        if len(plain) > _MOST_CHUNKS * 4:
            raise BridgeError(f"reading the layout {text[:60]!r}: it unrolls to more than {_MOST_CHUNKS * 4} letters")
    if strange := sorted(set(plain) - set(_LETTERS) - {"|"}):
        raise BridgeError(
            f"reading the layout {text[:60]!r}: {strange[0]!r} is no part of one; known are "
            + ", ".join(f"{letter} ({what})" for letter, what in _LETTERS.items())
            + ", | between chunks, and *n"
        )
    return plain


def layout_of(lists: Sequence[Sequence[str]], pp: int, spec: ModelSpec, text: str = "") -> Layout:
    """A layout from lists of letters, or of megatron's layer names.

    Raises:
        BridgeError: as `parse_layout`.
    """
    where = f"pipeline layout {text or lists!r}"
    letter = {"embedding": "E", "decoder": "t", "mtp": "m", "loss": "L"} | {x: x for x in _LETTERS}
    chunks, at = [], 0
    for number, names in enumerate(lists):
        if strange := [n for n in names if n not in letter]:
            raise BridgeError(f"{where}: {strange[0]!r} in chunk {number} is no kind of layer")
        letters = "".join(letter[n] for n in names)
        count = letters.count("t")
        chunk = Chunk(at, at + count, "E" in letters, letters.count("m"), "L" in letters)
        if letters != chunk.letters:
            raise BridgeError(f"{where}: chunk {number} is {letters!r}, expected the order {chunk.letters!r}")
        chunks.append(chunk)
        at += count
    if pp < 1 or len(chunks) % pp:
        raise BridgeError(f"{where}: {len(chunks)} chunks do not divide over {pp} pipeline ranks")
    layout = Layout(tuple(chunks), pp)
    if broken := broken_rules(layout, spec):
        raise BridgeError(
            f"{where} breaks a rule: {'; '.join(broken)}. A layout that keeps them: {solve(spec, pp, layout.vp)}"
        )
    return layout


def broken_rules(layout: Layout, spec: ModelSpec) -> list[str]:
    """Every rule that a layout breaks, in words; empty where it is sound."""
    chunks, layers, draft = layout.chunks, spec.num_hidden_layers, spec.mtp_layers
    counted = sum(c.stop - c.start for c in chunks)
    checks = (
        (counted == layers, f"it has {counted} decoder layers, the model {layers}"),
        (
            sum(c.mtp for c in chunks) == draft,
            f"it has {sum(c.mtp for c in chunks)} MTP layers, the model {draft}",
        ),
        ([c.embedding for c in chunks] == [True] + [False] * (len(chunks) - 1), "the embedding opens the first chunk"),
        ([c.loss for c in chunks] == [False] * (len(chunks) - 1) + [True], "the loss closes the last chunk"),
        (
            chunks[0].stop >= spec.num_hash_layers,
            f"the {spec.num_hash_layers} hash layers stand with the embedding, and its chunk has only {chunks[0].stop}",
        ),
        (chunks[-1].stop > chunks[-1].start, "the last decoder layer stands with the loss"),
        (chunks[-1].mtp == draft, "MTP stands with the last decoder layer and the loss"),
        (all(c.letters for c in chunks), f"chunk {_first_empty(chunks)} is empty"),
    )
    return [message for good, message in checks if not good]


def _first_empty(chunks: Sequence[Chunk]) -> int:
    return next((n for n, c in enumerate(chunks) if not c.letters), -1)


@dataclass(frozen=True)
class Costs:
    """What each piece costs, in one unit (seconds, FLOP or bytes).

    Attributes:
        layers: one a decoder layer.
        embedding: the embedding.
        mtp: all MTP layers.
        head: output layer and loss.
    """

    layers: tuple[float, ...]
    embedding: float
    mtp: float
    head: float

    def of(self, chunk: Chunk) -> float:
        """Cost of a chunk."""
        return (
            sum(self.layers[chunk.start : chunk.stop])
            + chunk.embedding * self.embedding
            + bool(chunk.mtp) * self.mtp
            + chunk.loss * self.head
        )

    def worst(self, layout: Layout) -> float:
        """The largest cost of a rank."""
        return max(sum(map(self.of, layout.of_rank(r))) for r in range(layout.pp))

    def imbalance(self, layout: Layout) -> float:
        """The worst rank over the mean one, minus 1."""
        total = sum(self.of(c) for c in layout.chunks)
        return self.worst(layout) * layout.pp / total - 1


def flop_costs(spec: ModelSpec, length: int = 4096) -> Costs:
    """Forward multiply-adds a token of each piece, at sequences of `length` tokens.

    Terms: projections, attention over window and compressed entries, compressor and indexer, experts,
    router, hyper-connections; MTP has two extra projections, of one embedding and of every stream, and the head once
    more.
    """
    hidden, heads, width = spec.hidden_size, spec.num_attention_heads, spec.head_dim
    projections = (
        spec.q_lora_rank * (hidden + heads * width)
        + hidden * width
        + heads * width * spec.o_lora_rank
        + spec.o_groups * spec.o_lora_rank * hidden
    )
    experts = 3 * hidden * spec.moe_intermediate_size * (spec.num_experts_per_tok + spec.n_shared_experts)
    mixing = 2 * spec.hc_mult * hidden * spec.hc_mult * (spec.hc_mult + 2)
    always = projections + experts + mixing + hidden * spec.n_routed_experts
    window = 2 * heads * width * min(spec.sliding_window, length)

    def layer(ratio: int) -> float:
        if ratio == 0:
            return always + window
        blocks = length / ratio / 2  # a query sees half of them on average
        if ratio == 128:
            return always + window + 2 * heads * width * blocks + 2 * hidden * width
        index = spec.index_n_heads * spec.index_head_dim
        indexer = hidden * 4 * spec.index_head_dim + spec.q_lora_rank * index + index * blocks
        return always + window + 2 * heads * width * min(spec.index_topk, blocks) + 4 * hidden * width + indexer

    head = spec.vocab_size * hidden
    ratios = spec.compress_ratios
    entry = (1 + spec.hc_mult) * hidden * hidden
    draft = sum(layer(ratios[spec.num_hidden_layers + k]) + entry + head for k in range(spec.mtp_layers))
    return Costs(tuple(layer(r) for r in ratios[: spec.num_hidden_layers]), 0.0, draft, head)


@cache
def parameter_costs(spec: ModelSpec) -> Costs:
    """Parameters of each piece, as the table lists them; passengers not counted."""
    from ..spec.plan import expand

    layers = [0.0] * spec.num_hidden_layers
    embedding = mtp = head = 0.0
    for item in expand(spec).items:
        if item.passenger:
            continue
        if item.block.kind == "layer":
            layers[item.block.index] += item.numel
        elif item.block.kind == "mtp":
            mtp += item.numel
        elif item.row.key == "embed":
            embedding += item.numel
        else:
            head += item.numel
    return Costs(tuple(layers), embedding, mtp, head)


def solve(spec: ModelSpec, pp: int, vp: int = 1, costs: Costs | None = None, limit: Costs | None = None) -> Layout:
    """The layout whose slowest rank is fastest, among those whose largest rank is smallest.

    With one chunk a rank this is the optimum (dynamic programming over cut points). With several, the
    cuts of the best chunks are improved by moving runs of them until no move helps.

    Args:
        spec: the model.
        pp: pipeline ranks.
        vp: chunks a rank.
        costs: what to balance; by default FLOP a token.
        limit: what no rank may have more of than it must; by default parameters.

    Raises:
        BridgeError: more chunks than layers allow.
    """
    costs, limit = costs or flop_costs(spec), limit or parameter_costs(spec)
    count, layers = pp * vp, spec.num_hidden_layers
    most = layers - max(spec.num_hash_layers, 1) + 1
    if pp < 1 or vp < 1 or count > max(most, 1):
        raise BridgeError(
            f"cutting {layers} layers into {pp} pipeline ranks of {vp} chunks: {count} chunks, at most {most} are "
            f"possible (the {spec.num_hash_layers} hash layers stay together, and each chunk has a layer)"
        )
    smallest = _best(spec, count, limit, None, 0.0)[1]
    cuts, _ = _best(spec, count, costs, limit, smallest * (1 + 1e-9))
    layout = _layout(spec, cuts, pp)
    return layout if vp == 1 else _improved(spec, layout, costs, limit)


def _layout(spec: ModelSpec, cuts: Sequence[int], pp: int) -> Layout:
    count = len(cuts) - 1
    return Layout(tuple(_chunk(spec, a, b, count, n) for n, (a, b) in enumerate(pairwise(cuts))), pp)


def _improved(spec: ModelSpec, layout: Layout, costs: Costs, limit: Costs) -> Layout:
    def rank(cuts: Sequence[int]) -> tuple[float, ...]:
        trial = _layout(spec, cuts, layout.pp)
        times = [costs.of(c) for c in trial.chunks]
        return limit.worst(trial), costs.worst(trial), max(times), sum(t * t for t in times)

    cuts = [0, *(c.stop for c in layout.chunks)]
    found = rank(cuts)
    improving = True
    while improving:
        improving = False
        for low in range(1, len(cuts) - 1):
            for high in range(low + 1, len(cuts)):
                for step in (-1, 1):
                    moved = [c + step * (low <= n < high) for n, c in enumerate(cuts)]
                    if moved[1] < spec.num_hash_layers or any(b <= a for a, b in pairwise(moved)):
                        continue
                    if (trial := rank(moved)) < found:
                        cuts, found, improving = moved, trial, True
    return _layout(spec, cuts, layout.pp)


def _chunk(spec: ModelSpec, start: int, stop: int, count: int, number: int) -> Chunk:
    last = number == count - 1
    return Chunk(start, stop, number == 0, spec.mtp_layers if last else 0, last)


def _best(spec: ModelSpec, count: int, costs: Costs, limit: Costs | None, most: float) -> tuple[list[int], float]:
    """Cut points of the contiguous partition with the smallest largest cost, and that cost."""
    layers, first = spec.num_hidden_layers, max(spec.num_hash_layers, 1)
    # best[stop]: (largest cost so far, sum of squares as tie-break, cuts) of the first chunks up to layer `stop`.
    best: dict[int, tuple[float, float, list[int]]] = {0: (0.0, 0.0, [0])}
    for number in range(count):
        left = count - number - 1
        grown: dict[int, tuple[float, float, list[int]]] = {}
        for start, (largest, squares, cuts) in best.items():
            stops = [layers] if left == 0 else range(max(start + 1, first), layers - left + 1)
            for stop in stops:
                if stop <= start:
                    continue
                chunk = _chunk(spec, start, stop, count, number)
                if limit is not None and limit.of(chunk) > most:
                    continue
                cost = costs.of(chunk)
                entry = (max(largest, cost), squares + cost * cost, [*cuts, stop])
                if stop not in grown or entry[:2] < grown[stop][:2]:
                    grown[stop] = entry
        best = grown
    found = best[layers]
    return found[2], found[0]
