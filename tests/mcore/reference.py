"""transformers' DeepseekV4ForCausalLM with every parameter random, and our model with the same values."""

import json
from pathlib import Path

import torch
from transformers import AutoConfig, DeepseekV4ForCausalLM

from dsv4_bridge.config import released_config
from dsv4_bridge.mcore import DeepSeekV4Model, build_model, load_weights
from dsv4_bridge.spec import ModelSpec, replace_spec
from dsv4_bridge.store.hf import disk_name
from dsv4_bridge.variants import VARIANTS, tiny


def small_spec(**changes: object) -> ModelSpec:
    """A window, two CSA and an HCA layer, the first routed by id; no MTP, which transformers lacks."""
    base = replace_spec(
        tiny(VARIANTS["Flash"]).without_draft(),
        num_hidden_layers=4,
        compress_ratios=(0, 4, 128, 4),
        num_hash_layers=1,
        swiglu_limit=1.0,
    )
    return replace_spec(base, **changes) if changes else base


def reference_model(
    spec: ModelSpec, folder: Path, seed: int = 0, embedding_rms: float = 0.005
) -> DeepseekV4ForCausalLM:
    """A random float32 reference; sinks, biases, ape, bases, norms, scales and tables are random too.

    Small embeddings show where eps stands; wide expert inputs reach the clamp.
    """
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(released_config(spec, None, False)))
    config = AutoConfig.from_pretrained(folder)
    config._attn_implementation = "eager"
    model = DeepseekV4ForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" in name:
                continue
            if "tid2eid" in name:
                tensor.copy_(_table(tensor.shape, spec.n_routed_experts))
            elif "embed_tokens" in name:
                tensor.normal_(0, embedding_rms)
            elif "norm" in name:
                tensor.normal_(1.0, 0.3)
            elif name.endswith("scale"):
                tensor.normal_(0.8, 0.5)
            elif name.endswith(("base", "sinks", "position_bias", "bias")):
                tensor.normal_(0, 0.7)
            elif "_hc.fn" in name or "hc_fn" in name:
                tensor.normal_(0, 0.05)
            elif "gate.weight" in name:
                tensor.normal_(0, 0.15)
            else:
                tensor.normal_(0, 1.5 * tensor.shape[-1] ** -0.5)
    return model


def _table(shape: torch.Size, experts: int) -> torch.Tensor:
    return torch.stack([torch.randperm(experts)[: shape[1]] for _ in range(shape[0])])


def our_model(reference: DeepseekV4ForCausalLM, spec: ModelSpec, folder: Path, **settings: object) -> DeepSeekV4Model:
    """Our model with the reference's values, by way of a folder that transformers saved."""
    reference.save_pretrained(folder / "saved")
    model = build_model(spec, initialize_weights=False, **settings)
    load_weights(model, folder / "saved", allow_lossy=True)
    return model.eval()


def gradients_of(
    reference: DeepseekV4ForCausalLM, model: DeepSeekV4Model
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Name -> (the reference's gradient, ours), for every item that has one in the reference."""
    from dsv4_bridge.mcore.places import places

    theirs = dict(reference.named_parameters())
    plan, found = places(model)
    pairs = {}
    for item in plan.items:
        name, stack = disk_name(item, "modules", model.spec)
        if name not in theirs or theirs[name].grad is None:
            continue
        grad = theirs[name].grad
        if stack:  # stacked along experts, then along gate and up
            count = item.row.part[1]
            rows = item.shape[0]
            part = stack[0] % count
            grad = grad[item.expert, part * rows : (part + 1) * rows]
        ours = [p.tensor.grad[p.row : p.row + p.stop - p.start] for p in found[item.name]]
        pairs[item.name] = (grad, torch.cat(ours))
    return pairs
