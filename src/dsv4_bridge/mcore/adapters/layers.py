"""One adapter of a live model (LoRA, DoRA): its parameters on a rank, and what they add. Formulas: `..lora`.

What a rank holds of A and B, and where gradients are summed:

| what is adapted | A [rank, in] | B [out, rank] | sums over tensor-parallel ranks |
|---|---|---|---|
| replicated | whole | whole | none: whole sequences, complete gradients |
| cut by rows of W | whole | its rows | of A x's gradient |
| cut by columns of W | its columns | whole | of A x |
| output groups | whole | rows of its groups | of A's gradient |
| a routed expert's first matrix | whole | its rows | of A's gradient (expert-tensor-parallel ranks) |
| a routed expert's second matrix | its columns | whole | of B's gradient (the same ranks) |

Under sequence parallelism a factor that sees only a rank's part of the sequence is marked, and megatron sums
its gradient. Routed experts' adapters go with their experts: over expert-data-parallel ranks.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from torch import Tensor
from torch.nn import functional as F

from ...lora.adapters import initial_a, row_norms
from ...spec.lora import ADAPTERS, Lora, Target, checkpoint_name, is_parameter
from ..layers.basics import mark_sequence_parallel
from ..model import DeepSeekV4Model
from ..weights.places import Place


class Held(NamedTuple):
    """A parameter of an adapter on this rank, and the box of the whole tensor that it is.

    Attributes:
        part: `lora_A`, `lora_B` or `magnitude`.
        name: of the item that its rows belong to, see `checkpoint_name`.
        tensor: the parameter.
        shape: of the whole tensor (of the item's part of it, for B).
        rows: `(start, stop)` of that.
        columns: the same for columns; `(0, 1)` for a vector.
    """

    part: str
    name: str
    tensor: torch.nn.Parameter
    shape: tuple[int, ...]
    rows: tuple[int, int]
    columns: tuple[int, int]


def adapter_dtype(lora: Lora, config: Any) -> torch.dtype:
    """Type of the adapters of a model."""
    return getattr(torch, lora.dtype) if lora.dtype else config.params_dtype


class LoraAdapter(torch.nn.Module):
    """One adapter's parameters on this rank, and what they add to the output of what they adapt.

    Args:
        target: what is adapted.
        here: places of its items on this rank, one each.
        lora: settings.
        model: the chunk that holds it.
    """

    def __init__(self, target: Target, here: Sequence[Place], lora: Lora, model: DeepSeekV4Model):
        super().__init__()
        row, config = target.items[0].row, model.config
        self.target, self.scale, self.rate = target, lora.scale, lora.dropout
        routed = target.items[0].expert is not None
        self.group = model.pg_collection.expt_tp if routed else model.pg_collection.tp
        self.cut = row.cut if self.group.size() > 1 else "whole"
        # Routed experts get gathered tokens and their dispatcher adds parts up; groups hold their own heads.
        self.silent = routed or is_parameter(row)
        base = here[0].tensor
        owner = model.get_submodule(here[0].name.rpartition(".")[0])
        self.sequence_parallel = not self.silent and bool(getattr(owner, "sequence_parallel", False))
        self.start, self.stop = here[0].row, here[-1].row + here[-1].stop - here[-1].start
        dtype = adapter_dtype(lora, config)

        def new(values: Tensor) -> torch.nn.Parameter:
            parameter = torch.nn.Parameter(values.to(base.device, dtype))
            parameter.allreduce = getattr(base, "allreduce", True)  # type: ignore[attr-defined]
            return parameter

        left, right = here[0].columns
        self.columns = (left, right)
        self.lora_A = new(initial_a(target.name, lora.rank, target.shape[1], lora.seed)[:, left:right].contiguous())
        self.here = tuple(here)
        self.lora_B = torch.nn.ParameterList(new(torch.zeros(p.stop - p.start, lora.rank)) for p in here)
        self.magnitude: torch.nn.Parameter | None = None
        if lora.dora:
            self.magnitude = new(torch.zeros(self.stop - self.start))
            self.reset_magnitude()
        self._mark(config)

    def _mark(self, config: Any) -> None:
        below = [p for p in (*self.lora_B, self.magnitude) if p is not None]
        if self.cut == "rows":
            set_tensor_model_parallel_attributes(self.lora_A, True, 1, 1)
        elif self.cut != "whole":
            for parameter in below:
                set_tensor_model_parallel_attributes(parameter, True, 0, 1)
        if self.sequence_parallel and self.cut != "whole":
            mark_sequence_parallel(config, *(below if self.cut == "rows" else (self.lora_A,)))

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A [rank, in] and B [out, rank] of this rank, in the type they are multiplied in."""
        a, b = self.lora_A, torch.cat([*self.lora_B]) if len(self.lora_B) > 1 else self.lora_B[0]
        if self.silent and self.cut == "rows":
            b = copy_to_tensor_model_parallel_region(b, self.group)
        elif self.silent and self.cut != "whole":
            a = copy_to_tensor_model_parallel_region(a, self.group)
        return a.to(dtype), b.to(dtype)

    def dropped(self, x: Tensor) -> Tensor:
        """The input after dropout, in training."""
        if not self.rate or not self.training:
            return x
        tracker: Any = get_cuda_rng_tracker()
        # Ranks with different parts of the input draw for themselves, those with the same draw the same.
        apart = self.cut == "rows" or self.sequence_parallel
        with tracker.fork() if apart and tracker.is_initialized() else contextlib.nullcontext():
            return F.dropout(x, self.rate)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """Adapt the output of a linear.

        Args:
            y: [..., out], what W made of x.
            x: [..., in]; a rank's part of the sequence where the linear gathers it, as y where it scatters it.

        Returns:
            [..., out].
        """
        a, b = self.factors(x.dtype)
        low = F.linear(self.dropped(x), a)  # [..., rank]
        if not self.silent and self.cut == "rows":
            reduce = reduce_scatter_to_sequence_parallel_region if self.sequence_parallel else None
            low = (reduce or reduce_from_tensor_model_parallel_region)(low, group=self.group)
        elif not self.silent and self.cut != "whole":
            if self.sequence_parallel:
                low = gather_from_sequence_parallel_region(low, group=self.group)
            else:
                low = copy_to_tensor_model_parallel_region(low, self.group)
        return self.added(y, F.linear(low, b))

    def of_groups(self, mixed: Tensor, tokens: Tensor) -> Tensor:
        """Adapt the grouped output projection: A is every group's, B has rows of its own for each.

        Args:
            mixed: [tokens, groups, o_lora_rank], what W made.
            tokens: [tokens, groups, in].

        Returns:
            [tokens, groups, o_lora_rank].
        """
        a, b = self.factors(tokens.dtype)
        low = F.linear(self.dropped(tokens), a).transpose(0, 1)  # [groups, tokens, rank]
        high = torch.bmm(low, b.unflatten(0, (tokens.shape[1], -1)).mT)  # [groups, tokens, o_lora_rank]
        return self.added(mixed, high.transpose(0, 1))

    def added(self, y: Tensor, delta: Tensor) -> Tensor:
        """The sum y + s delta; with a magnitude, times its share of the row norms."""
        new = torch.add(y, delta.to(y.dtype), alpha=self.scale)
        if self.magnitude is None:
            return new
        return new * (self.magnitude / self.norms().to(self.magnitude.dtype)).to(y.dtype)

    @torch.no_grad()
    def norms(self) -> Tensor:
        """Row norms of W + s B A, float32 [out]; they take no gradient."""
        (place,) = self.here  # what has magnitudes is one item
        square = row_norms(place.rows(place.start, place.stop), self.lora_A, self.lora_B[0], self.scale)
        if self.cut == "rows":
            dist.all_reduce(square, group=self.group)
        return square.clamp(min=0).sqrt()

    @torch.no_grad()
    def reset_magnitude(self) -> None:
        """DoRA's start: the norms of the rows as they are now."""
        if self.magnitude is not None:
            self.magnitude.copy_(self.norms())

    def held(self) -> list[Held]:
        """Its parameters on this rank, with their places in the whole tensors."""
        names = [checkpoint_name(item) for item in self.target.items]
        rank, (_, into) = self.lora_A.shape[0], self.target.shape
        found = [Held("lora_A", names[0], self.lora_A, (rank, into), (0, rank), self.columns)]
        for item, name, parameter, place in zip(self.target.items, names, self.lora_B, self.here, strict=True):
            rows = (place.start, place.stop)
            found.append(Held("lora_B", name, parameter, (item.shape[0], rank), rows, (0, rank)))
        if self.magnitude is not None:
            rows = (self.here[0].start, self.here[0].stop)
            found.append(Held("magnitude", names[0], self.magnitude, (self.target.shape[0],), rows, (0, 1)))
        return found


class AdapterBank(torch.nn.Module):
    """The adapters of a chunk, as its submodule `adapters`; the chunk's `state_dict` passes over it."""

    def __init__(self, lora: Lora, adapters: dict[str, LoraAdapter]):
        super().__init__()
        self.lora = lora
        self.by_name = torch.nn.ModuleDict({name.replace(".", "/"): each for name, each in adapters.items()})
        self.register_load_state_dict_post_hook(_not_missing)

    def __iter__(self) -> Iterator[LoraAdapter]:
        for adapter in self.by_name.values():
            assert isinstance(adapter, LoraAdapter)
            yield adapter

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        """Nothing: what the base saves does not depend on its adapters; `sharded_adapters` saves these."""
        return {} if destination is None else destination


def _not_missing(bank: torch.nn.Module, keys: Any) -> None:
    """A state of the base is whole without adapters."""
    own = {f"{ADAPTERS}.{name}" for name, _ in bank.named_parameters()}
    keys.missing_keys[:] = [key for key in keys.missing_keys if key not in own]
