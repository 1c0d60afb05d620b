"""Which layers a pipeline stage holds: the rules, the written form, and a solver.

A layout is a list of chunks in the order that data flows through them; chunk c lies on pipeline rank
c % pp. Its written form is megatron-core's: `E` embedding, `t` decoder layer, `m` MTP layer, `L` loss,
`|` between chunks, `*n` and `(…)*n` for repeats, commas ignored: `Et*11|t*11|t*11|t*10mL`.

Rules:
1. hash layers stand in the chunk of the embedding, for token ids reach no other;
2. the last decoder layer stands in the last chunk, for what passes between chunks is all streams, and
   the last layer's chunk makes one of them;
3. MTP layers and the loss stand there too: MTP needs the streams;
4. no chunk is empty.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from ..spec.spec import ModelSpec


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
