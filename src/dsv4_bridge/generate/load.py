"""The model that makes the text: whole in memory, or left in its checkpoint."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import BridgeError
from ..free_memory import free_memory, held_memory
from ..parallel.topology import make_topology
from ..ranks import Ranks
from ..spec.plan import check_computed, expand
from ..spec.spec import ModelSpec
from ..store.checkpoint import open_checkpoint

if TYPE_CHECKING:
    import torch

    from ..mcore import DeepSeekV4Model

_SHARE = 0.8  # of the free memory: the rest is for activations, caches and others


@dataclass(frozen=True)
class Streamed:
    """Weights of a model that stays in its checkpoint.

    Attributes:
        memory: bytes for weights.
        every_token: bytes that every token needs, besides experts.
        kept: of those, bytes in memory.
        room: experts of a layer in memory.
        read: bytes that were read while tokens were made.
        hits: experts that tokens went to and that were in memory.
        misses: experts that were read for them.
    """

    memory: int
    every_token: int
    kept: int
    room: int
    read: int
    hits: int
    misses: int


@contextmanager
def loaded(
    path: Path, spec: ModelSpec, dtype: str, stream: bool | None, memory: int | None
) -> "Iterator[tuple[DeepSeekV4Model, Callable[[], Streamed] | None]]":
    """The model, and what tells of weights that stay in the checkpoint."""
    check_computed(spec, f"generating with {path}")
    try:
        from .. import mcore
    except ImportError as error:
        raise BridgeError(f"generating: {error.name} is missing; pip install 'dsv4-bridge[megatron]'") from None
    import torch

    from ..mcore.runtime import free_memory as free_on_device

    kind = torch.float32 if dtype == "float32" else torch.bfloat16
    ranks = Ranks.from_environment().world
    if ranks > 1:  # each holds a share of the experts, and all of the rest
        if stream:
            raise BridgeError("generating: --stream is of one process; leave it out, or start without torchrun")
        make_topology(spec, mcore.Parallel(ep=ranks))
        mcore.initialize(mcore.Parallel(ep=ranks))
    numbers = (item.numel / (1 if item.expert is None else ranks) for item in expand(spec).items)
    size = sum(numbers) * kind.itemsize
    free, where = free_on_device()
    if stream or (stream is None and size > free and ranks == 1):
        yield from _streamed(path, spec, kind, memory)
        return
    if size > free:
        hint = "" if dtype == "bf16" else "; --dtype bf16 takes half"
        whose = "a rank" if ranks > 1 else "the model"
        raise BridgeError(
            f"loading {path}: {whose} takes {size / 1e9:,.1f} GB in {dtype}, and {free / 1e9:,.1f} GB of {where} "
            f"are free{hint}"
        )
    model = mcore.build_model(spec, dtype=kind, initialize_weights=False)
    mcore.load_weights(model, path, allow_lossy=True)
    yield model.eval(), None


def _streamed(
    path: Path, spec: ModelSpec, kind: "torch.dtype", memory: int | None
) -> "Iterator[tuple[DeepSeekV4Model, Callable[[], Streamed]]]":
    from ..mcore.weights.encoded import EncodedModel

    allowed = int(_SHARE * free_memory()) if memory is None else memory - held_memory()
    with open_checkpoint(path) as checkpoint, EncodedModel(checkpoint.source, spec, kind, allowed) as encoded:
        shelf = encoded.shelf

        def told() -> Streamed:
            reads = shelf.reads
            room = min(shelf.room, spec.n_routed_experts)  # a small model has fewer than there is room for
            return Streamed(allowed, shelf.whole, shelf.kept, room, reads.nbytes, reads.hits, reads.misses)

        yield encoded.model, told
