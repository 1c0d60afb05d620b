"""One formula of multi-token prediction, in plain torch and float64, to hold the model's against.

Written from the description of the released inference code, batch first; it shares no line with the
model, and reads the model's parameters by their names in `state_dict`.
"""

import torch
from reference import draft_spec, randomise, some_ids
from torch import Tensor
from torch.nn import functional as F

from dsv4_bridge.mcore import DeepSeekV4Model, build_model
from dsv4_bridge.mcore.observe import watching

# The two eps differ and are large: one in place of the other shows.
SPECS = {n: draft_spec(n, hc_eps=1e-3, rms_norm_eps=1e-4, swiglu_limit=4.0) for n in (1, 2)}


class Formula:
    """One MTP depth; b batch, s tokens, n streams, h hidden."""

    def __init__(self, model: DeepSeekV4Model, depth: int, values: dict[str, Tensor]):
        self.spec, self.values, self.prefix = model.spec, values, f"mtp.layers.{depth}."

    def __getitem__(self, name: str) -> Tensor:
        return self.values[self.prefix + name]

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + self.spec.rms_norm_eps) ** -0.5 * self[f"{name}.weight"]

    def linear(self, x: Tensor, name: str) -> Tensor:
        return torch.einsum("...i,oi->...o", x, self[f"{name}.weight"])

    def turn(self, x: Tensor, way: int) -> Tensor:
        """Rotate pairs of the last channels of [b, s, heads, d] by their position; plain base, no YaRN."""
        width = self.spec.qk_rope_head_dim
        pair = torch.arange(width // 2, dtype=torch.float64)
        position = torch.arange(x.shape[1], dtype=torch.float64)
        angle = way * position[:, None] / self.spec.rope_theta ** (2 * pair / width)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        even, odd = x[..., -width::2], x[..., -width + 1 :: 2]
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
        return torch.cat([x[..., :-width], turned], -1)

    def attention(self, x: Tensor) -> Tensor:
        spec, at = self.spec, "mtp_model_layer.self_attention."
        low = self.norm(self.linear(x, at + "linear_q_down_proj"), at + "q_layernorm")
        q = self.linear(low, at + "linear_q_up_proj").unflatten(-1, (-1, spec.head_dim))
        q = self.turn(q * (q.pow(2).mean(-1, keepdim=True) + spec.rms_norm_eps) ** -0.5, 1)
        kv = self.norm(self.linear(x, at + "linear_kv_proj"), at + "kv_layernorm")
        kv = self.turn(kv.unsqueeze(2), 1).squeeze(2)
        score = torch.einsum("bqhd,bkd->bhqk", q, kv) * spec.head_dim**-0.5
        q_at, k_at = torch.arange(x.shape[1])[:, None], torch.arange(x.shape[1])
        score = score.masked_fill((k_at > q_at) | (k_at <= q_at - spec.sliding_window), -torch.inf)
        sink = self[at + "core_attention.attn_sink"].view(-1, 1, 1).expand(*score.shape[:3], 1)
        weight = torch.cat([score, sink], -1).softmax(-1)[..., :-1]
        out = self.turn(torch.einsum("bhqk,bkd->bqhd", weight, kv), -1)
        groups = self[at + "linear_o_group_proj"].unflatten(0, (spec.o_groups, -1))  # [g, r, heads*d/g]
        low = torch.einsum("bsgi,gri->bsgr", out.flatten(2).unflatten(-1, (spec.o_groups, -1)), groups)
        return self.linear(low.flatten(2), at + "linear_proj")

    def expert(self, x: Tensor, name: str, weight: Tensor | float = 1.0) -> Tensor:
        limit = self.spec.swiglu_limit
        gate, up = self.linear(x, f"{name}.linear_fc1").chunk(2, -1)
        return self.linear(F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit) * weight, f"{name}.linear_fc2")

    def experts(self, x: Tensor) -> Tensor:
        spec, at = self.spec, "mtp_model_layer.mlp."
        score = F.softplus(self.linear(x, at + "router")).sqrt()
        biased = score + self[at + "router.expert_bias"]
        threshold = biased.topk(spec.num_experts_per_tok).values[..., -1:]
        weight = score * (biased >= threshold)
        weight = weight / weight.sum(-1, keepdim=True) * spec.routed_scaling_factor
        routed = [
            self.expert(x, f"{at}experts.local_experts.{e}", weight[..., e : e + 1])
            for e in range(spec.n_routed_experts)
        ]
        return sum(routed) + self.expert(x, at + "shared_experts")

    def mixed(self, streams: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Input of a sub-layer [b, s, h], its weights on the way back [b, s, n], and the mixing matrix."""
        n, eps, at = self.spec.hc_mult, self.spec.hc_eps, f"mtp_model_layer.{name}_hyper_connection."
        flat = streams.flatten(2)
        m = self.linear(flat, at + "mapping_proj") * (flat.pow(2).mean(-1, keepdim=True) + self.spec.rms_norm_eps) ** (
            -0.5
        )
        base = self[at + "bias"]
        pre = torch.sigmoid(m[..., :n] * self[at + "alpha_pre"] + base[:n]) + eps
        post = 2 * torch.sigmoid(m[..., n : 2 * n] * self[at + "alpha_post"] + base[n : 2 * n])
        c = (m[..., 2 * n :] * self[at + "alpha_res"] + base[2 * n :]).unflatten(-1, (n, n)).softmax(-1) + eps
        c = c / (c.sum(-2, keepdim=True) + eps)
        for _ in range(self.spec.hc_sinkhorn_iters - 1):
            c = c / (c.sum(-1, keepdim=True) + eps)
            c = c / (c.sum(-2, keepdim=True) + eps)
        return torch.einsum("bsn,bsnh->bsh", pre, streams), post, c

    def __call__(self, streams: Tensor, embedded: Tensor) -> tuple[Tensor, Tensor]:
        """[b, s, n, h] and [b, s, h] -> hidden states [b, s, h], streams [b, s, n, h]."""
        x = self.linear(self.norm(embedded, "enorm"), "e_proj").unsqueeze(2)
        x = x + self.linear(self.norm(streams, "hnorm"), "h_proj")
        for sub, norm, run in (
            ("self_attention", "input_layernorm", self.attention),
            ("mlp", "pre_mlp_layernorm", self.experts),
        ):
            one, post, c = self.mixed(x, sub)
            out = run(self.norm(one, f"mtp_model_layer.{norm}"))
            x = torch.einsum("bsj,bsh->bsjh", post, out) + torch.einsum("bsij,bsih->bsjh", c, x)
        flat = x.flatten(2)
        scale = (flat.pow(2).mean(-1, keepdim=True) + self.spec.rms_norm_eps) ** -0.5
        head = torch.einsum("bsi,ni->bsn", flat, self["hc_head_fn"]) * scale * self["hc_head_scale"]
        weight = torch.sigmoid(head + self["hc_head_base"]) + self.spec.hc_eps
        return self.norm(torch.einsum("bsn,bsnh->bsh", weight, x), "final_layernorm"), x


def formula_logits(model: DeepSeekV4Model, values: dict[str, Tensor], streams: Tensor, ids: Tensor) -> list[Tensor]:
    """Logits of every depth from the trunk's streams [b, s, n, h]; beyond the end stands token 0, as in megatron."""
    found = []
    for depth in range(model.spec.mtp_layers):
        ahead = torch.zeros_like(ids)
        ahead[:, : -depth - 1] = ids[:, depth + 1 :]
        hidden, streams = Formula(model, depth, values)(
            streams, F.embedding(ahead, values["embedding.word_embeddings.weight"])
        )
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
    model = randomise(build_model(spec), 11).eval()
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
    exact = {n: values[n].grad for n in ours_by_name}
    assert sum(bool(g.any()) for g in exact.values()) > 30 * depth
    assert far(ours_by_name, exact) == {}
