"""The indexer's objective under tensor parallelism: the attention's heads are cut over ranks, the indexer is not."""

from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup

from ..kernels import indexer_loss as kernel
from ..kernels.attention import Reach
from ..kernels.choice import AUTO, Choice
from ..kernels.index import IndexTerms


def indexer_loss(
    terms: IndexTerms,
    q: Tensor,
    kv: Tensor,
    blocks: Tensor,
    chosen: Tensor | None,
    sink: Tensor,
    reach: Reach,
    counted: Tensor | None = None,
    tp_group: ProcessGroup | None = None,
    by: Choice = AUTO,
) -> Tensor:
    """As the kernel of the same name, with `tp_group` the ranks that the heads are cut over."""

    def over_ranks(x: Tensor) -> Tensor:
        return reduce_from_tensor_model_parallel_region(x, tp_group)

    several = tp_group is not None and tp_group.size() > 1
    given = (terms, q, kv, blocks, chosen, sink, reach, counted)
    return kernel.indexer_loss(*given, over_ranks if several else None, by)
