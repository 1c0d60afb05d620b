"""How many ranks of each kind, and which pipeline chunk holds what."""

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

from ..errors import BridgeError
from ..spec.plan import Item
from ..spec.spec import ModelSpec
from .balance import solve
from .layout import Layout


@dataclass(frozen=True)
class Sizes:
    """Ranks of each parallel group; data parallelism takes those that are left.

    Attributes:
        tp: tensor-parallel ranks: attention heads, output groups, vocabulary, shared expert.
        pp: pipeline ranks.
        ep: expert-parallel ranks: whole experts.
        etp: expert-tensor-parallel ranks: each expert's width.
        cp: context-parallel ranks: the tokens of every row.
        vp: chunks of layers a pipeline rank holds.
    """

    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1
    cp: int = 1
    vp: int = 1

    def __str__(self) -> str:
        several = [f"{f.name} {getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) > 1]
        return ", ".join(several) or "one rank"


@dataclass(frozen=True)
class Topology:
    """How a model is cut: the sizes, and the pipeline layout.

    Attributes:
        sizes: of the parallel groups.
        layout: which chunk of the pipeline holds what.
    """

    sizes: Sizes
    layout: Layout

    @property
    def tp(self) -> int:
        """Tensor-parallel ranks."""
        return self.sizes.tp

    @property
    def pp(self) -> int:
        """Pipeline ranks."""
        return self.sizes.pp

    @property
    def ep(self) -> int:
        """Expert-parallel ranks."""
        return self.sizes.ep

    @property
    def cp(self) -> int:
        """Context-parallel ranks."""
        return self.sizes.cp

    @property
    def etp(self) -> int:
        """Expert-tensor-parallel ranks."""
        return self.sizes.etp


class Coordinate(NamedTuple):
    """One rank's place in each group."""

    tp: int = 0
    pp: int = 0
    ep: int = 0
    etp: int = 0


def make_topology(spec: ModelSpec, sizes: Sizes | None = None, layout: Layout | None = None) -> Topology:
    """A topology that the model can be cut by; without a layout, the solver's.

    Raises:
        BridgeError: each size that does not divide what it cuts, with the sizes that do.
    """
    sizes = sizes or Sizes()
    tp, ep, etp = sizes.tp, sizes.ep, sizes.etp
    divided = (
        ("tp", tp, "o_groups", spec.o_groups),
        ("tp", tp, "num_attention_heads", spec.num_attention_heads),
        ("tp", tp, "vocab_size", spec.vocab_size),
        ("tp", tp, "the shared expert's width", spec.shared_intermediate_size),
        ("ep", ep, "n_routed_experts", spec.n_routed_experts),
        ("etp", etp, "moe_intermediate_size", spec.moe_intermediate_size),
    )
    wrong = [
        f"{name} {size} does not divide {what} {total} (nearest that does: {_nearest(size, total)})"
        for name, size, what, total in divided
        if size < 1 or total % size
    ]
    if wrong:
        raise BridgeError("cutting the model: " + "; ".join(wrong))
    layout = layout or solve(spec, sizes.pp, sizes.vp)
    return Topology(replace(sizes, vp=layout.vp), layout)


# Tokens of the longest compressed block.
_BLOCK = 128


def least_share(window: int) -> int:
    """Tokens of a row that a context-parallel rank has at least.

    Then all that a rank needs of earlier tokens, but for compressed entries, lies on the rank before: the window's
    keys, and the beginning of a block that the cut goes through.
    """
    return max(window, _BLOCK) - 1


def check_rows(length: int, sizes: Sizes, window: int, doing: str) -> None:
    """Refuse rows that ranks cannot have equal shares of.

    Args:
        length: tokens a row.
        sizes: of the groups; context parallelism cuts rows, and sequence parallelism each share.
        window: of the attention.
        doing: what is being done, for the message.

    Raises:
        BridgeError: the rule, and the nearest length that works.
    """
    unit, least = sizes.cp * sizes.tp, least_share(window)
    if sizes.cp == 1 or (length % unit == 0 and length >= least * sizes.cp):
        return
    near = max(-(-least // sizes.tp), round(length / unit)) * unit
    raise BridgeError(
        f"{doing}: {length} tokens a row over cp {sizes.cp} and tp {sizes.tp} (rule: cp*tp divides them, and each "
        f"context-parallel rank has {least} or more). Nearest that works: {near}"
    )


def _nearest(size: int, total: int) -> int:
    return min((d for d in range(1, total + 1) if total % d == 0), key=lambda d: (abs(d - size), d))


def chunk_of(item: Item, spec: ModelSpec, layout: Layout) -> tuple[int, ...]:
    """Numbers of the pipeline chunks that hold an item: one, and a second for the embedding that MTP reads."""
    last = len(layout.chunks) - 1
    if item.block.kind == "layer":
        return (next(n for n, c in enumerate(layout.chunks) if c.start <= item.block.index < c.stop),)
    if item.row.scope != "first":
        return (last,)
    return (0, last) if spec.mtp_layers and last else (0,)
