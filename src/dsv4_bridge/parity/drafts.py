"""Blocks of multi-token prediction against the formula, for transformers has none.

Both get what the reference's last layer gave, so that the block's own difference is left; ours takes the formula's
choices of experts, and what it would have chosen itself is compared. The formula reads the reference's checkpoint, a
matrix at a time, of experts those that a token chose.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..codec.tensors import as_tensor
from ..free_memory import give_back
from ..mcore.layers.observe import watching
from ..spec.megatron import live_names
from ..spec.plan import Item, Plan, expand
from ..spec.spec import ModelSpec
from ..store.values import Scratch, Values
from .formula import Formula, look_ahead
from .metrics import compare_logits
from .opened import opened_whole
from .recording import Watcher
from .reference import Record
from .result import Draft, Tolerance

# Tokens of a row: the blocks look back no further than the window of 128, and float64 over a vocabulary is slow.
MOST = 160


def left_out(ours: ModelSpec, theirs: ModelSpec) -> str | None:
    """Why draft blocks are not compared; None: they are, or there are none."""
    if ours.dspark or theirs.dspark:
        return "DSpark stages, which neither side computes"
    if ours.mtp_layers != theirs.mtp_layers:
        return f"MTP blocks, for one checkpoint has {ours.mtp_layers} and the other {theirs.mtp_layers}"
    if any(ours.compress_ratios[ours.num_hidden_layers :]):
        return "MTP blocks, whose attention is over more than the window here"
    return None


def compare_drafts(
    model: Any,
    reference: Path,
    ids: Tensor,
    streams: Tensor,
    tolerance: Tolerance,
    device: torch.device,
    held: AbstractContextManager[None] | None = None,
) -> tuple[Draft, ...]:
    """Every MTP block of our model against the formula with the values of a checkpoint.

    Args:
        model: ours, with its MTP blocks.
        reference: the checkpoint that the formula reads.
        ids: [b, s] int64, on the CPU.
        streams: [b, s, n*h] behind the reference's last layer.
        tolerance: for near-ties.
        device: where our model runs.
        held: in it the model has its MTP blocks and its output layer, which come behind the formula; None: it has them.
    """
    ids, streams = ids[:, :MOST], streams[:, :MOST]
    with opened_whole(reference) as (spec, values), torch.no_grad():
        record, exact = _formula(spec, values, ids, streams)
    give_back()
    watcher = Watcher(record, (ids.shape[0], ids.shape[1]), True, tolerance, 0)
    with held or nullcontext(), torch.no_grad(), watching(watcher):
        given = streams.transpose(0, 1).contiguous().to(device)
        logits = model.mtp_logits(ids.to(device), streams=given)
    sites: list[list[Any]] = [[] for _ in exact]
    for block, site in zip(watcher.blocks, watcher.found, strict=True):
        sites[int(block.removeprefix("mtp."))].append(site)
    return tuple(
        Draft(depth, tuple(sites[depth]), compare_logits(mine.cpu(), theirs))
        for depth, (mine, theirs) in enumerate(zip(logits, exact, strict=True))
    )


def _formula(spec: ModelSpec, values: Values, ids: Tensor, streams: Tensor) -> tuple[Record, list[Tensor]]:
    """What every depth shows, and its logits [b, s, vocabulary] float64."""
    plan, record, exact = expand(spec), Record(), []
    hidden = streams.double().unflatten(-1, (spec.hc_mult, -1))
    for depth in range(spec.mtp_layers):
        block = f"mtp.{depth}"

        def watch(site: str, value: Tensor, block: str = block) -> None:
            if site == "scores":
                record.scores[block, "ffn.router"] = value
            else:
                record.values[block, site] = value

        embedded = _rows(values, plan.by_name["embed.weight"], look_ahead(ids, depth + 1))
        normed, hidden = Formula(spec, _reader(values, plan, depth), watch)(hidden, embedded)
        exact.append(_projected(values, plan.by_name["head.weight"], normed))
    return record, exact


def _reader(values: Values, plan: Plan, depth: int) -> Callable[[str], Tensor]:
    """Parameters of a depth by their names in Megatron's model."""
    parts: dict[str, list[tuple[Item, int, int]]] = {}
    for item in plan.items:
        if item.block.kind != "mtp" or item.block.index != depth or item.passenger:
            continue
        names = live_names(item, expert=item.expert)
        for number, name in enumerate(names):
            parts.setdefault(name.removeprefix(f"mtp.layers.{depth}."), []).append((item, number, len(names)))
    scratch = Scratch()

    def read(name: str) -> Tensor:
        pieces = sorted(parts[name], key=lambda part: part[0].row.part[0])
        whole = [_whole(values, item, scratch).chunk(count)[number] for item, number, count in pieces]
        return whole[0] if len(whole) == 1 else torch.cat(whole)

    return read


def _whole(values: Values, item: Item, scratch: Scratch) -> Tensor:
    return torch.cat([as_tensor(s).double() for s in values.stripes(item, 0, item.shape[0], scratch)])


def _rows(values: Values, item: Item, ids: Tensor) -> Tensor:
    """[…] int64 -> […, h] float64: rows of a table that is too large to be held so."""
    found, at = torch.zeros((*ids.shape, item.shape[1]), dtype=torch.float64), 0
    for stripe in values.stripes(item, 0, item.shape[0], Scratch()):
        here = (ids >= at) & (ids < at + len(stripe))
        found[here] = as_tensor(stripe)[ids[here] - at].double()
        at += len(stripe)
    return found


def _projected(values: Values, item: Item, hidden: Tensor) -> Tensor:
    """[b, s, h] times the rows of a table, a stripe at a time: [b, s, rows] float64."""
    stripes = values.stripes(item, 0, item.shape[0], Scratch())
    return torch.cat([hidden @ as_tensor(stripe).double().T for stripe in stripes], -1)
