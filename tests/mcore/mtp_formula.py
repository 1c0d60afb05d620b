"""The formula of multi-token prediction in float64 (`parity.formula`) with the parameters of a model."""

import torch
from reference import draft_spec, randomise, some_ids
from torch import Tensor
from torch.nn import functional as F

from dsv4_bridge.mcore import DeepSeekV4Model, build_model
from dsv4_bridge.mcore.layers.observe import watching
from dsv4_bridge.parity.formula import Formula, look_ahead

# The two eps differ and are large: one in place of the other shows.
SPECS = {n: draft_spec(n, hc_eps=1e-3, rms_norm_eps=1e-4, swiglu_limit=4.0) for n in (1, 2)}


def formula_logits(model: DeepSeekV4Model, values: dict[str, Tensor], streams: Tensor, ids: Tensor) -> list[Tensor]:
    """Logits of every depth from the trunk's streams [b, s, n, h]; beyond the end stands token 0, as in megatron."""
    found = []
    for depth in range(model.spec.mtp_layers):
        block = Formula(model.spec, lambda name, depth=depth: values[f"mtp.layers.{depth}.{name}"])
        embedded = F.embedding(look_ahead(ids, depth + 1), values["embedding.word_embeddings.weight"])
        hidden, streams = block(streams, embedded)
        found.append(torch.einsum("bsh,vh->bsv", hidden, values["output_layer.weight"]))
    return found


def close(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def far(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """Gradients that differ, by name; the three `alpha_*` are one vector, as released.

    One alone may be a sum that cancels: layer 0 mixes equal streams, and its alpha_res has no gradient.
    """
    assert set(ours) == set(theirs)
    found = {}
    for name in theirs:
        parts = [name]
        if name.endswith("alpha_pre"):
            parts += [name.replace("alpha_pre", part) for part in ("alpha_post", "alpha_res")]
        elif name.endswith(("alpha_post", "alpha_res")):
            continue
        mine, exact = (torch.cat([side[p].flatten() for p in parts]) for side in (ours, theirs))
        if not (close(mine, exact) <= 1e-4 if exact.any() else not mine.any()):
            found[name] = close(mine, exact)
    return found


def assert_mtp_is_the_formula(depth: int, length: int) -> None:
    spec = SPECS[depth]
    model = randomise(build_model(spec, initialize_weights=False), 11).eval()
    ids = some_ids(spec, 2, length)
    # The trunk is cut off behind its last layer: what reaches the streams is MTP's alone.
    streams = torch.randn((length, 2, spec.hc_mult * spec.hidden_size), generator=torch.Generator().manual_seed(3)) / 2
    streams.requires_grad_()
    last = f"layers.{spec.num_hidden_layers - 1}"
    with watching(lambda site, block, value: streams if (site, block) == ("streams", last) else None):
        ours = model.mtp_logits(ids)
    values = {n: t.detach().double().requires_grad_() for n, t in model.named_parameters()}
    values |= {n: t.double() for n, t in model.named_buffers() if n.endswith("expert_bias")}
    wide = streams.detach().double().transpose(0, 1).unflatten(-1, (spec.hc_mult, -1)).requires_grad_()
    theirs = formula_logits(model, values, wide, ids)
    assert len(ours) == len(theirs) == depth
    pulls = [torch.randn(t.shape, generator=torch.Generator().manual_seed(k)) for k, t in enumerate(ours)]
    for mine, formula in zip(ours, theirs, strict=True):
        assert float((mine - formula).abs().max() / formula.abs().max()) <= 1e-5
    torch.stack([(mine * pull).sum() for mine, pull in zip(ours, pulls, strict=True)]).sum().backward()
    torch.stack([(one * pull).sum() for one, pull in zip(theirs, pulls, strict=True)]).sum().backward()
    assert wide.grad is not None and streams.grad is not None
    assert close(streams.grad.transpose(0, 1).unflatten(-1, (spec.hc_mult, -1)), wide.grad) <= 1e-4
    ours_by_name = {n: p.grad for n, p in model.named_parameters() if not n.startswith("decoder.")}
    # An expert that no token chose has no part in the formula.
    exact = {n: torch.zeros_like(values[n]) if (g := values[n].grad) is None else g for n in ours_by_name}
    assert sum(bool(g.any()) for g in exact.values()) > 30 * depth
    assert far(ours_by_name, exact) == {}
