"""How much memory a comparison takes, said before anything is loaded."""

import torch

from ..errors import BridgeError
from ..free_memory import free_memory
from ..spec.plan import Plan
from ..spec.spec import ModelSpec


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
    # transformers holds all scores, their softmax and a masked copy at once, over window and blocks.
    least = min((r for r in spec.compress_ratios if r), default=length)
    scores = 4 * batch * spec.num_attention_heads * length * (length + length // least) * 4
    logits = 2 * tokens * spec.vocab_size * size
    return model + records * record + scores + records * logits


def _recorded(spec: ModelSpec, ratio: int, tokens: int, length: int, size: int) -> int:
    """Bytes that the record of one layer takes."""
    wide = (5 + spec.hc_mult) * spec.hidden_size * size + spec.n_routed_experts * 4
    if ratio:
        wide += spec.head_dim * size // ratio
    if ratio == 4:
        blocks = length // 4
        wide += 4 * blocks + 8 * min(blocks, spec.index_topk)
    return tokens * wide


def check_memory(nbytes: int, device: torch.device, spec: ModelSpec, dtype: str) -> None:
    """Refuse what does not fit.

    Raises:
        BridgeError: with both numbers, and what would need less.
    """
    free, where = _free(device)
    if nbytes <= free:
        return
    hint = "give fewer tokens (--seq-length, --batch)" + ("" if dtype == "bf16" else ", or --dtype bf16")
    raise BridgeError(
        f"comparing {spec.num_hidden_layers} layers in {dtype}: one model, the record of the reference and its "
        f"largest sub-layer take about {nbytes / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB of {where} are free; {hint}, "
        "or take a machine with more memory"
    )


def _free(device: torch.device) -> tuple[int, str]:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0], "GPU memory"
    return free_memory(), "memory"
