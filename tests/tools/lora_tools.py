"""Small models and random adapters for the tests of adapter files and merges."""

import torch

from dsv4_bridge.lora.adapters import Adapter, Adapters
from dsv4_bridge.spec.lora import Lora, adapter_size, targets
from dsv4_bridge.spec.spec import ModelSpec, replace_spec
from dsv4_bridge.spec.variants import VARIANTS, tiny


def spec_of() -> ModelSpec:
    """A tiny Flash of two layers, one routed by id, and an MTP block."""
    return replace_spec(tiny(VARIANTS["Flash"]), num_hidden_layers=2, compress_ratios=(0, 4, 0), num_hash_layers=1)


def random_adapters(spec: ModelSpec, lora: Lora, size: float = 0.1, seed: int = 5) -> Adapters:
    """Adapters whose deltas have values of about `size`; magnitudes near 1."""
    random, values = torch.Generator().manual_seed(seed), {}
    for target in targets(spec, lora.keys):
        out, into = target.shape
        a = torch.randn(lora.rank, into, generator=random) / lora.rank**0.5
        b = torch.randn(out, lora.rank, generator=random) * (size / lora.scale)
        values[target.name] = Adapter(a, b, torch.rand(out, generator=random) + 0.5 if lora.dora else None)
    return Adapters(lora, values)


def adapter_values(spec: ModelSpec, lora: Lora) -> int:
    """How many values the adapters of a model have."""
    return sum(adapter_size(lora, *target.shape) for target in targets(spec, lora.keys))
