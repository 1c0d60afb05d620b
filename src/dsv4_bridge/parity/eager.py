"""transformers' own eager attention, some heads at a time: the same numbers, and less memory for scores."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

NAME = "eager_by_heads"
_COPIES = 5  # of the scores: as they are, with the mask, with the sink, less the largest, the softmax
_MOST = 1 << 30  # bytes of them


def heads_at_once(batch: int, queries: int, keys: int, itemsize: int) -> int:
    """Heads whose scores are held at a time."""
    return max(1, _MOST // max(1, _COPIES * batch * queries * keys * itemsize))


def scores_bytes(batch: int, heads: int, queries: int, keys: int, itemsize: int) -> int:
    """Bytes of scores at the peak."""
    held = min(heads, heads_at_once(batch, queries, keys, itemsize))
    return _COPIES * held * batch * queries * keys * itemsize


def register() -> str:
    """Make it known to transformers; its name."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, _attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, eager_mask)
    return NAME


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **how: Any
) -> tuple[Tensor, None]:
    """Query [b, heads, s, d], the one key and value head [b, 1, t, d] -> [b, s, heads, d]."""
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import eager_attention_forward

    batch, heads, queries, _ = query.shape
    step = heads_at_once(batch, queries, key.shape[2], query.element_size())
    found = []
    for first in range(0, heads, step):
        some = slice(first, min(heads, first + step))
        part = SimpleNamespace(
            num_key_value_groups=some.stop - some.start, sinks=module.sinks[some], training=module.training
        )
        found.append(eager_attention_forward(part, query[:, some], key, value, attention_mask, **how)[0])  # type: ignore[arg-type]
    return torch.cat(found, 2), None
