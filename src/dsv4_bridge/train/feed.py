"""Rows in an order that depends only on how many were consumed, and micro-batches made of them."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from ..data.datasets import PretrainingDataset, build_pretraining_datasets, checked_split
from ..data.token_ids import check_token_ids, unknown
from ..errors import BridgeError
from ..mcore.schedule import Batch
from ..spec.spec import ModelSpec
from ..text.tokens import TOKENIZER
from .plan import small_folder
from .recipe import Recipe

if TYPE_CHECKING:
    from ..data.chat.store import ChatData


class Row(NamedTuple):
    """One row of the data.

    Attributes:
        tokens: [s] int64.
        labels: [s] int64, the token after each.
        loss_mask: [s] float32, weights of the labels.
        cu_seqlens: [documents + 1] int32, boundaries of documents, 0 and s among them.
        used: tokens in front of the padding; None: all.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    cu_seqlens: torch.Tensor
    used: int | None = None


@dataclass(frozen=True)
class Feed:
    """A dataset in an order.

    Attributes:
        count: rows of an epoch.
        row: number -> row.
        shuffled: whether the rows come in a new order each epoch; otherwise as they are.
        seed: of the orders.
        apart: whether attention stops at the ends of documents.
        vocab_size: of the model; a token that it does not have is refused when its row is taken, for ranks that
            share a vocabulary leave out what is not theirs, and would leave out such a token on all ranks.
        source: what the data is called, for messages.
        epoch_rows: rows of one pass through the data; None where there is no such thing.
    """

    count: int
    row: Callable[[int], Row]
    shuffled: bool
    seed: int
    apart: bool
    vocab_size: int
    source: str
    epoch_rows: Callable[[], float | None] = lambda: None

    def batches(self, consumed: int, size: int, micro: int, rank: int = 0, ranks: int = 1) -> list[Batch]:
        """A step's micro-batches of one data-parallel rank.

        Args:
            consumed: rows of all ranks before the step.
            size: rows of all ranks in the step.
            micro: rows a micro-batch.
            rank: data-parallel rank.
            ranks: their number; `micro * ranks` divides `size`.
        """
        starts = range(consumed + rank * micro, consumed + size, micro * ranks)
        return [_batch([self._known(self._number(start + k)) for k in range(micro)], self.apart) for start in starts]

    def _known(self, number: int) -> Row:
        """A row whose tokens the model has."""
        row = self.row(number)
        for tokens in (row.tokens, row.labels):
            if int(tokens.min()) < 0 or int(tokens.max()) >= self.vocab_size:
                at = int(((tokens < 0) | (tokens >= self.vocab_size)).nonzero()[0])
                said = unknown(int(tokens[at]), self.vocab_size, f"position {at}")
                raise BridgeError(f"reading row {number} of {self.source}: {said}")
        return row

    def numbers(self, consumed: int, size: int) -> list[int]:
        """Which rows a step takes."""
        return [self._number(consumed + k) for k in range(size)]

    def _number(self, position: int) -> int:
        epoch, place = divmod(position, self.count)
        return int(_order(self.count, self.seed, epoch)[place]) if self.shuffled else place


def _batch(rows: Sequence[Row], apart: bool) -> Batch:
    tokens, labels, weights = (torch.stack([getattr(r, n) for r in rows]) for n in ("tokens", "labels", "loss_mask"))
    padding = torch.stack([_padding(r) for r in rows])
    if not apart:
        return Batch(tokens, labels, weights, padding if padding.any() else None)
    # Documents of several rows are documents of one longer row.
    length = tokens.shape[1]
    ends = [r.cu_seqlens[1:] + number * length for number, r in enumerate(rows)]
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int32), *ends])
    tokens, labels, weights, padding = (x.reshape(1, -1) for x in (tokens, labels, weights, padding))
    return Batch(tokens, labels, weights, padding if padding.any() else None, cu_seqlens)


def _padding(row: Row) -> torch.Tensor:
    return torch.arange(len(row.tokens)) >= (len(row.tokens) if row.used is None else row.used)


_orders: dict[tuple[int, int, int], np.ndarray] = {}


def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    key = (count, seed, epoch)
    if key not in _orders:
        while len(_orders) > 3:
            _orders.pop(next(iter(_orders)))
        _orders[key] = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)
    return _orders[key]


def chat_row(tokens: np.ndarray, mask: np.ndarray, ends: np.ndarray, seq_length: int, pad: int) -> Row:
    """A pack of chats, padded: each token's label is the next of its document, learned where the mask says so.

    Args:
        tokens: int [n], n at most seq_length.
        mask: bool [n], which tokens are learned.
        ends: [documents + 1], from 0 to n.
        seq_length: tokens of the row.
        pad: token behind the last document; all of them are one more document.
    """
    used = len(tokens)
    whole, labels = np.full(seq_length, pad, np.int64), np.full(seq_length, pad, np.int64)
    weights = np.zeros(seq_length, np.float32)
    whole[:used] = tokens
    labels[: used - 1], weights[: used - 1] = tokens[1:], mask[1:]
    weights[ends[1:] - 1] = 0  # the token behind a document's last is another document's
    boundaries = ends if used == seq_length else np.append(ends, seq_length)
    return Row(
        torch.from_numpy(whole),
        torch.from_numpy(labels),
        torch.from_numpy(weights),
        torch.from_numpy(boundaries.astype(np.int32)),
        used,
    )


def make_feeds(recipe: Recipe, spec: ModelSpec, rows: int, valid_rows: int) -> tuple[Feed, Feed | None]:
    """Training and validation rows of a recipe; with several ranks, all of them call it.

    Args:
        recipe: the run.
        spec: the model's numbers.
        rows: that the whole run takes.
        valid_rows: that one validation takes; 0: none are made.

    Raises:
        BridgeError: no data, or data that the model cannot read.
    """
    data = recipe.data
    if not data.train:
        raise BridgeError(
            f"training with recipe {recipe.name}: data.train is empty; make data with `dsv4 data` and say "
            "data.train=PATH"
        )
    if data.kind == "chat":
        return _chats(recipe, spec, data.train), _chats(recipe, spec, data.valid) if data.valid else None
    checked_split(data.split)  # also where nothing is validated, and all of it is trained on
    build: dict[str, Any] = {
        "seq_length": data.seq_length,
        "eos_token_id": spec.eos_token_id,
        "vocab_size": spec.vocab_size,
        "seed": data.seed,
        "cache": Path(data.cache or Path(recipe.out) / "samples"),
        "apart": data.documents_apart,
        "tokenizer_sha256": _tokenizer_of(recipe),
    }
    if data.valid:
        train, _, _ = build_pretraining_datasets(data.train, samples=(rows, 0, 0), split="1,0,0", **build)
        _, valid, _ = build_pretraining_datasets(data.valid, samples=(0, valid_rows, 0), split="0,1,0", **build)
    else:
        train, valid, _ = build_pretraining_datasets(
            data.train, samples=(rows, valid_rows, 0), split=data.split if valid_rows else "1,0,0", **build
        )
    assert train is not None
    names = " ".join(data.train), " ".join(data.valid or data.train)
    size = spec.vocab_size
    return text_feed(train, size, names[0]), None if valid is None else text_feed(valid, size, names[1])


def text_feed(rows: PretrainingDataset, vocab_size: int, source: str) -> Feed:
    """The samples as they come: megatron-core has shuffled them."""

    def row(number: int) -> Row:
        sample = rows[number]
        return Row(sample["tokens"], sample["labels"], sample["loss_mask"], sample["cu_seqlens"])

    return Feed(len(rows), row, False, 0, rows.apart, vocab_size, source, rows.epoch_rows)


def _tokenizer_of(recipe: Recipe) -> str | None:
    """Digest of the run's tokenizer.json; None where it has none."""
    folder = small_folder(recipe)
    file = folder and folder / TOKENIZER
    return hashlib.sha256(file.read_bytes()).hexdigest() if file and file.is_file() else None


def _chats(recipe: Recipe, spec: ModelSpec, where: Sequence[str]) -> Feed:
    from ..data.chat.store import open_chat_data

    if len(where) != 1:
        raise BridgeError(f"reading chats: {len(where)} folders ({', '.join(where)}), expected one")
    if not Path(where[0]).is_dir() and Path(f"{where[0]}.idx").is_file():
        raise BridgeError(
            f"reading chats {where[0]}: that is data of text, and recipe {recipe.name} learns conversations; make them "
            "with dsv4 data and --seq-length, or say data.kind=text"
        )
    packs, length = open_chat_data(Path(where[0]), _tokenizer_of(recipe)), recipe.data.seq_length
    if packs.seq_length > length:
        raise BridgeError(
            f"reading chats {where[0]}: packs of up to {packs.seq_length} tokens, data.seq_length is {length}; "
            "prepare the data for that length, or train with the longer one"
        )
    _check_chat_ids(packs, spec.vocab_size, where[0])
    if not recipe.data.documents_apart and bool((np.diff(packs.packs) > 1).any()):
        raise BridgeError(
            f"reading chats {where[0]}: several conversations share a row, and with data.documents_apart=false "
            "attention would cross from one to another; leave it true, or prepare the data with --no-pack"
        )

    def row(number: int) -> Row:
        pack = packs[number]
        return chat_row(pack.tokens, pack.loss_mask, pack.cu_seqlens, length, spec.eos_token_id or 0)

    apart = recipe.data.documents_apart
    count = len(packs)
    return Feed(count, row, True, recipe.data.seed, apart, spec.vocab_size, where[0], lambda: count)


def _check_chat_ids(chats: "ChatData", vocab_size: int, where: str) -> None:
    def place(token: int) -> str:
        document = int(np.searchsorted(chats.offsets, token, "right")) - 1
        return f"token {token - int(chats.offsets[document])} of the conversation of line {int(chats.lines[document])}"

    check_token_ids(chats.tokens, vocab_size, f"reading chats {where}", place)
