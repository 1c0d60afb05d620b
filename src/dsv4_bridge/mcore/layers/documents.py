"""Several documents in one row: where each begins, and what must not cross from one to the next.

Everything but attention and multi-token prediction looks at one token at a time. Attention runs each
document's slice on its own, so that window, compressed blocks (an unfinished last one makes none) and
the indexer see that document only, exactly as if it came alone; positions restart with it.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from ...errors import BridgeError

Documents = tuple[slice, ...]


def documents_of(cu_seqlens: Tensor, batch: int, length: int) -> Documents:
    """The slice of every document of a packed row.

    Args:
        cu_seqlens: [documents + 1] integers, first tokens of the documents and the row's end: 0, …, `length`
            (megatron's and FlashAttention's cumulative lengths). Best on the CPU: on a GPU, reading it waits.
        batch: rows, which must be 1.
        length: tokens of the row.

    Returns:
        Slices in order; repeated boundaries, as padding of `cu_seqlens` makes them, are left out.

    Raises:
        BridgeError: more rows than one, or boundaries that do not cover the row in order.
    """
    doing = "running the model on packed documents"
    if batch != 1:
        raise BridgeError(
            f"{doing}: {batch} rows with one cu_seqlens; lay the rows one behind another, [1, {batch * length}], "
            "with every row's end among the boundaries"
        )
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        kind = f"{cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        raise BridgeError(f"{doing}: cu_seqlens is {kind}, expected int32 [documents + 1]")
    ends = cu_seqlens.tolist()
    if len(ends) < 2 or ends[0] != 0 or ends[-1] != length or ends != sorted(ends):
        shown = f"{ends[:4]} … {ends[-2:]}" if len(ends) > 8 else f"{ends}"
        raise BridgeError(f"{doing}: cu_seqlens is {shown}, expected boundaries in order from 0 to {length}")
    return tuple(slice(start, stop) for start, stop in pairwise(ends) if stop > start)


def restarting_positions(documents: Documents, device: torch.device) -> Tensor:
    """Position of every token in its document: [s] int64."""
    return torch.cat([torch.arange(part.stop - part.start, device=device) for part in documents])


def roll_boundaries(documents: Documents | None) -> PackedSeqParams | None:
    """What megatron's `roll_tensor` and MTP loss are told, so that no shift crosses a document."""
    if documents is None:
        return None
    ends = torch.tensor(ends_of(documents), dtype=torch.int32)
    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends)


def ends_of(documents: Sequence[slice]) -> list[int]:
    """Boundaries: 0 and the end of each document."""
    return [0, *(part.stop for part in documents)]
