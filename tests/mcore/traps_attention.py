"""Traps of hyper-connections and attention; see `traps.py`."""

import bugs
import checks
import torch
from bugs import Bug, Trap, put
from checks import TINY

from dsv4_bridge.mcore import config
from dsv4_bridge.mcore.kernels import pool, rotary, streams
from dsv4_bridge.mcore.layers import attention, block, compressor, mtp, rope
from dsv4_bridge.mcore.layers.attention import CoreAttention, HybridAttention
from dsv4_bridge.mcore.layers.basics import RMSNorm
from dsv4_bridge.mcore.layers.compressor import Compressor
from dsv4_bridge.mcore.layers.floats import KeepsFloat32
from dsv4_bridge.mcore.layers.hyper_connection import HyperConnection
from dsv4_bridge.mcore.layers.indexer import Indexer
from dsv4_bridge.parallel import pieces

frequencies, yarn, plain = "layer_frequencies", "yarn_frequencies", rope.plain_frequencies
unrefused: dict[str, Bug] = {"nothing is refused": put(config, "refuse_unsound", lambda _: lambda made: None)}
cast_like_all: dict[str, Bug] = {"cast like all": put(KeepsFloat32, "_apply", lambda _: torch.nn.Module._apply)}


def mixing(make: bugs.Make) -> Bug:
    return put(HyperConnection, "expand", make)


def sinkhorn(make: bugs.Make) -> Bug:
    return put(streams, "sinkhorn", make)


def turning(make: bugs.Make) -> Bug:
    return put(attention, "rotate", make)


def attending(make: bugs.Make) -> Bug:
    return put(attention, "attend", make)


same = checks.equal_to_transformers

HYPER_CONNECTIONS = [
    Trap(
        1,
        "the mixing matrix is used transposed",
        same,
        {
            "untransposed": mixing(lambda f: lambda self, out, x, post, mix: f(self, out, x, post, mix.mT)),
        },
    ),
    Trap(
        2,
        "Sinkhorn counts, orders and pads as released",
        same,
        {
            "one iteration less": sinkhorn(lambda f: lambda m, n, eps, by: f(m, n - 1, eps, by)),
            "one iteration more": sinkhorn(lambda f: lambda m, n, eps, by: f(m, n + 1, eps, by)),
            "rows first": sinkhorn(lambda f: lambda m, n, eps, by: f(m.mT, n, eps, by).mT),
            "no eps": sinkhorn(lambda f: lambda m, n, eps, by: f(m, n, 0.0, by)),
            "eps on post": mixing(lambda f: lambda self, out, x, post, mix: f(self, out, x, post + 1e-2, mix)),
        },
    ),
    Trap(
        3,
        "eps is inside the root",
        checks.equal_to_transformers_at_released_eps,
        {
            "outside": put(
                streams,
                "inverse_rms",
                lambda _: lambda x, eps: 1 / (x.float().square().mean(-1, keepdim=True).sqrt() + eps),
            ),
        },
    ),
    Trap(4, "float32 parameters survive a cast", checks.float32_survives_a_cast, cast_like_all),
    Trap(
        5,
        "the three scales arrive in their order",
        checks.loaded_equals_transformers,
        {
            "reversed": put(pieces, "live_names", bugs.alphas_reversed),
        },
    ),
    Trap(
        7,
        "checkpoints hold the learned heads",
        checks.checkpoint_has_every_tensor,
        {
            "without the trunk's": put(block, "sharded_head", lambda _: lambda *args: {}),
            "without a depth's": put(mtp, "sharded_head", lambda _: lambda *args: {}),
        },
    ),
    Trap(
        8,
        "streams are collapsed in float32",
        checks.bf16_collapse_equals_transformers,
        {
            "weights rounded first": put(streams, "collapse", lambda f: lambda x, w, by: f(x, w.to(x.dtype), by)),
        },
    ),
    Trap(
        60,
        "mixing is that of the dev branch, not of main",
        same,
        {
            "mean instead of the head": put(block, "collapse_by_head", lambda _: bugs.mean_of_streams),
            "no eps on pre": put(streams, "collapse", lambda f: lambda x, w, by: f(x, w - TINY.hc_eps, by)),
            "sums are clamped": sinkhorn(lambda f: lambda m, n, eps, by: f(m - eps, n, 0.0, by)),
        },
    ),
]

ATTENTION = [
    Trap(
        9,
        "the rotated width is not scaled twice",
        same,
        {
            "a quarter": put(rope, frequencies, lambda f: lambda c, ratio: f(c, ratio)[: TINY.qk_rope_head_dim // 8]),
        },
    ),
    Trap(9, "another factor of it is refused", checks.refuses(rotary_percent=0.5), unrefused),
    Trap(
        10,
        "YaRN is on compressed layers and no other",
        same,
        {
            "everywhere": put(rope, frequencies, lambda f: lambda c, ratio: f(c, 4)),
            "nowhere": put(rope, yarn, lambda _: lambda width, base, *rest: plain(width, base)),
            "with the window's base": put(rope, yarn, lambda f: lambda w, base, *rest: f(w, TINY.rope_theta, *rest)),
        },
    ),
    Trap(
        11,
        "the compressed base is the config's",
        same,
        {
            "40000": put(rope, yarn, lambda f: lambda width, base, *rest: f(width, 40000.0, *rest)),
        },
    ),
    Trap(
        12,
        "YaRN has no attention factor",
        same,
        {
            "in the turns": put(
                rope, "turns", lambda f: lambda c, ratio, at: f(c, ratio, at) * (1.277 if ratio else 1)
            ),
            "in the scores": attending(lambda f: lambda q, *rest: f(q * 1.277, *rest)),
        },
    ),
    Trap(12, "one is refused", checks.refuses(mscale=1.2), unrefused),
    Trap(
        13,
        "the output is rotated back",
        same,
        {
            "not at all": turning(lambda f: lambda x, turn, inverse=False, **by: x if inverse else f(x, turn)),
            "forwards": turning(lambda f: lambda x, turn, inverse=False, **by: f(x, turn)),
        },
    ),
    Trap(
        14,
        "an entry stands where its first token does",
        same,
        {
            "at its number": put(compressor, "turns", lambda f: lambda c, ratio, at: f(c, ratio, at // ratio)),
            "at its last token": put(compressor, "turns", lambda f: lambda c, ratio, at: f(c, ratio, at + ratio - 1)),
        },
    ),
    Trap(
        15,
        "blocks of 4 overlap",
        same,
        {
            "own block twice": put(pool, "overlapped", lambda _: lambda x, none: torch.cat(x.chunk(2, -1), 2)),
            "halves exchanged": put(
                pool, "overlapped", lambda f: lambda x, none: f(x.roll(x.shape[-1] // 2, -1), none)
            ),
        },
    ),
    Trap(
        15,
        "4 is CSA and 128 HCA",
        checks.shapes_tell_the_ratios_apart,
        {
            "swapped": put(CoreAttention, "__init__", bugs.ratios_swapped),
        },
    ),
    Trap(
        16,
        "queries and keys of the indexer are rotated alike",
        same,
        {
            "Hadamard on one side": put(Indexer, "_queries", bugs.hadamard_on_queries),
        },
    ),
    Trap(17, "FP8 and FP4 are refused", checks.refuses(fp8="hybrid", fp4="e2m1"), unrefused),
    Trap(
        18,
        "the indexer is frozen, and nothing else",
        checks.only_the_indexer_is_frozen,
        {
            "compressors too": put(Compressor, "forward", torch.no_grad()),
        },
    ),
    Trap(
        19,
        "each head has its sink, in float32",
        same,
        {
            "the first for all": attending(
                lambda f: lambda q, kv, x, i, sink, *rest: f(q, kv, x, i, sink[:1].expand_as(sink), *rest)
            ),
            "in bf16": attending(
                lambda f: lambda q, kv, x, i, sink, *rest: f(q, kv, x, i, sink.bfloat16().float(), *rest)
            ),
            "none": attending(lambda f: lambda q, kv, x, i, sink, *rest: f(q, kv, x, i, sink - 1e4, *rest)),
        },
    ),
    Trap(
        20,
        "a name finds its own tensor",
        checks.names_find_their_own_tensor,
        {
            "wq_b is indexer.wq_b": put(pieces, "live_names", bugs.swapped("attn.wq_b", "attn.indexer.wq_b")),
        },
    ),
    Trap(
        21,
        "groups of the output are neighbouring heads",
        same,
        {
            "interleaved": put(HybridAttention, "_by_group", bugs.heads_interleaved),
        },
    ),
    Trap(
        22,
        "queries are normed by head, with the model's eps",
        same,
        {
            "not at all": put(rotary, "inverse_rms", lambda _: lambda x, eps, by: torch.ones_like(x[..., :1])),
            "over all heads": put(
                rotary, "inverse_rms", lambda f: lambda x, eps, by: f(x.flatten(-2), eps).unsqueeze(-1)
            ),
            "with Vision's eps": put(rotary, "inverse_rms", lambda f: lambda x, eps, by: f(x, 1e-20)),
            "norms with Vision's eps": put(RMSNorm, "forward", bugs.norm_with_eps(1e-20)),
        },
    ),
]
