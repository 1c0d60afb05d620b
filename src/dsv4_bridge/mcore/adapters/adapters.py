"""LoRA and DoRA on a live model: adapters beside its linears.

The base keeps its names: adapters are parameters of `model.adapters`, which its `state_dict`, `places`,
`load_weights`, `stream_weights` and `sharded_state_dict` do not see.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from ...errors import BridgeError
from ...lora.adapters import Adapter, Adapters, check_fit
from ...spec.lora import ADAPTERS, ALPHA, PARTS, Lora, Target, targets
from ...spec.table import ROWS
from ..kernels.grouped import Counts, grouped_linear
from ..layers.attention import HybridAttention
from ..layers.experts import Matrices
from ..model import DeepSeekV4Model
from ..weights.places import Place, places
from .layers import AdapterBank, Held, LoraAdapter, adapter_dtype

Chunks = DeepSeekV4Model | Sequence[DeepSeekV4Model]


def add_adapters(model: Chunks, lora: Lora) -> None:
    """Freeze a model and put adapters beside what `lora` targets; only they are trained.

    Call it on bare chunks, with their weights in place (DoRA's magnitudes begin as row norms), before
    megatron's data-parallel wrapper. The balance bias of routers is frozen too. Adapters change nothing
    until they are trained or loaded: B is zero.

    Args:
        model: the model, or this rank's chunks of it.
        lora: what is adapted.

    Raises:
        BridgeError: adapters are there already, a target that is refused, or routed experts in an
            `expert_layout` that has no place for adapters.
    """
    chunks = chunks_of(model)
    keys = lora.keys
    for chunk in chunks:
        if bank_of(chunk) is not None:
            raise BridgeError("adding adapters: the model has some already; build it anew")
        layout = chunk.config.expert_layout
        if layout == "transformer_engine" and any(r.per_expert for r in ROWS if r.key in keys):
            raise BridgeError(
                f"adding adapters to routed experts: expert_layout={layout!r} computes them in one kernel; "
                "take 'grouped' or 'sequential'"
            )
    wanted = targets(chunks[0].spec, keys)
    for chunk in chunks:
        _, found = places(chunk)
        for parameter in chunk.parameters():
            parameter.requires_grad_(False)
        for module in chunk.modules():
            if hasattr(module, "expert_bias"):
                module.frozen_expert_bias = True  # type: ignore[assignment]
        held = {t.name: (t, found[t.items[0].name] + _rest(t, found)) for t in wanted if t.items[0].name in found}
        adapters = {name: LoraAdapter(t, here, lora, chunk) for name, (t, here) in held.items()}
        _attach(chunk, adapters.values())
        setattr(chunk, ADAPTERS, AdapterBank(lora, adapters))


def _rest(target: Target, found: dict[str, tuple[Place, ...]]) -> tuple[Place, ...]:
    return tuple(place for item in target.items[1:] for place in found[item.name])


def _attach(chunk: DeepSeekV4Model, adapters: Iterable[LoraAdapter]) -> None:
    """Have every adapter called behind what it adapts."""
    owners: dict[str, list[LoraAdapter]] = {}
    for adapter in adapters:
        owners.setdefault(adapter.here[0].name.rpartition(".")[0], []).append(adapter)
    for name, several in owners.items():
        owner = chunk.get_submodule(name)
        several.sort(key=lambda adapter: adapter.start)
        if isinstance(owner, HybridAttention):
            (grouped,) = several
            owner.adapt_groups = grouped.of_groups
        elif isinstance(owner, Matrices):
            in_order = sorted(several, key=lambda adapter: adapter.target.items[0].expert or 0)
            owner.adapt = partial(_adapt_experts, tuple(in_order))
        else:
            owner.register_forward_hook(partial(_adapt_linear, tuple(several)))


def _adapt_linear(adapters: Sequence[LoraAdapter], module: torch.nn.Module, args: Any, output: Any) -> Any:
    y = output[0] if isinstance(output, tuple) else output
    parts, at = [], 0
    for adapter in adapters:
        if adapter.start > at:
            parts.append(y[..., at : adapter.start])
        parts.append(adapter(y[..., adapter.start : adapter.stop], args[0]))
        at = adapter.stop
    if at < y.shape[-1]:
        parts.append(y[..., at:])
    new = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    return (new, *output[1:]) if isinstance(output, tuple) else new


def _adapt_experts(adapters: Sequence[LoraAdapter], y: Tensor, x: Tensor, counts: Counts) -> Tensor:
    """Adapt y [T, out], made of x [T, in] sorted by expert with `counts` rows of each."""
    a, b = zip(*(adapter.factors(x.dtype) for adapter in adapters), strict=True)
    first = adapters[0]
    low = grouped_linear(first.dropped(x), counts, a)
    return first.added(y, grouped_linear(low, counts, b))


def trainable(model: Chunks | Sequence[torch.nn.Module]) -> tuple[int, int]:
    """Values of this rank's parameters that are trained, and of all of them."""
    chunks = [model] if isinstance(model, torch.nn.Module) else model
    parameters = [p for chunk in chunks for p in chunk.parameters()]
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def chunks_of(model: Chunks) -> Sequence[DeepSeekV4Model]:
    """This rank's chunks."""
    return [model] if isinstance(model, torch.nn.Module) else model


def bank_of(chunk: DeepSeekV4Model) -> AdapterBank | None:
    """The adapters of a chunk, if it has any."""
    bank = getattr(chunk, ADAPTERS, None)
    return bank if isinstance(bank, AdapterBank) else None


# ---------------------------------------------------------------- checkpoints


def sharded_adapters(model: Chunks) -> dict[str, Any]:
    """Adapters for `megatron.core.dist_checkpointing`, under keys that do not depend on the layout.

    `adapters.layers.3.attn.wq_a.lora_A` [rank, in] and so on; routed experts' are stacked, [experts, rank, in].
    `adapters.alpha` [1] float32 is beside them. Every `.data` but that one is the live parameter.

    Raises:
        BridgeError: the model has no adapters.
    """
    found: dict[str, Any] = {}
    for chunk in chunks_of(model):
        bank = _bank(chunk, "saving adapters")
        groups = chunk.pg_collection
        for adapter in bank:
            expert = adapter.target.items[0].expert
            copies = groups.dp_cp if expert is None else groups.expt_dp
            stack = () if expert is None else ((0, expert, chunk.spec.n_routed_experts),)
            for held in adapter.held():
                key = f"{ADAPTERS}.{held.name}.{held.part}"
                # A second key where several experts have the first: megatron wants one entry each.
                entry = key if expert is None else f"{key}.{expert}"
                axes = [
                    n for n, whole, here in zip((0, 1), held.shape, held.tensor.shape, strict=False) if whole != here
                ]
                made = make_sharded_tensors_for_checkpoint(
                    {held.part: held.tensor},
                    f"{ADAPTERS}.{held.name}.",
                    {held.part: axes[0]} if axes else {},
                    stack,
                    tp_group=adapter.group,
                    dp_cp_group=copies,
                )
                found[entry] = made[key]
        alpha = torch.tensor([bank.lora.alpha], dtype=torch.float32)
        found[ALPHA] = ShardedTensor.from_rank_offsets(ALPHA, alpha, replica_id=dist.get_rank())
    return found


# ---------------------------------------------------------------- whole adapters


class _Box(NamedTuple):
    """Part of a whole adapter tensor that a rank has; `number` tells the tensors of an adapter apart."""

    name: str
    number: int
    part: str
    shape: tuple[int, ...]
    rows: tuple[int, int]
    columns: tuple[int, int]

    def of(self, whole: Tensor) -> Tensor:
        """A view of it."""
        box = whole[slice(*self.rows)]
        return box if box.ndim == 1 else box[:, slice(*self.columns)]


def gather_adapters(model: Chunks, everywhere: bool = False) -> Adapters | None:
    """Whole adapters on the host, from all ranks; every rank calls it.

    Args:
        model: the model, or this rank's chunks of it.
        everywhere: on every rank; otherwise on rank 0, and None on the others.
    """
    chunks = chunks_of(model)
    lora = _bank(chunks[0], "gathering adapters").lora
    mine = {box: held.tensor for box, held in _boxes(chunks, "gathering adapters")}
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, list(mine))
    like = torch.empty(0, dtype=adapter_dtype(lora, chunks[0].config), device=next(chunks[0].parameters()).device)
    keep = everywhere or dist.get_rank() == 0
    whole: dict[_Box, Tensor] = {}
    seen: set[_Box] = set()
    for rank, boxes in enumerate(ranks):
        own = [box for box in boxes if box not in seen]
        seen |= set(own)
        sizes = [math.prod(box.of(torch.empty(box.shape, device="meta")).shape) for box in own]
        if rank == dist.get_rank():
            flat = torch.cat([like, *(mine[box].detach().flatten() for box in own)])
        else:
            flat = like.new_empty(sum(sizes))
        if own:
            dist.broadcast(flat, rank)
        if not keep:
            continue
        for box, values in zip(own, flat.cpu().split(sizes), strict=True):
            at = box._replace(rows=(0, 0), columns=(0, 0))
            box.of(whole.setdefault(at, torch.empty(box.shape, dtype=flat.dtype))).copy_(values.view(_sizes(box)))
    return _assembled(lora, whole, targets(chunks[0].spec, lora.keys)) if keep else None


def _sizes(box: _Box) -> tuple[int, ...]:
    sizes = (box.rows[1] - box.rows[0], box.columns[1] - box.columns[0])
    return sizes[: len(box.shape)]


def _assembled(lora: Lora, whole: dict[_Box, Tensor], order: Iterable[Target]) -> Adapters:
    parts: dict[str, dict[int, tuple[str, Tensor]]] = {}
    for box, tensor in whole.items():
        parts.setdefault(box.name, {})[box.number] = (box.part, tensor)
    values = {}
    for target in order:
        held = [parts[target.name][n] for n in sorted(parts[target.name])]
        of = {part: [t for p, t in held if p == part] for part in PARTS}
        values[target.name] = Adapter(of["lora_A"][0], torch.cat(of["lora_B"]), *of["magnitude"])
    return Adapters(lora, values)


def load_adapters(model: Chunks, adapters: Adapters) -> None:
    """Fill the adapters of a model from whole ones; each rank takes its parts.

    Of layers that they leave out the model's adapters add nothing: B is zero, magnitudes are the norms.

    Raises:
        BridgeError: other targets, rank or shapes than the model's adapters have, or a rank of their own; nothing is
            changed then.
    """
    chunks = chunks_of(model)
    what = "loading adapters"
    lora = _bank(chunks[0], what).lora
    check_fit(adapters, lora, chunks[0].spec, what)
    with torch.no_grad():
        for chunk in chunks:
            for left_out in (a for a in _bank(chunk, what) if a.target.name not in adapters.values):
                for part in left_out.lora_B:
                    part.zero_()
                left_out.reset_magnitude()
        for box, held in _boxes(chunks, what):
            if box.name not in adapters.values:
                continue
            adapter = adapters.values[box.name]
            if box.part == "lora_B":  # the items' parts stand one above the other
                whole = adapter.b.unflatten(0, (-1, box.shape[0]))[box.number - 1]
            else:
                whole = adapter.a if box.part == "lora_A" else adapter.magnitude
            assert whole is not None
            held.tensor.copy_(box.of(whole))


def _boxes(chunks: Sequence[DeepSeekV4Model], what: str) -> Iterator[tuple[_Box, Held]]:
    for chunk in chunks:
        for adapter in _bank(chunk, what):
            for number, held in enumerate(adapter.held()):
                yield _Box(adapter.target.name, number, held.part, held.shape, held.rows, held.columns), held


def _bank(chunk: DeepSeekV4Model, what: str) -> AdapterBank:
    bank = bank_of(chunk)
    if bank is None:
        raise BridgeError(f"{what}: the model has none; add_adapters first")
    return bank
