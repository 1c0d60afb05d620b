"""Tables that the tokens of a sample see a few rows of, compared as both models hold them: all rows.

Embedding and tables of expert ids are looked up by token: a sample of some hundred tokens says nothing of the others.
The experts' biases act on close choices alone. Of the embedding the reference leaves a digest of every row behind, 16
bytes, and all of the others.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..spec.spec import ModelSpec

_ROWS = 4096  # digested at a time
_BIAS = 1e-4  # of the largest: biases of a model that was trained on may differ by roundings


@dataclass(frozen=True)
class Table:
    """One table of both models.

    Attributes:
        name: its released name.
        layer: that it acts in first.
        site: where it acts first, see `sites.SITES`.
        rows: how many; of biases, experts.
        differing: how many are not the same.
        first: number of the first of those; None: there is none.
    """

    name: str
    layer: int
    site: str
    rows: int
    differing: int
    first: int | None


def reference_tables(model: Any, spec: ModelSpec) -> Iterator[tuple[str, Tensor]]:
    """Released names and tensors in transformers' model."""
    yield "embed.weight", model.model.embed_tokens.weight
    for index, layer in enumerate(model.model.layers):
        yield reference_table(layer, index, spec)


def reference_table(layer: Any, index: int, spec: ModelSpec) -> tuple[str, Tensor]:
    """Released name and tensor of what a layer's router looks up."""
    hashed = index < spec.num_hash_layers
    tensor = layer.mlp.gate.tid2eid if hashed else layer.mlp.gate.e_score_correction_bias
    return f"layers.{index}.ffn.gate.{'tid2eid' if hashed else 'bias'}", tensor


def our_tables(model: Any, spec: ModelSpec) -> Iterator[tuple[str, Tensor]]:
    """The same in ours; it may hold a longer vocabulary than the checkpoint."""
    yield "embed.weight", model.embedding.word_embeddings.weight[: spec.vocab_size]
    for index, layer in enumerate(model.decoder.layers):
        yield our_table(layer, index, spec)


def our_table(layer: Any, index: int, spec: ModelSpec) -> tuple[str, Tensor]:
    """The same of a layer of ours."""
    hashed = index < spec.num_hash_layers
    tensor = layer.mlp.router.tid2eid if hashed else layer.mlp.router.expert_bias
    return f"layers.{index}.ffn.gate.{'tid2eid' if hashed else 'bias'}", tensor[: spec.vocab_size]


def kept(tables: Iterable[tuple[str, Tensor]]) -> dict[str, np.ndarray]:
    """What is remembered of tables: [rows] digests of values, [rows, k] sorted expert ids, [experts] float64 biases."""
    return {name: _kept(tensor.detach()) for name, tensor in tables}


def _kept(tensor: Tensor) -> np.ndarray:
    if not tensor.is_floating_point():  # a token's experts are a set
        return tensor.sort(-1).values.to("cpu", torch.int32).numpy()
    return tensor.cpu().double().numpy() if tensor.ndim == 1 else digests(tensor)


def digests(table: Tensor) -> np.ndarray:
    """[rows, width] -> [rows] of 16 bytes; -0 is 0."""
    found = np.empty(len(table), "S16")
    for start in range(0, len(table), _ROWS):
        raw = (table[start : start + _ROWS].detach().float() + 0.0).cpu().numpy()
        # A letter behind each keeps numpy from cutting zeros off the ends of bytes.
        found[start : start + len(raw)] = [hashlib.blake2b(row, digest_size=15).digest() + b"." for row in raw]
    return found


def compare_tables(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> tuple[Table, ...]:
    """Rows that are not the same; biases within 1e-4 of the largest."""
    found = []
    for name, other in theirs.items():
        mine = ours[name]
        if other.dtype.kind == "f":
            differ = ~(np.abs(mine - other) <= _BIAS * np.abs(other).max(initial=0.0))
        else:
            differ = mine != other if other.ndim == 1 else (mine != other).any(-1)
        at = np.flatnonzero(differ)
        layer = int(name.split(".")[1]) if name.startswith("layers.") else 0
        site = "ffn.router" if name.startswith("layers.") else "attn.mix"
        found.append(Table(name, layer, site, len(other), len(at), int(at[0]) if len(at) else None))
    return tuple(found)
