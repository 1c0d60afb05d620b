"""A checkpoint of either format, opened: one type to the outside."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np

from ..errors import BridgeError, files_named, short
from ..files import AnyPath
from ..spec.megatron import regions
from ..spec.plan import Item, Plan, stored
from ..spec.spec import ModelSpec
from .hf import HFCheckpoint, open_hf
from .hub import resolve
from .megatron import MegatronCheckpoint, has_config, looks_megatron, open_along, open_megatron
from .safetensors import Shard
from .values import HFValues, MegatronValues, Scratch, Values


class Tensor(NamedTuple):
    """What is known of a tensor without reading it.

    Attributes:
        shape: of its values.
        encoding: how it is stored: bf16, f32, fp8, fp8_f32, mxfp4, i32, i64.
        kind: row of the table of tensors.
        nbytes: on disk, scales included.
    """

    shape: tuple[int, ...]
    encoding: str
    kind: str
    nbytes: int


@dataclass(frozen=True, repr=False)
class Checkpoint:
    """An opened checkpoint; closes its files at the end of a `with`.

    Attributes:
        path: the folder.
        opened: what its format alone has.
        along: what travels with a Megatron checkpoint, and has no place in it.
    """

    path: Path
    opened: HFCheckpoint | MegatronCheckpoint
    along: HFCheckpoint | None = None

    @property
    def kind(self) -> str:
        """`huggingface` or `megatron`."""
        return "huggingface" if isinstance(self.opened, HFCheckpoint) else "megatron"

    @property
    def spec(self) -> ModelSpec:
        """The model's numbers."""
        return self.opened.spec

    @property
    def plan(self) -> Plan:
        """Every item of such a model."""
        return self.opened.plan

    @property
    def variant(self) -> str:
        """The released variant, `custom (…)` for other sizes, `unknown` where another tool wrote it."""
        opened = self.opened
        return opened.variant if isinstance(opened, HFCheckpoint) else str(opened.source.get("variant", "unknown"))

    @property
    def files(self) -> Path:
        """The folder of its small files: tokenizer, generation config, licence."""
        return self.path if isinstance(self.opened, HFCheckpoint) else self.opened.along

    @cached_property
    def source(self) -> Values:
        """Where its items' values come from, a stripe at a time."""
        opened = self.opened
        if isinstance(opened, HFCheckpoint):
            return HFValues(opened)
        return MegatronValues(opened.reader, opened.spec, opened.naming)

    @cached_property
    def passengers(self) -> HFValues | None:
        """Where those come from that travel with a Megatron checkpoint."""
        return HFValues(self.along) if self.along else None

    @cached_property
    def _wrong_keys(self) -> frozenset[str]:
        """Keys of a Megatron checkpoint that were found to be missing or of another shape or type."""
        return frozenset(name for finding in self.opened.findings for name in finding.names)

    @cached_property
    def items(self) -> Mapping[str, Item]:
        """Released name -> item, of those that it holds."""
        return {name: item for name, item in self.plan.by_name.items() if self.source_of(item)}

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """Released name -> what is known of the tensor, in the order of the release."""
        return {name: self._tensor(item) for name, item in self.items.items()}

    def values(self, name: str) -> np.ndarray:
        """A whole tensor, decoded.

        Args:
            name: its released name, as `layers.0.attn.wq_a.weight`.

        Returns:
            float32 of its shape (bf16 widened, exactly), or int64 for tables of ids.

        Raises:
            BridgeError: no tensor of that name, or it cannot be read.
        """
        item = self.items.get(name)
        source = self.source_of(item) if item else None
        if item is None or source is None:
            near = [n for n in self.tensors if n.startswith(name)][:3]
            hint = f"; it has {', '.join(near)}" if near else "; names are released ones, see `tensors`"
            raise BridgeError(f"reading {self.path}: it has no tensor {short(name)}{hint}")
        ids = item.row.encoding == "int"
        out, at, scratch = np.empty(item.shape, np.int64 if ids else np.float32), 0, Scratch()
        with files_named(f"reading {name} of {self.path}"):
            for stripe in source.stripes(item, 0, item.shape[0], scratch):
                wide = stripe if ids or stripe.dtype != np.uint16 else stripe.astype(np.uint32) << 16
                out[at : at + len(stripe)] = wide if ids else wide.view(np.float32)
                at += len(stripe)
        return out

    def close(self) -> None:
        """Close its files."""
        for opened in (self.opened, self.along):
            if opened:
                opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Checkpoint {self.path}: {self.kind}, {self.variant}, {len(self.tensors):,} tensors>"

    def source_of(self, item: Item) -> Values | None:
        """Where an item's values come from; None for what is not there, or is not what the model has."""
        opened = self.opened
        if isinstance(opened, HFCheckpoint):
            return self.source if item.name in opened.bound else None
        if not item.passenger:
            wrong = self._wrong_keys
            held = not wrong or all(r.key not in wrong for r in regions(item, opened.spec, opened.naming))
            return self.source if held else None
        return self.passengers if self.along and item.name in self.along.bound else None

    def _tensor(self, item: Item) -> Tensor:
        source: Any = self.source_of(item)
        encoding = source.encoding(item)
        return Tensor(item.shape, encoding, item.row.key, sum(fact.nbytes for fact in stored(item, encoding)))


@files_named("opening")
def open_checkpoint(
    name: AnyPath,
    revision: str | None = None,
    *,
    strict: bool = True,
    like: AnyPath | None = None,
    headers: Mapping[str, Shard] | None = None,
) -> Checkpoint:
    """Open a checkpoint; its tensors are read when they are asked for.

    Args:
        name: a Hugging Face folder, a Megatron checkpoint (root or iteration folder), or `owner/name` on the Hub,
            whose files are fetched.
        revision: branch, tag or commit on the Hub.
        strict: refuse what is not in itself the checkpoint of one model; otherwise its findings say so.
        like: released folder with the model's numbers, for a Megatron checkpoint that does not say them.
        headers: of its shards, where they are not in the folder (see `hub.describe`).

    Raises:
        BridgeError: there is none, or its tensors are not those of its model.
    """
    path = resolve(os.fspath(name), revision)
    if not looks_megatron(path):
        return Checkpoint(path, open_hf(path, strict=strict, headers=headers))
    megatron = open_megatron_beside(path, like, strict=strict)
    try:
        return Checkpoint(path, megatron, open_along(megatron))
    except BaseException:
        megatron.close()
        raise


def open_megatron_beside(path: Path, like: AnyPath | None = None, *, strict: bool = True) -> MegatronCheckpoint:
    """Open a Megatron checkpoint, with the numbers of the release `like` where it does not say its own."""
    beside = open_hf(like) if like is not None and _is_released(Path(like)) and not has_config(path) else None
    try:
        return open_megatron(path, beside, strict)
    finally:
        if beside:
            beside.close()


def _is_released(path: Path) -> bool:
    return (path / "config.json").is_file() and not looks_megatron(path)
