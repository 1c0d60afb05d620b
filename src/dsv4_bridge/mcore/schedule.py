"""One pass over micro-batches through megatron-core's pipeline schedules."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.experimental_attention_variant.dsa import DSAIndexerLossAutoScaler
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler
from megatron.core.utils import get_model_config
from torch import Tensor

from ..errors import BridgeError
from .layers.context import ahead, ends_of, over_ranks
from .layers.mtp_loss import draft_shares


@dataclass(frozen=True)
class Batch:
    """One micro-batch; under context parallelism, a rank's tokens of it, s of every row.

    Attributes:
        input_ids: [b, s] int64; every stage gets them.
        labels: [b, s] int64, the token after each.
        loss_mask: [b, s], weight of each label; None: all 1.
        padding_mask: [b, s], True for tokens that stand for nothing: balance and indexer do not count them.
        cu_seqlens: [documents + 1] int32, boundaries of documents packed into one row (b is 1), of the whole row. The
            label of a document's last token is the caller's, or its weight 0.
    """

    input_ids: Tensor
    labels: Tensor
    loss_mask: Tensor | None = None
    padding_mask: Tensor | None = None
    cu_seqlens: Tensor | None = None


def cut(batch: Batch, rank: int, ranks: int) -> Batch:
    """What context-parallel rank `rank` of `ranks` has of a micro-batch: tokens [rank * s, (rank + 1) * s) of its rows.

    Raises:
        BridgeError: the rows do not divide.
    """
    if ranks == 1:
        return batch
    length = batch.input_ids.shape[1]
    if length % ranks:
        raise BridgeError(f"cutting a micro-batch: rows of {length} tokens do not divide over {ranks} ranks")
    own = slice(rank * length // ranks, (rank + 1) * length // ranks)
    parts = {name: getattr(batch, name) for name in ("input_ids", "labels", "loss_mask", "padding_mask")}
    return replace(batch, **{name: None if t is None else t[:, own].contiguous() for name, t in parts.items()})


class StreamCommunicator(P2PCommunicator):
    """Between stages go all streams, [s, b, n*h], where megatron's schedules expect hidden states, [s, b, h]."""

    def _communicate(self, *, tensor_shape: Any, **rest: Any) -> Any:
        if tensor_shape is not None:
            length, batch, width = tensor_shape
            tensor_shape = (length, batch, width * self.config.num_residual_streams)  # type: ignore[attr-defined]
        return super()._communicate(tensor_shape=tensor_shape, **rest)  # type: ignore[arg-type]


def forward_backward(
    chunks: Sequence[torch.nn.Module], batches: Sequence[Batch], *, forward_only: bool = False
) -> list[Tensor]:
    """Run micro-batches forward and backward; gradients add up, averaged over the micro-batches.

    Micro-batches without a learned token do not count, of the main loss or of a draft depth. With
    `calculate_per_token_loss` gradients are averaged over the weights of all labels of all ranks instead.

    Args:
        chunks: this rank's chunks, as `build_chunks` made them, wrapped or not.
        batches: micro-batches of one shape; every rank of a pipeline passes the same.
        forward_only: no backward.

    Returns:
        Mean loss of every micro-batch, on the last pipeline stage; elsewhere an empty list.
    """
    config = get_model_config(chunks[0])
    stages, virtual = config.pipeline_model_parallel_size, config.virtual_pipeline_model_parallel_size
    size, length = batches[0].input_ids.shape
    depths = getattr(config, "mtp_num_layers", None) or 0
    share = _Share() if forward_only else _Share.of(batches, bool(config.calculate_per_token_loss), depths)
    batches = share.applied(batches)
    options: dict[str, Any] = {}
    if stages > 1:
        groups = ProcessGroupCollection.use_mpu_process_groups()
        options = {"p2p_communicator": StreamCommunicator(groups.pp, config), "pg_collection": groups}
    # Without gradients a forward pass keeps nothing, and its tokens do not count for the balance.
    with _own_scales(), torch.set_grad_enabled(torch.is_grad_enabled() and not forward_only):
        found = get_forward_backward_func(stages, virtual)(
            forward_step_func=partial(_step, share),
            data_iterator=[iter(batches) for _ in chunks] if len(chunks) > 1 else iter(batches),
            model=list(chunks),
            num_microbatches=len(batches),
            seq_length=length * config.context_parallel_size,
            micro_batch_size=size,
            forward_only=forward_only,
            **options,
        )
    return [entry["loss"] for entry in found]


@contextlib.contextmanager
def _own_scales() -> Iterator[None]:
    """Keep megatron's scales of auxiliary losses, one a process, to the schedule.

    It divides them by the micro-batches and leaves them so: a later backward outside of it would take them. And what
    such a backward leaves has another shape, which megatron copies into.
    """
    _unscale()
    try:
        yield
    finally:
        _unscale()


def _unscale() -> None:
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    DSAIndexerLossAutoScaler.main_loss_backward_scale = None
    MTPLossAutoScaler.main_loss_backward_scale = torch.tensor(1.0)


@dataclass(frozen=True)
class _Share:
    """How micro-batches count, where megatron's way would be wrong: it takes all of them alike, and whole labels.

    Attributes:
        factor: of a micro-batch's mean loss, so that those without a learned token do not count.
        weight: of the labels' weights, so that they sum up to the number of labels that have any. None: they are
            whole numbers, and are counted themselves.
        drafts: the same of every depth of multi-token prediction, see `mtp_loss.draft_shares`; None: there is none,
            or micro-batches are alike.
    """

    factor: float = 1.0
    weight: float | None = None
    drafts: tuple[float, ...] | None = None

    @classmethod
    def of(cls, batches: Sequence[Batch], per_token: bool, depths: int = 0) -> "_Share":
        """Of these micro-batches and those of the other data-parallel ranks; every rank calls it.

        Args:
            batches: this rank's.
            per_token: whether the mean is over labels, not over micro-batches.
            depths: of multi-token prediction.
        """
        masked = any(b.loss_mask is not None for b in batches)
        if not masked and not (depths and any(b.cu_seqlens is not None for b in batches)):  # the same on all ranks
            return cls()
        rows: Any = parallel_state.get_context_parallel_group()
        facts = over_ranks(torch.stack([_facts(b, depths, rows) for b in batches]), rows)
        broken, labels = facts[:, 0], facts[:, 1 : 2 + depths]
        each = [torch.ones_like(broken), broken, labels[:, 0], *(labels > 0).double().T, *facts[:, 2 + depths :].T]
        found = torch.stack(each).sum(1)
        group: Any = parallel_state.get_data_parallel_group()
        if group.size() > 1:
            torch.distributed.all_reduce(found, group=group)
        count, broken, labels, *sums = found.tolist()  # the one look at the device a step
        (learning, *learning_ahead), (weight, *weight_ahead) = sums[: depths + 1], sums[depths + 1 :]
        drafts = draft_shares(per_token, count, weight, learning_ahead, weight_ahead) if depths else None
        if per_token:
            return cls(1.0, labels / weight if broken and weight else None, drafts)
        return cls(count / learning if learning else 1.0, None, drafts)

    def applied(self, batches: Sequence[Batch]) -> list[Batch]:
        """The micro-batches with the weights that are learned by."""
        if self.weight is None:
            return list(batches)
        return [replace(b, loss_mask=_weights(b) * self.weight) for b in batches]


def _weights(batch: Batch) -> Tensor:
    """[b, s] float32 or the mask's own type."""
    mask = batch.loss_mask
    return torch.ones_like(batch.labels, dtype=torch.float32) if mask is None else mask


def _facts(batch: Batch, depths: int, rows: Any) -> Tensor:
    """What a rank's part of a micro-batch adds to a step, float64, on its device.

    Weights that are no whole numbers; then, of the main loss and of every depth, labels that have any weight; and, of
    the same, the sum of the weights: [3 + 2 * depths].

    Args:
        batch: the micro-batch.
        depths: of multi-token prediction.
        rows: the group that rows are cut over.
    """
    weights = _weights(batch).double()
    broken, sums, labels = (weights != weights.round()).sum(), [weights.sum()], [(weights != 0).sum()]
    ends = batch.cu_seqlens
    if ends is not None:
        ends = ends_of(ends, weights.shape[1] * rows.size(), weights.device)
    for _ in range(depths):
        weights = ahead(weights, ends, rows)
        sums.append(weights.sum())
        labels.append((weights != 0).sum())
    return torch.stack([x.double() for x in (broken, *labels, *sums)])


def _step(share: _Share, batches: Iterator[Batch], model: torch.nn.Module) -> tuple[Tensor, Any]:
    batch, rows = next(batches), parallel_state.get_context_parallel_group()
    output = model(
        batch.input_ids,
        labels=batch.labels,
        loss_mask=batch.loss_mask,
        padding_mask=batch.padding_mask,
        cu_seqlens=batch.cu_seqlens,
        mtp_share=share.drafts,
    )

    def mean_loss(losses: Tensor) -> Any:
        weights = torch.ones_like(losses) if batch.loss_mask is None else batch.loss_mask
        total, count = (losses * weights).sum(), weights.sum()
        whole, labels = over_ranks(torch.stack([total.detach(), count.to(total.dtype)]), rows).unbind()
        some = torch.where(labels > 0, labels, torch.ones_like(labels))
        mean = total / some  # megatron adds up the parts of it that the ranks have of a row
        # Apart: megatron divides what it gets in place.
        shown = {"loss": whole / some}
        if share.weight is not None:
            return total, (weights != 0).sum().int(), shown
        if get_model_config(model).calculate_per_token_loss:
            return total, count.int(), shown
        return mean * share.factor if share.factor != 1 else mean, shown

    return output, mean_loss
