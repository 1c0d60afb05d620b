"""transformers' model: filled from any checkpoint, and watched while it runs.

Values come decoded from this package's own readers, so every encoding and a Megatron checkpoint
serve, on any machine; transformers only computes. Nothing in it is changed: the record is made by
forward hooks, in transformers' layouts, [b, s, …].
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..codec.tensors import as_tensor
from ..errors import BridgeError
from ..spec.plan import Item, expand
from ..spec.spec import ModelSpec
from ..store.hf import disk_name
from ..store.hf_config import released_config
from ..store.values import Scratch, Values
from .eager import register


@dataclass
class Record:
    """What one forward pass showed, on the host.

    Attributes:
        values: (block, site) -> value: [b, s, h]; [b, n, d] entries; [b, s, k] blocks, -1 for none;
            [b*s, k] experts; [b, s, n*h] streams.
        scores: (block, site) -> what a choice was made by: [b*s, experts]; [b*s, blocks], -inf where a
            block is not visible yet.
        logits: [b, s, vocabulary].
    """

    values: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    scores: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))


def reference_model(spec: ModelSpec, values: Values, dtype: torch.dtype, device: torch.device) -> Any:
    """The transformers DeepseekV4ForCausalLM holding the values of a checkpoint.

    Args:
        spec: the model's numbers, without draft blocks.
        values: decoded.
        dtype: of its parameters; what transformers keeps in float32 stays so.
        device: where it runs.

    Raises:
        BridgeError: transformers is not installed, or its model has other tensors than the table says.
    """
    model = empty_reference(spec, dtype)
    awaited = set(model.state_dict())
    fill_reference(model, expand(spec).items, spec, values.stripes, awaited)
    if awaited:
        raise BridgeError(f"filling transformers' model: no tensor of a checkpoint is its {', '.join(sorted(awaited))}")
    return model.to(device)


def empty_reference(spec: ModelSpec, dtype: torch.dtype) -> Any:
    """Transformers' model without values.

    Raises:
        BridgeError: transformers is not installed.
    """
    try:
        from transformers import DeepseekV4Config, DeepseekV4ForCausalLM
        from transformers.initialization import no_init_weights
    except ImportError:
        raise BridgeError(
            "comparing with transformers: it is not installed; pip install 'dsv4-bridge[megatron,hf]'"
        ) from None
    config = DeepseekV4Config.from_dict(released_config(spec, None, False))
    config._attn_implementation = register()
    config._experts_implementation = "eager"
    with no_init_weights():
        model: Any = DeepseekV4ForCausalLM(config).eval()
    stay = set(model._keep_in_fp32_modules_strict or ())
    for name, parameter in model.named_parameters():
        if dtype is not torch.float32 and not stay & set(name.split(".")):
            parameter.data = torch.empty_like(parameter, dtype=dtype)
    for norm in (m for m in model.modules() if isinstance(m, type(model.model.norm))):
        norm.register_forward_hook(_as_it_came)
    return model


def _as_it_came(module: Any, args: Any, output: Tensor) -> Tensor:
    """A norm's output in its input's type: before transformers 5.20 it is float32, which bf16 layers refuse."""
    return output.to(args[0].dtype)


Stripes = Callable[[Item, int, int, Scratch], Iterable[np.ndarray]]


def fill_reference(model: Any, items: Iterable[Item], spec: ModelSpec, stripes: Stripes, awaited: set[str]) -> None:
    """Put values of items where transformers' model has them.

    Args:
        model: the model, or a part of it under the names of the whole.
        items: what to fill.
        spec: the model's numbers.
        stripes: gives the values, as `Values.stripes`.
        awaited: names that are to be filled; those that were are taken out.

    Raises:
        BridgeError: it has no such tensor.
    """
    live = dict(model.named_parameters()) | dict(model.named_buffers())
    scratch = Scratch()
    for item in items:
        name, stack = disk_name(item, "modules", spec)
        if name not in live:
            raise BridgeError(f"filling transformers' model: it has no {name}, for {item.name}")
        target = live[name].data
        if stack and item.expert is not None:  # experts stacked, gate and up stacked by rows
            first = item.row.part[0] * item.shape[0]
            target = target[item.expert, first : first + item.shape[0]]
        at = 0
        for stripe in stripes(item, 0, item.shape[0], scratch):
            target[at : at + len(stripe)].copy_(as_tensor(stripe))
            at += len(stripe)
        awaited.discard(name)


def set_index_topk(model: Any, topk: int) -> None:
    """Let every indexer of the reference choose so many blocks."""
    for module in model.modules():
        if hasattr(module, "index_topk"):
            module.index_topk = topk


def record_reference(model: Any, ids: Tensor) -> Record:
    """Run the reference on ids [b, s] and keep what every site shows."""
    record = Record()
    with torch.no_grad(), hooked(reference_hooks(model, record)):
        record.logits = model(ids, use_cache=False).logits.cpu()
    return record


Hooks = Iterable[tuple[Any, Callable[..., None]]]


@contextmanager
def hooked(hooks: Hooks) -> Iterator[None]:
    """Modules call what they are given with their output, in the body."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def reference_hooks(model: Any, record: Record) -> Hooks:
    """What records every site of the model."""
    for index, layer in enumerate(model.model.layers):
        yield from layer_hooks(layer, index, record)
    yield from head_hooks(model, record)


def head_hooks(model: Any, record: Record) -> Hooks:
    """What records the site behind the last layer."""

    def keep(module: Any, args: Any, output: Tensor) -> None:
        record.values["model", "head"] = output.detach().cpu()

    yield model.model.norm, keep


def layer_hooks(layer: Any, index: int, record: Record) -> Hooks:
    """What records every site of a layer."""

    def keep(block: str, site: str, take: Callable[[Any], Tensor]) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            record.values[block, site] = take(output).detach().cpu()

        return hook

    def block_scores(block: str, ratio: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Tensor) -> None:  # [b, s, n]
            seen = (torch.arange(output.shape[1], device=output.device) + 1) // ratio
            hidden = torch.arange(output.shape[2], device=output.device) >= seen[:, None]
            record.scores[block, "attn.index"] = output.masked_fill(hidden, -torch.inf).flatten(0, 1).cpu()

        return hook

    def expert_scores(block: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            scores = module.score_fn(output[0]) + module.e_score_correction_bias
            record.scores[block, "ffn.router"] = scores.cpu()

        return hook

    block, attention, experts = f"layers.{index}", layer.self_attn, layer.mlp
    yield layer.attn_hc, keep(block, "attn.mix", lambda out: out[2])
    if attention.compressor is not None:
        yield attention.compressor, keep(block, "attn.compressor", lambda out: out[0].squeeze(1))
        indexer = getattr(attention.compressor, "indexer", None)
        if indexer is not None:
            yield indexer, keep(block, "attn.index", lambda out: out)
            yield indexer.scorer, block_scores(block, indexer.compress_rate)
    yield attention, keep(block, "attn", lambda out: out[0])
    yield layer.ffn_hc, keep(block, "ffn.mix", lambda out: out[2])
    yield experts.gate, keep(block, "ffn.router", lambda out: out[2])
    if not experts.is_hash:
        yield experts.gate, expert_scores(block)
    yield experts.experts, keep(block, "ffn.experts", lambda out: out)  # [b*s, h]
    yield experts, keep(block, "ffn", lambda out: out)
    yield layer, keep(block, "streams", lambda out: out.flatten(2))
