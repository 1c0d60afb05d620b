"""Training samples from megatron-core's indexed datasets: blended, split, shuffled, documents kept apart.

megatron-core builds the indices (which documents, in which order, cut where) and reads the tokens; here
are what it leaves to its callers: the checks and the end-of-document rules.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import BridgeError, let_go, os_error, short
from ..strict_json import read_json
from .index_files import IndexFacts, check_indexed
from .token_ids import check_token_ids

_MOST_FACTS = 1 << 20
_HEADER = 1024  # bytes of a .npy in which its type is said
_EDGE = 32 << 20  # bytes of an index's ends that its fingerprint takes in
SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Blend:
    """Datasets to draw from.

    Attributes:
        prefixes: paths without `.bin` and `.idx`.
        weights: share of samples of each, any scale; None: by their tokens.
    """

    prefixes: tuple[str, ...]
    weights: tuple[float, ...] | None = None


def parse_blend(data: str | Path | Sequence[str | Path]) -> Blend:
    """A blend as it is written: `a`, `a b`, or `0.3 a 0.7 b`; or such a list.

    Raises:
        BridgeError: nothing, or weights that are not positive numbers in front of each prefix.
    """
    words = (
        data.split() if isinstance(data, str) else [str(d) for d in (data if isinstance(data, Sequence) else [data])]
    )
    weights = [_number(word) for word in words]
    doing = f"reading the data blend {short(' '.join(words))}"
    if not words:
        raise BridgeError(f"{doing}: nothing in it; name prefixes, as 0.3 a 0.7 b")
    if all(weight is None for weight in weights):
        return Blend(tuple(words))
    alternate = [weight is not None for weight in weights] == [True, False] * (len(words) // 2)
    if not alternate or len(words) % 2 or any(not 0 < (w or 0) < float("inf") for w in weights[::2]):
        raise BridgeError(f"{doing}: expected a positive number in front of every prefix, or none at all")
    return Blend(tuple(words[1::2]), tuple(float(w) for w in words[::2]))


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


class PretrainingDataset(Dataset[dict[str, Tensor]]):
    """Samples in their final, shuffled order; the same for the same data, seed, length, split and sizes.

    A sample has

    - `tokens`: [s] int64.
    - `labels`: [s] int64, the token after each.
    - `loss_mask`: [s] float32, 0 where the label is another document's.
    - `cu_seqlens`: [documents + 1] int32, where each document begins in the row, and its end; [0, s] where
      documents are not kept apart.

    Args:
        rows: megatron-core's dataset.
        seq_length: tokens of a sample.
        eos_token_id: the end-of-document token.
        apart: whether documents are kept apart.
        evenly: whether every token is drawn as often as any other, as where no weights are given.
    """

    def __init__(self, rows: Any, seq_length: int, eos_token_id: int, apart: bool, evenly: bool = False):
        self.rows, self.seq_length, self.eos_token_id, self.apart = rows, seq_length, eos_token_id, apart
        self._evenly = evenly

    def epoch_rows(self) -> float | None:
        """Samples of one pass through the data; None where it is blended by weights, and has no such thing."""
        parts = getattr(self.rows, "datasets", [self.rows])
        if not self._evenly or any(not hasattr(part, "dataset") or len(part.indices) == 0 for part in parts):
            return None
        tokens = 0
        for part in parts:
            first, last = int(part.indices[0]), int(part.indices[-1]) + 1  # a split is a range of documents
            tokens += int(part.dataset.sequence_lengths[first:last].sum(dtype=np.int64))
        return tokens / self.seq_length

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.rows[range(len(self))[index]]
        tokens, labels, mask = row["tokens"], row["labels"], row["loss_mask"].clone()
        ends = row["cu_seqlens"]
        ends = ends[: int((ends < self.seq_length).sum()) + 1]  # megatron repeats the last to make all one size
        if self.apart:
            mask[ends[1:-1].long() - 1] = 0.0
            if tokens[-1] == self.eos_token_id:  # the document ends with the row
                mask[-1] = 0.0
        else:
            ends = torch.tensor([0, self.seq_length], dtype=torch.int32)
        return {"tokens": tokens, "labels": labels, "loss_mask": mask, "cu_seqlens": ends}


def build_pretraining_datasets(
    data: Blend | str | Path | Sequence[str | Path],
    *,
    seq_length: int,
    samples: tuple[int, int, int],
    eos_token_id: int,
    vocab_size: int,
    split: str = "99,1,0",
    seed: int = 1234,
    cache: Path | None = None,
    apart: bool = True,
    tokenizer_sha256: str | None = None,
) -> tuple[PretrainingDataset | None, PretrainingDataset | None, PretrainingDataset | None]:
    """Training, validation and test samples of a blend.

    With torch.distributed, every rank calls it: rank 0 builds the indices, the others wait and read them
    from `cache`, which must be on a disk that all see.

    Args:
        data: what to draw from, see `parse_blend`.
        seq_length: tokens of a sample.
        samples: how many are needed of each; data is repeated, reshuffled, as often as that takes.
        eos_token_id: the end-of-document token.
        vocab_size: of the model.
        split: shares of the documents for the three, in the order of the documents.
        seed: of the shuffles.
        cache: folder for indices; by default `dataset_cache` beside the first data.
        apart: whether documents of a row are kept apart: `cu_seqlens`, and no loss across a boundary.
        tokenizer_sha256: of the model's tokenizer.json; data of another is refused.

    Returns:
        For each, None where no samples are asked for.

    Raises:
        BridgeError: data that is not there, damaged, or another model's (an id beyond the vocabulary, where it is
            read: see `token_ids`); a split that leaves nothing.
    """
    blend = data if isinstance(data, Blend) else parse_blend(data)
    if seq_length < 1 or min(samples) < 0:
        raise BridgeError(f"building datasets: seq_length {seq_length}, samples {samples}; expected 1 or more, and 0")
    from ..mcore import cpu

    cpu.install()
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    held = [_look(prefix, eos_token_id, vocab_size, tokenizer_sha256) for prefix in blend.prefixes]
    weights = blend.weights or (tuple(float(h.tokens) for h in held) if len(held) > 1 else None)
    place = cache or Path(blend.prefixes[0]).parent / "dataset_cache"
    _check_cache(place)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # the first rank writes there next, and a half written index is none
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend=(list(blend.prefixes), None if weights is None or len(held) == 1 else list(weights)),
        split=checked_split(split),
        path_to_cache=str(place),
        tokenizer=_Marks(eos_token_id, tuple(h.fingerprint for h in held)),  # type: ignore[arg-type]
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        inter_document_masking=True,
    )
    # A share that nothing is asked of is not built: in an empty one megatron-core would look for samples without end.
    shares = [share if n else None for share, n in zip(config.split_matrix or (), samples, strict=True)]
    config.split_matrix = shares  # type: ignore[assignment]
    _check_shares(held, shares, samples)
    try:
        built = BlendedMegatronDatasetBuilder(GPTDataset, list(samples), _here, config).build()
    except Exception as error:
        # megatron wraps what the disk says of its cache in a bare Exception.
        reason = error.__cause__ if isinstance(error.__cause__, OSError) else error
        if not isinstance(reason, (OSError, ValueError, EOFError, AssertionError)):
            raise
        let_go(error)
        raise _unusable(place, reason) from None
    evenly = blend.weights is None or len(held) == 1
    found = (
        PretrainingDataset(rows, seq_length, eos_token_id, apart, evenly) if wanted else None
        for rows, wanted in zip(built, samples, strict=True)
    )
    train, valid, test = found
    return train, valid, test


def _here() -> bool:
    """Every rank has the data: stages need the ids for hashed layers and MTP, and mapped files cost nothing."""
    return True


def _check_cache(place: Path) -> None:
    """Refuse arrays of objects among the cached indices: megatron-core would unpickle them."""
    try:
        for path in place.glob("*.npy") if place.is_dir() else ():
            with path.open("rb") as file:
                start = file.read(_HEADER)
            if not start.startswith(b"\x93NUMPY") or b"O'" in start.partition(b"\n")[0]:
                raise BridgeError(f"building datasets in {place}: {path.name} is no index; remove that folder")
    except OSError as error:
        raise _unusable(place, error) from None


def _unusable(place: Path, error: BaseException) -> BridgeError:
    match error:
        case OSError(filename=str(name)) if not Path(name).absolute().is_relative_to(place.absolute()):
            return BridgeError(f"building datasets: {os_error(error)}")
        case AssertionError():  # how megatron-core says that a file which was there is gone
            return BridgeError(f"building datasets: {error or 'megatron-core refuses them'}; repeat when it is at rest")
    return BridgeError(f"building datasets in {place}: {error}; remove that folder, or name another cache")


def checked_split(split: str) -> str:
    """Shares as megatron reads them: `99,1,0`.

    Raises:
        BridgeError: no one to three numbers of 0 or more, or all 0.
    """
    shares = [_number(part) for part in split.split(",")]
    if not 1 <= len(shares) <= 3 or any(s is None or not 0 <= s < float("inf") for s in shares) or not any(shares):
        raise BridgeError(
            f"building datasets: split {short(split)}, expected shares of train, valid and test, as 99,1,0"
        )
    # megatron finds numbers by a pattern that knows no exponents.
    return ",".join(format(s or 0.0, "f") for s in shares)


@dataclass(frozen=True)
class _Held:
    """One indexed dataset: int32 [documents] of their lengths, all tokens, and what tells it from another."""

    prefix: str
    lengths: np.ndarray
    tokens: int
    fingerprint: str


class _Marks:
    """What megatron-core wants to know of a tokenizer, and what its cache's names are made from.

    The names must change with the data: those that megatron makes hold only the path, so data written anew
    under an old name would be read by the old indices.
    """

    vocab_size = None
    pad = -1  # no sample is padded

    def __init__(self, eod: int, fingerprints: tuple[str, ...]):
        self.eod = eod
        self.unique_identifiers = {"eod": eod, "data": fingerprints}


def _look(prefix: str, eos_token_id: int, vocab_size: int, tokenizer_sha256: str | None) -> _Held:
    """Open one dataset and check it.

    Raises:
        BridgeError: not there, damaged, or another model's.
    """
    doing = f"opening the data {prefix}"
    told = check_indexed(prefix, doing)
    beside = Path(f"{prefix}.json")
    facts = read_json(beside, _MOST_FACTS) if beside.is_file() else {}
    wanted = {"eos_token_id": eos_token_id, "vocab_size": vocab_size, "tokenizer_sha256": tokenizer_sha256}
    for name, value in wanted.items():
        if value is not None and facts.get(name, value) != value:
            raise BridgeError(
                f"{doing}: its {name} is {short(facts[name])}, the model's is {short(value)}; "
                "make it with the model's tokenizer"
            )
    _check_ids(Path(f"{prefix}.bin"), told, vocab_size, doing)
    return _Held(prefix, told.lengths, told.tokens, _fingerprint(Path(f"{prefix}.idx")))


def _check_ids(path: Path, told: IndexFacts, vocab_size: int, doing: str) -> None:
    """The ids of a `.bin`, which is as long as its index says."""

    def place(token: int) -> str:
        ends = told.lengths.cumsum(dtype=np.int64)
        document = int(np.searchsorted(ends, token, "right"))
        return f"token {token - int(ends[document] - told.lengths[document])} of document {document}"

    check_token_ids(np.memmap(path, told.dtype, "r"), vocab_size, doing, place)


def _fingerprint(index: Path) -> str:
    """Hash of an index, of very long ones of both ends: lengths of the first documents, offsets of the last."""
    size = index.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with index.open("rb") as file:
        digest.update(file.read(_EDGE))
        if size > 2 * _EDGE:
            file.seek(-_EDGE, os.SEEK_END)
        digest.update(file.read())
    return digest.hexdigest()


def _check_shares(held: Sequence[_Held], shares: Sequence[Any], samples: Sequence[int]) -> None:
    """Refuse shares without documents."""
    for name, share, wanted in zip(SPLITS, shares, samples, strict=True):
        if not wanted:
            continue
        if share is None:
            raise BridgeError(f"building datasets: {wanted} {name} samples of a split that gives it no share")
        for one in held:
            documents = len(one.lengths)
            first, end = (round(edge * documents) for edge in share)
            # Documents without tokens count as none: megatron-core would repeat them without end.
            if end <= first or not one.lengths[first:end].any():
                raise BridgeError(
                    f"building datasets: {one.prefix} has {documents} documents, and the split leaves none of them "
                    f"for {name}; give {name} a larger share, or ask for no {name} samples"
                )
