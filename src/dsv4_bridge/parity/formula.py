"""One block of multi-token prediction in plain torch and float64, to hold the model's against.

transformers has no such block. Written from the description of the released inference code (inference/model.py,
`MTPBlock`; technical report 2.1), batch first; it shares no line with the model, and reads parameters by the names
that they have in it. Attention is over the window alone, as every released draft block's is.

Shapes: b batch, s tokens, n streams, h hidden, t tokens of all rows, e experts.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..spec.spec import ModelSpec

Watch = Callable[[str, Tensor], None]
_BODY = "mtp_model_layer."


class Formula:
    """One depth.

    Args:
        spec: the model's numbers.
        value: name of a parameter behind the depth's prefix, as `e_proj.weight` -> float64, in the shape it has in
            Megatron's model.
        watch: called with what `mcore.observe` calls a site, and its value: [b, s, h], [t, k] experts, streams
            [b, s, n*h]; besides with `scores`, what experts are chosen by, [t, e].
    """

    def __init__(self, spec: ModelSpec, value: Callable[[str], Tensor], watch: Watch = lambda site, value: None):
        self.spec, self.value, self.watch = spec, value, watch

    def norm(self, x: Tensor, name: str) -> Tensor:
        """RMS norm with its weight."""
        return x * (x.pow(2).mean(-1, keepdim=True) + self.spec.rms_norm_eps) ** -0.5 * self.value(f"{name}.weight")

    def linear(self, x: Tensor, name: str) -> Tensor:
        """[…, i] -> […, o]."""
        return torch.einsum("...i,oi->...o", x, self.value(f"{name}.weight"))

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
        """[b, s, h] -> [b, s, h], over the window and the sink."""
        spec, at = self.spec, f"{_BODY}self_attention."
        low = self.norm(self.linear(x, at + "linear_q_down_proj"), at + "q_layernorm")
        q = self.linear(low, at + "linear_q_up_proj").unflatten(-1, (-1, spec.head_dim))
        q = self.turn(q * (q.pow(2).mean(-1, keepdim=True) + spec.rms_norm_eps) ** -0.5, 1)
        kv = self.norm(self.linear(x, at + "linear_kv_proj"), at + "kv_layernorm")
        kv = self.turn(kv.unsqueeze(2), 1).squeeze(2)
        score = torch.einsum("bqhd,bkd->bhqk", q, kv) * spec.head_dim**-0.5
        q_at, k_at = torch.arange(x.shape[1])[:, None], torch.arange(x.shape[1])
        score = score.masked_fill((k_at > q_at) | (k_at <= q_at - spec.sliding_window), -torch.inf)
        sink = self.value(at + "core_attention.attn_sink").view(-1, 1, 1).expand(*score.shape[:3], 1)
        weight = torch.cat([score, sink], -1).softmax(-1)[..., :-1]
        out = self.turn(torch.einsum("bhqk,bkd->bqhd", weight, kv), -1)
        groups = self.value(at + "linear_o_group_proj").unflatten(0, (spec.o_groups, -1))  # [g, r, heads*d/g]
        low = torch.einsum("bsgi,gri->bsgr", out.flatten(2).unflatten(-1, (spec.o_groups, -1)), groups)
        return self.linear(low.flatten(2), at + "linear_proj")

    def expert(self, x: Tensor, name: str, weight: Tensor | float = 1.0) -> Tensor:
        """A clamped SwiGLU; the weight multiplies its activation."""
        limit = self.spec.swiglu_limit
        gate, up = self.linear(x, f"{name}.linear_fc1").chunk(2, -1)
        return self.linear(F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit) * weight, f"{name}.linear_fc2")

    def experts(self, x: Tensor) -> Tensor:
        """[b, s, h] -> [b, s, h], routed and shared; an expert is asked for once, if any token chose it."""
        spec, at = self.spec, f"{_BODY}mlp."
        flat = x.flatten(0, 1)
        score = F.softplus(self.linear(flat, at + "router")).sqrt()
        biased = score + self.value(at + "router.expert_bias")
        chosen = biased.topk(spec.num_experts_per_tok).indices  # [t, k]
        self.watch("scores", biased)
        self.watch("ffn.router", chosen)
        weight = score.gather(1, chosen)
        weight = weight / weight.sum(-1, keepdim=True) * spec.routed_scaling_factor
        routed = torch.zeros_like(flat)
        for expert in chosen.unique().tolist():
            token, place = (chosen == expert).nonzero(as_tuple=True)
            name = f"{at}experts.local_experts.{expert}"
            routed = routed.index_add(0, token, self.expert(flat[token], name, weight[token, place].unsqueeze(-1)))
        routed = routed.view_as(x)
        self.watch("ffn.experts", routed)
        return routed + self.expert(x, at + "shared_experts")

    def mixed(self, streams: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Input of a sub-layer [b, s, h], its weights on the way back [b, s, n], and the mixing matrix."""
        n, eps, at = self.spec.hc_mult, self.spec.hc_eps, f"{_BODY}{name}_hyper_connection."
        flat = streams.flatten(2)
        scale = (flat.pow(2).mean(-1, keepdim=True) + self.spec.rms_norm_eps) ** -0.5
        m, base = self.linear(flat, at + "mapping_proj") * scale, self.value(at + "bias")
        pre = torch.sigmoid(m[..., :n] * self.value(at + "alpha_pre") + base[:n]) + eps
        post = 2 * torch.sigmoid(m[..., n : 2 * n] * self.value(at + "alpha_post") + base[n : 2 * n])
        c = (m[..., 2 * n :] * self.value(at + "alpha_res") + base[2 * n :]).unflatten(-1, (n, n)).softmax(-1) + eps
        c = c / (c.sum(-2, keepdim=True) + eps)
        for _ in range(self.spec.hc_sinkhorn_iters - 1):
            c = c / (c.sum(-1, keepdim=True) + eps)
            c = c / (c.sum(-2, keepdim=True) + eps)
        return torch.einsum("bsn,bsnh->bsh", pre, streams), post, c

    def __call__(self, streams: Tensor, embedded: Tensor) -> tuple[Tensor, Tensor]:
        """[b, s, n, h] and [b, s, h] -> hidden states [b, s, h], streams [b, s, n, h]."""
        x = self.linear(self.norm(embedded, "enorm"), "e_proj").unsqueeze(2)
        x = x + self.linear(self.norm(streams, "hnorm"), "h_proj")
        for sub, site, norm, run in (
            ("self_attention", "attn", "input_layernorm", self.attention),
            ("mlp", "ffn", "pre_mlp_layernorm", self.experts),
        ):
            one, post, c = self.mixed(x, sub)
            self.watch(f"{site}.mix", one)
            out = run(self.norm(one, _BODY + norm))
            self.watch(site, out)
            x = torch.einsum("bsj,bsh->bsjh", post, out) + torch.einsum("bsij,bsih->bsjh", c, x)
        flat = x.flatten(2)
        self.watch("streams", flat)
        scale = (flat.pow(2).mean(-1, keepdim=True) + self.spec.rms_norm_eps) ** -0.5
        head = torch.einsum("bsi,ni->bsn", flat, self.value("hc_head_fn")) * scale * self.value("hc_head_scale")
        weight = torch.sigmoid(head + self.value("hc_head_base")) + self.spec.hc_eps
        return self.norm(torch.einsum("bsn,bsnh->bsh", weight, x), "final_layernorm"), x


def look_ahead(ids: Tensor, places: int) -> Tensor:
    """[b, s] moved so many places ahead; beyond the end stands token 0, as in megatron."""
    moved = torch.zeros_like(ids)
    moved[:, : max(0, ids.shape[1] - places)] = ids[:, places:]
    return moved
