"""Names, shapes and types of the model are those of the Megatron-LM dev branch.

The table is written by hand from that branch, and knows nothing of `dsv4_bridge.spec.table`.
"""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.module import Float16Module
from reference import draft_spec, randomise

from dsv4_bridge.mcore import DeepSeekV4Model, build_model
from dsv4_bridge.spec.megatron import extra_state_keys, regions
from dsv4_bridge.spec.plan import expand

pytestmark = pytest.mark.megatron

# No two of the sizes are equal, so that a shape says which matrix it belongs to.
H, N, HEADS, HD, QL, G, R = 224, 4, 6, 48, 80, 3, 40
IH, ID, E, K, I, V = 10, 24, 5, 2, 176, 528
SPEC = draft_spec(
    hidden_size=H,
    num_attention_heads=HEADS,
    head_dim=HD,
    qk_rope_head_dim=16,
    q_lora_rank=QL,
    o_groups=G,
    o_lora_rank=R,
    index_n_heads=IH,
    index_head_dim=ID,
    n_routed_experts=E,
    num_experts_per_tok=K,
    moe_intermediate_size=I,
    vocab_size=V,
)
RATIOS = (0, 4, 128, 4)
F32, I32 = torch.float32, torch.int32
Table = dict[str, tuple[tuple[int, ...], torch.dtype]]


def linear(name: str, *shape: int, dtype: torch.dtype) -> Table:
    return {f"{name}.weight": (shape, dtype)}


def head(prefix: str) -> Table:
    """1a, and 1e: the three bare parameters of the learned head."""
    return {
        f"{prefix}hc_head_fn": ((N, N * H), F32),
        f"{prefix}hc_head_base": ((N,), F32),
        f"{prefix}hc_head_scale": ((1,), F32),
    }


def compressor(prefix: str, ratio: int, width: int, p: torch.dtype) -> Table:
    wide = 2 * width if ratio == 4 else width
    return {
        f"{prefix}.ape": ((ratio, wide), F32),
        **linear(f"{prefix}.linear_wkv", wide, H, dtype=p),
        **linear(f"{prefix}.linear_wgate", wide, H, dtype=p),
        **linear(f"{prefix}.norm", width, dtype=p),
    }


def layer(prefix: str, ratio: int, hashed: bool, p: torch.dtype) -> Table:
    """1b, 1c and 1d."""
    attn, core, mlp = f"{prefix}self_attention.", f"{prefix}self_attention.core_attention", f"{prefix}mlp."
    found: Table = {
        **linear(f"{prefix}input_layernorm", H, dtype=p),
        **linear(f"{prefix}pre_mlp_layernorm", H, dtype=p),
        **linear(f"{attn}linear_q_down_proj", QL, H, dtype=p),
        **linear(f"{attn}q_layernorm", QL, dtype=p),
        **linear(f"{attn}linear_q_up_proj", HEADS * HD, QL, dtype=p),
        **linear(f"{attn}linear_kv_proj", HD, H, dtype=p),
        **linear(f"{attn}kv_layernorm", HD, dtype=p),
        f"{attn}linear_o_group_proj": ((G * R, HEADS * HD // G), p),
        **linear(f"{attn}linear_proj", H, G * R, dtype=p),
        f"{core}.attn_sink": ((HEADS,), F32),
        **linear(f"{mlp}router", E, H, dtype=p),
        **linear(f"{mlp}shared_experts.linear_fc1", 2 * I, H, dtype=p),
        **linear(f"{mlp}shared_experts.linear_fc2", H, I, dtype=p),
    }
    for e in range(E):
        found |= linear(f"{mlp}experts.local_experts.{e}.linear_fc1", 2 * I, H, dtype=p)
        found |= linear(f"{mlp}experts.local_experts.{e}.linear_fc2", H, I, dtype=p)
    for where in ("self_attention", "mlp"):
        mixing = f"{prefix}{where}_hyper_connection"
        found |= linear(f"{mixing}.mapping_proj", N * N + 2 * N, N * H, dtype=F32)
        found |= {f"{mixing}.bias": ((N * N + 2 * N,), F32)}
        found |= {f"{mixing}.alpha_{part}": ((1,), F32) for part in ("pre", "post", "res")}
    if hashed:
        found[f"{mlp}router.tid2eid"] = ((V, K), I32)
    else:
        found[f"{mlp}router.expert_bias"] = ((E,), F32)
    if ratio:
        found |= compressor(f"{core}.compressor", ratio, HD, p)
    if ratio == 4:
        found |= linear(f"{core}.indexer.linear_wq_b", IH * ID, QL, dtype=p)
        found |= linear(f"{core}.indexer.linear_weights_proj", IH, H, dtype=p)
        found |= compressor(f"{core}.indexer.compressor", 4, ID, p)
    return found


def expected(p: torch.dtype) -> Table:
    found: Table = {
        **linear("embedding.word_embeddings", V, H, dtype=p),
        **linear("decoder.final_layernorm", H, dtype=p),
        **head("decoder."),
        **linear("output_layer", V, H, dtype=p),
    }
    for i, ratio in enumerate(RATIOS):
        found |= layer(f"decoder.layers.{i}.", ratio, i == 0, p)
    mtp = "mtp.layers.0."
    for norm in ("enorm", "hnorm", "final_layernorm"):
        found |= linear(f"{mtp}{norm}", H, dtype=p)
    for projection in ("e_proj", "h_proj"):
        found |= linear(f"{mtp}{projection}", H, H, dtype=p)
    return found | head(mtp) | layer(f"{mtp}mtp_model_layer.", 0, False, p)


def stateful(table: Table) -> set[str]:
    """Every linear and every norm keeps an extra state; what maps, routes or embeds does not."""
    without = ("word_embeddings", "router", "mapping_proj", "output_layer")
    modules = {name.removesuffix(".weight") for name in table if name.endswith(".weight")}
    return {f"{m}._extra_state" for m in modules if not m.endswith(without)}


def on_disk(name: str) -> str:
    """1f."""
    parts = name.split(".")
    if "local_experts" in parts:
        at = parts.index("local_experts")
        parts[at : at + 2] = ["experts"]
    return ".".join("transformer_layer" if part == "mtp_model_layer" else part for part in parts)


@cache
def model(dtype: torch.dtype) -> DeepSeekV4Model:
    return randomise(build_model(SPEC, dtype=dtype, initialize_weights=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dict_is_the_table_written_by_hand(dtype: torch.dtype) -> None:
    state = model(dtype).state_dict()
    found = {n: (tuple(t.shape), t.dtype) for n, t in state.items() if not n.endswith("_extra_state")}
    assert found == expected(dtype)
    # megatron's own output layer has an extra state in memory, and leaves it out of checkpoints.
    assert {n for n in state if n.endswith("_extra_state")} == stateful(found) | {"output_layer._extra_state"}


def test_the_balance_counts_are_not_saved() -> None:
    counts = {n for n, _ in model(torch.float32).named_buffers() if n.endswith("local_tokens_per_expert")}
    layers = [f"decoder.layers.{i}." for i in (1, 2, 3)] + ["mtp.layers.0.mtp_model_layer."]
    assert counts == {f"{p}mlp.router.local_tokens_per_expert" for p in layers}
    assert not counts & set(model(torch.float32).state_dict())


def bits(module: torch.nn.Module) -> dict[str, tuple[torch.dtype, bytes]]:
    return {
        name: (t.dtype, t.contiguous().view(torch.uint8).numpy().tobytes())
        for name, t in module.state_dict().items()
        if t is not None
    }


CASTS: dict[str, Callable[[DeepSeekV4Model], torch.nn.Module]] = {
    "Float16Module": lambda m: Float16Module(m.config, m).module,
    "bfloat16": lambda m: m.bfloat16(),
    "half": lambda m: m.half(),
    "float64": lambda m: m.to(torch.float64),
    "type": lambda m: m.to(torch.device("cpu"), torch.bfloat16),
}
INTO = {"half": torch.float16, "float64": torch.float64}


@pytest.mark.parametrize("cast", CASTS)
def test_float32_stays_float32_bit_for_bit_under_every_cast(cast: str) -> None:
    """Traps 4, 29 and 57; the others do change, so the cast did take place."""
    built = randomise(build_model(SPEC, dtype=torch.bfloat16, initialize_weights=False))
    before = bits(built)
    kept = {name for name, (_, dtype) in expected(torch.bfloat16).items() if dtype in (F32, I32)}
    after = bits(CASTS[cast](built))
    into = INTO.get(cast, torch.bfloat16)
    assert {n for n in after if after[n][0] in (F32, I32)} == kept
    assert [n for n in kept if after[n] != before[n]] == []
    assert {after[n][0] for n in after if n not in kept} == {into}
    rounded = {n for n in kept if not torch.equal(built.state_dict()[n], built.state_dict()[n].bfloat16().to(F32))}
    assert {n for n in kept if not n.endswith(("alpha_pre", "alpha_post", "alpha_res", "scale", "tid2eid"))} <= rounded


def test_grown_gradients_and_addresses_survive_a_cast() -> None:
    built = randomise(build_model(SPEC, dtype=torch.bfloat16, initialize_weights=False))
    sink = built.decoder.layers[1].self_attention.core_attention.attn_sink
    sink.grad = torch.rand(HEADS) + 1e-3
    grad = sink.grad.clone()
    built.bfloat16()
    assert built.decoder.layers[1].self_attention.core_attention.attn_sink is sink
    assert sink.grad.dtype is F32
    assert torch.equal(sink.grad, grad)


def boxes(sharded: dict[str, object]) -> dict[str, dict[tuple[int, ...], tuple[tuple[int, ...], tuple[int, ...]]]]:
    """On-disk key -> offset -> (sizes, global shape) of every piece of a tensor."""
    found: dict[str, dict] = {}
    for entry in sharded.values():
        pieces = entry.build() if isinstance(entry, ShardedTensorFactory) else entry
        for piece in pieces if isinstance(pieces, list) else [pieces]:
            if isinstance(piece, ShardedTensor):
                lead = piece.prepend_axis_num
                sizes = (1,) * lead + tuple(piece.local_shape)
                at = found.setdefault(piece.key, {})
                assert tuple(piece.global_offset) not in at, piece.key
                at[tuple(piece.global_offset)] = (sizes, tuple(piece.global_shape))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sharded_state_dict_covers_the_state_dict_under_the_names_on_disk(dtype: torch.dtype) -> None:
    """Trap 7, and 1f: the keys that import writes and export reads, boxes and all."""
    built = model(dtype)
    sharded, state = built.sharded_state_dict(), built.state_dict()
    assert set(sharded) == set(state) - {"output_layer._extra_state"}
    for name, entry in sharded.items():
        assert entry.key == on_disk(name), name
        if isinstance(entry, ShardedTensor):
            assert entry.data.data_ptr() == state[name].data_ptr(), name
            assert entry.dtype == state[name].dtype, name
    plan = expand(SPEC)
    objects = {e.unique_key for e in sharded.values() if isinstance(e, ShardedObject)}
    assert objects == set(extra_state_keys(plan))
    planned: dict[str, dict] = {}
    for item in plan.items:
        for region in regions(item, SPEC):
            planned.setdefault(region.key, {})[region.offsets] = (region.sizes, region.global_shape)
    assert boxes(sharded) == planned
