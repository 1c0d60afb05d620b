"""How much memory a comparison takes, said before anything is loaded."""

import torch

from ..errors import BridgeError
from ..free_memory import free_memory
from ..spec.plan import Plan
from ..spec.spec import ModelSpec
from .eager import scores_bytes

_MARGIN = 1.15  # what the allocator keeps of memory that was given back


def needed(plan: Plan, batch: int, length: int, dtype: torch.dtype, records: int = 1) -> int:
    """Bytes at the peak: one model (they are loaded one after the other), the record, the largest sub-layer.

    Args:
        plan: of the model.
        batch: rows.
        length: tokens a row.
        dtype: of parameters and activations.
        records: of the reference.
    """
    spec, size, tokens = plan.spec, dtype.itemsize, batch * length
    model = sum(item.numel for item in plan.items) * size
    record = sum(_recorded(spec, spec.ratio(i), tokens, length, size) for i in range(spec.num_hidden_layers))
    logits = 2 * tokens * spec.vocab_size * size
    return model + records * record + _scores(spec, batch, length) + records * logits


def needed_streamed(plan: Plan, batch: int, length: int, dtype: torch.dtype, same: bool, ways: int = 1) -> int:
    """The same of a comparison by layers: a layer without its experts and one expert, or the output layers.

    Args:
        plan: of the model.
        batch: rows.
        length: tokens a row.
        dtype: of parameters and activations.
        same: whether both sides read one checkpoint.
        ways: passes; each has streams of the reference, of ours, and of ours with choices replayed.
    """
    spec, size, tokens = plan.spec, dtype.itemsize, batch * length
    dense: dict[str, int] = {}
    for item in plan.items:
        if item.expert is None:
            dense[item.block.prefix] = dense.get(item.block.prefix, 0) + item.numel * size
    tables = spec.vocab_size * spec.hidden_size * size
    dense[""] -= tables  # of the embedding, rows are read
    experts = 2 * 3 * 3 * spec.moe_intermediate_size * spec.hidden_size * size  # each side decodes two ahead
    record = max(_recorded(spec, spec.ratio(i), tokens, length, size) for i in range(spec.num_hidden_layers))
    layer = max(n for prefix, n in dense.items() if prefix) + ways * record + _scores(spec, batch, length)
    logits = 4 * 8 * min(tokens, 160 * batch) * spec.vocab_size
    head = dense[""] + (0 if same else tables) + logits
    draft = dense[""] + dense.get("mtp.0.", 0) + logits
    streams = ways * 4 * tokens * spec.hc_mult * spec.hidden_size * size
    return round(_MARGIN * (streams + experts + max(layer, head, draft)))


def _scores(spec: ModelSpec, batch: int, length: int) -> int:
    """Bytes of the reference's scores over window and blocks, which are wider than ours."""
    least = min((r for r in spec.compress_ratios if r), default=length)
    return scores_bytes(batch, spec.num_attention_heads, length, length + length // least, 4)


def _recorded(spec: ModelSpec, ratio: int, tokens: int, length: int, size: int) -> int:
    """Bytes that the record of one layer takes."""
    wide = (5 + spec.hc_mult) * spec.hidden_size * size + spec.n_routed_experts * 4
    if ratio:
        wide += spec.head_dim * size // ratio
    if ratio == 4:
        blocks = length // 4
        wide += 4 * blocks + 8 * min(blocks, spec.index_topk)
    return tokens * wide


def check_memory(nbytes: int, device: torch.device, spec: ModelSpec, dtype: str, streamed: bool = False) -> None:
    """Refuse what does not fit.

    Raises:
        BridgeError: with both numbers, and what would need less.
    """
    free, where = _free(device)
    if nbytes <= free:
        return
    hint = "" if streamed else "a layer at a time (--stream) takes less; or "
    hint += "give fewer tokens (--seq-length, --batch)" + ("" if dtype == "bf16" else ", or --dtype bf16")
    what = "the largest layer of each" if streamed else "one model"
    raise BridgeError(
        f"comparing {spec.num_hidden_layers} layers in {dtype}: {what}, the record of the reference and its "
        f"largest sub-layer take about {nbytes / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB of {where} are free; {hint}, "
        "or take a machine with more memory"
    )


def _free(device: torch.device) -> tuple[int, str]:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0], "GPU memory"
    return free_memory(), "memory"
