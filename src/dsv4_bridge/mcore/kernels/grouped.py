"""Linear layers of many experts at once."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .choice import AUTO, Choice
from .direct import applied

_KERNEL_BYTES = 16  # rows of the grouped kernel begin at multiples of this


Counts = Sequence[int] | Tensor


def grouped_linear(x: Tensor, counts: Counts, weights: Sequence[Tensor], kernel: bool | None = None) -> Tensor:
    """Rows times the matrix of their group: `y = x W_j^T` for the `counts[j]` rows of group j.

    Every weight gets a gradient, zero where its group is empty: data parallelism waits for all of them.

    Args:
        x: [T, in], sorted by group.
        counts: rows of each group, T together: numbers, or integers [n] on x's device, which one launch reads
            there; a product for each group waits for them.
        weights: n matrices [out, in] of x's type.
        kernel: one launch of torch's grouped product, or a product for each group that has rows; by
            default the first where it is fast: bfloat16 on CUDA, with rows that it can address.

    Returns:
        [T, out], of x's type.
    """
    together = _kernel_fits(x, weights) if kernel is None else kernel
    if not isinstance(counts, Tensor):
        counts = list(counts)
    elif not together:
        counts = counts.tolist()
    return applied(_GroupedLinear, x, counts, together, *weights)


def _kernel_fits(x: Tensor, weights: Sequence[Tensor]) -> bool:
    return (
        x.is_cuda
        and x.dtype is torch.bfloat16
        and all(size * x.element_size() % _KERNEL_BYTES == 0 for size in weights[0].shape)
    )


class _GroupedLinear(torch.autograd.Function):
    """See `grouped_linear`. Saves the weights as they are: a stack of them lives only during a call."""

    @staticmethod
    def forward(ctx, x: Tensor, counts: Counts, kernel: bool, *weights: Tensor) -> Tensor:  # type: ignore[override]
        if len(x) == 0:  # the kernel refuses an empty batch
            counts, kernel = [0] * len(weights), False
        ctx.counts, ctx.kernel = counts, kernel
        ctx.save_for_backward(x, *weights)
        if ctx.kernel:
            return F.grouped_mm(x.contiguous(), stacked(weights).transpose(1, 2), offs=_ends(counts, x.device))
        out = x.new_empty(len(x), len(weights[0]))
        assert not isinstance(counts, Tensor)
        for rows, j in _groups(counts):
            torch.mm(x[rows], weights[j].t(), out=out[rows])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        x, *weights = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        grad = grad.contiguous()
        compute = _kernel_gradients if ctx.kernel else _loop_gradients
        to_x, to_weights = compute(grad, x.contiguous(), ctx.counts, weights, wanted[0], any(wanted[3:]))
        kept = (g if want else None for g, want in zip(to_weights, wanted[3:], strict=True))
        return to_x, None, None, *kept


Gradients = tuple[Tensor | None, Sequence[Tensor | None]]


def _kernel_gradients(
    grad: Tensor, x: Tensor, counts: Counts, weights: Sequence[Tensor], for_x: bool, for_weights: bool
) -> Gradients:
    ends = _ends(counts, x.device)
    to_x = F.grouped_mm(grad, stacked(weights), offs=ends) if for_x else None
    if not for_weights:
        return to_x, [None] * len(weights)
    to_weights = F.grouped_mm(grad.t(), x, offs=ends)  # [n, out, in]
    # Not every kernel writes where a group is empty (pytorch/pytorch#172439).
    if isinstance(counts, Tensor):
        to_weights.masked_fill_((counts == 0)[:, None, None], 0)  # a pass over all of them, and no waiting
    else:
        for j, count in enumerate(counts):
            if count == 0:
                to_weights[j].zero_()
    return to_x, to_weights.unbind()


def _loop_gradients(
    grad: Tensor, x: Tensor, counts: list[int], weights: Sequence[Tensor], for_x: bool, for_weights: bool
) -> Gradients:
    to_x = torch.empty_like(x) if for_x else None
    found: list[Tensor | None] = [None] * len(weights)
    for rows, j in _groups(counts):
        if to_x is not None:
            torch.mm(grad[rows], weights[j], out=to_x[rows])
        if for_weights:
            found[j] = grad[rows].t() @ x[rows]
    if not for_weights:
        return to_x, found
    return to_x, [torch.zeros_like(w) if g is None else g for g, w in zip(found, weights, strict=True)]


def _groups(counts: Iterable[int]) -> Iterator[tuple[slice, int]]:
    """Rows and number of every group that has any."""
    start = 0
    for j, count in enumerate(counts):
        if count:
            yield slice(start, start + count), j
        start += count


def _ends(counts: Counts, device: torch.device) -> Tensor:
    if isinstance(counts, Tensor):
        return counts.cumsum(0, dtype=torch.int32)
    return torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device, non_blocking=True)


def stacked(weights: Sequence[Tensor]) -> Tensor:
    """[n, out, in]: a view where the matrices lie one behind the other, as `Matrices` makes them; else a copy."""
    first = weights[0]
    step = first.numel() * first.element_size()
    start, storage = first.data_ptr(), first.untyped_storage().data_ptr()
    if all(
        w.is_contiguous() and w.data_ptr() == start + j * step and w.untyped_storage().data_ptr() == storage
        for j, w in enumerate(weights)
    ):
        return first.detach().as_strided((len(weights), *first.shape), (first.numel(), first.shape[1], 1))
    return torch.stack([w.detach() for w in weights])


def clamped_swiglu(x: Tensor, weights: Tensor, limit: float | None, by: Choice = AUTO) -> Tensor:
    """`silu(min(gate, limit)) * clamp(up, -limit, limit)` times the routing weight, in x's type.

    Args:
        x: [T, 2f], gate then up.
        weights: [T].
        limit: None: no clamp.
        by: torch or Triton.

    Returns:
        [T, f].
    """
    if by.fused(x, weights):
        from .swiglu_triton import clamped_swiglu as fused

        return fused(x, weights, limit)
    gate, up = x.chunk(2, dim=-1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (F.silu(gate) * up * weights.unsqueeze(-1)).to(x.dtype)
