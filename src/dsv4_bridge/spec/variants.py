"""The released variants: their numbers, which encoding each class of tensor has, how to tell them.

| variant | experts | linears | draft blocks |
|---|---|---|---|
| Flash, Pro | MXFP4 | FP8, E8M0 scales | one MTP block |
| Flash-Base, Pro-Base | FP8, F32 scales | FP8, F32 scales | one MTP block with its own embedding and head |
| Flash-0731, Pro-0813 | MXFP4 | FP8, E8M0 scales | three DSpark stages (passengers) |
| Flash-FP8, Pro-FP8 | FP8, E8M0 scales | FP8, E8M0 scales | one MTP block |
| Flash-BF16, Pro-BF16 | BF16 | BF16 | one MTP block |
| V4.1-Flash | MXFP4 | FP8 in tiles of 32x32, E8M0 scales; Engram tables 1x32 | three DSpark stages (passengers) |
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from ..errors import BridgeError, short
from .spec import DSparkSpec, ModelSpec, replace_spec
from .spec_v41 import EngramSpec, V41Spec, VisionSpec

_FLASH = ModelSpec(
    vocab_size=129280,
    hidden_size=4096,
    num_hidden_layers=43,
    num_attention_heads=64,
    num_key_value_heads=1,
    head_dim=512,
    qk_rope_head_dim=64,
    q_lora_rank=1024,
    o_lora_rank=1024,
    o_groups=8,
    moe_intermediate_size=2048,
    n_routed_experts=256,
    n_shared_experts=1,
    num_experts_per_tok=6,
    num_hash_layers=3,
    num_nextn_predict_layers=1,
    index_n_heads=64,
    index_head_dim=128,
    index_topk=512,
    sliding_window=128,
    hc_mult=4,
    hc_sinkhorn_iters=20,
    hc_eps=1e-6,
    rms_norm_eps=1e-6,
    swiglu_limit=10.0,
    routed_scaling_factor=1.5,
    scoring_func="sqrtsoftplus",
    topk_method="noaux_tc",
    norm_topk_prob=True,
    hidden_act="silu",
    attention_bias=False,
    attention_dropout=0.0,
    tie_word_embeddings=False,
    initializer_range=0.02,
    max_position_embeddings=1048576,
    bos_token_id=0,
    eos_token_id=1,
    rope_theta=10000.0,
    compress_rope_theta=160000.0,
    rope_factor=16.0,
    rope_beta_fast=32.0,
    rope_beta_slow=1.0,
    rope_original_max_position_embeddings=65536,
    compress_ratios=(0, 0, *(4, 128) * 20, 4, 0),
)
_PRO = replace_spec(
    _FLASH,
    hidden_size=7168,
    num_hidden_layers=61,
    num_attention_heads=128,
    q_lora_rank=1536,
    o_groups=16,
    moe_intermediate_size=3072,
    n_routed_experts=384,
    index_topk=1024,
    routed_scaling_factor=2.5,
    compress_ratios=(128, 128, *(4, 128) * 29, 4, 0),
)
_FLASH_0731 = replace_spec(
    _FLASH,
    dspark=DSparkSpec(5, 128799, (40, 41, 42), 256),
    compress_ratios=(*_FLASH.compress_ratios, 0, 0),
)
_PRO_0813 = replace_spec(
    _PRO,
    dspark=DSparkSpec(5, 128799, (58, 59, 60), 512),
    compress_ratios=(*_PRO.compress_ratios, 0, 0),
)

_V41_FLASH = V41Spec(
    **{f.name: getattr(_FLASH, f.name) for f in fields(ModelSpec) if f.name not in ("num_hash_layers", "dspark")}
    | {
        "hidden_size": 5120,
        "num_hidden_layers": 40,
        "q_lora_rank": 1280,
        "moe_intermediate_size": 2304,
        "n_routed_experts": 384,
        "num_nextn_predict_layers": 3,
        "index_n_heads": 32,
        "rms_norm_eps": 1e-20,
        "compress_ratios": (0, 0, *(2,) * 18, *(1,) * 20, 0, 0, 0),
    },
    num_hash_layers=0,
    dspark=DSparkSpec(5, 128799, (37, 38, 39), 256),
    pad_token_id=2,
    image_token_id=129264,
    kv_source_layer_ids=(2, 8, 14, 20),
    index_source_layer_ids=(2, 8, 14, 20, 24, 28, 32, 36),
    candidate_source_layer_id=20,
    candidate_topk_blocks=2048,
    candidate_block_size=8,
    dspark_n_routed_experts=128,
    dspark_num_experts_per_tok=3,
    engram=EngramSpec((1, 14), (384006168, 384016682), 4, 16000000, 8, 256, 2, 99092),
    vision=VisionSpec(32, 1024, 16, 2816, 14, 10000.0, 3, 1024, 295936, None),
)

# What each encoding class of the table is on disk (codec/ defines the encodings).
_PLAIN = {"plain": "bf16", "f32": "f32", "int": "i64"}
FP4 = {**_PLAIN, "linear": "fp8", "expert": "mxfp4"}
FP8 = {**_PLAIN, "linear": "fp8", "expert": "fp8"}
BASE = {**_PLAIN, "linear": "fp8_f32", "expert": "fp8_f32"}
BF16 = {**_PLAIN, "linear": "bf16", "expert": "bf16"}
V41 = {"plain": "bf16", "f32": "f32", "linear32": "fp8_32x32", "engram": "fp8_1x32", "expert": "mxfp4"}
V41_BF16 = V41 | {"linear32": "bf16", "engram": "bf16", "expert": "bf16"}


@dataclass(frozen=True)
class Variant:
    """One released (or repacked) checkpoint kind.

    Attributes:
        name: short name, as in the table above.
        hub_id: repository on the Hub.
        spec: its numbers.
        encodings: encoding class -> encoding on disk.
        expert_dtype: config.json's key of that name, None where absent.
        own_mtp_head: whether the MTP block ships its own embedding and head (Base).
    """

    name: str
    hub_id: str
    spec: ModelSpec
    encodings: Mapping[str, str]
    expert_dtype: str | None
    own_mtp_head: bool = False


_HUB = "deepseek-ai/DeepSeek-V4-"
_SGL = "sgl-project/DeepSeek-V4-"
VARIANTS: dict[str, Variant] = {
    v.name: v
    for v in (
        Variant("Flash", _HUB + "Flash", _FLASH, FP4, "fp4"),
        Variant("Flash-Base", _HUB + "Flash-Base", _FLASH, BASE, "fp8", own_mtp_head=True),
        Variant("Flash-0731", _HUB + "Flash-0731", _FLASH_0731, FP4, "fp4"),
        Variant("Flash-FP8", _SGL + "Flash-FP8", _FLASH, FP8, None),
        Variant("Flash-BF16", "", _FLASH, BF16, None),
        Variant("Pro", _HUB + "Pro", _PRO, FP4, "fp4"),
        Variant("Pro-Base", _HUB + "Pro-Base", _PRO, BASE, "fp8", own_mtp_head=True),
        Variant("Pro-0813", _HUB + "Pro-0813", _PRO_0813, FP4, "fp4"),
        Variant("Pro-FP8", _SGL + "Pro-FP8", _PRO, FP8, None),
        Variant("Pro-BF16", "", _PRO, BF16, None),
        Variant("V4.1-Flash", "deepseek-ai/DeepSeek-V4.1-Flash", _V41_FLASH, V41, "fp4"),
    )
}

# Fields that do not tell one architecture from another.
_FREE = {"num_nextn_predict_layers", "compress_ratios", "dspark", "initializer_range", "attention_dropout"}


def recognise(spec: ModelSpec, encodings: Mapping[str, str], own_mtp_head: bool) -> str:
    """Name of the variant that has these numbers and encodings, else what comes nearest.

    Args:
        spec: from config.json.
        encodings: encoding class -> encoding found in the headers.
        own_mtp_head: whether `mtp.0.head.weight` is there.
    """
    family = family_of(spec)
    served = encodings.get("linear") == "fp8" and encodings.get("expert") == "fp8_f32"
    if served:  # the FP8 repacks with the scales that servers read
        encodings = {**encodings, "expert": "fp8"}
    alike = [
        v
        for v in VARIANTS.values()
        if v.encodings == encodings and v.own_mtp_head == own_mtp_head and bool(v.spec.dspark) == bool(spec.dspark)
    ]
    for variant in alike:
        if family_of(variant.spec) == family and variant.spec.dspark == spec.dspark:
            return variant.name + (" (float32 expert scales)" if served else "")
    size = f"{family} numbers" if family else "other size"
    stored = f"stored like {alike[0].name}" if alike else f"experts {encodings.get('expert')}"
    return f"custom ({size}, {stored}, linears {encodings.get('linear') or encodings.get('linear32')})"


def family_of(spec: ModelSpec) -> str | None:
    """Name of the first variant (`Flash`, `Pro`, `V4.1-Flash` …) that has every architectural number, else None."""
    for name, known in ((v.name, v.spec) for v in VARIANTS.values()):
        layers = known.num_hidden_layers
        if (
            type(spec) is type(known)
            and spec.compress_ratios[:layers] == known.compress_ratios[:layers]
            and all(getattr(spec, f.name) == getattr(known, f.name) for f in fields(known) if f.name not in _FREE)
        ):
            return name
    return None


def tiny(variant: Variant, ragged: bool = False) -> ModelSpec:
    """A model of every layer kind that converts in a second, in the manner of `variant`.

    Args:
        variant: what to imitate: its layer kinds, draft blocks and factors.
        ragged: widths that are no multiples of 128. Released ones all are, and hide ragged edges.
    """
    spec = variant.spec
    if isinstance(spec, V41Spec):
        return _tiny_v41(spec, ragged)
    start = (128, 128) if spec.ratio(0) == 128 else (0, 0)
    widths = {
        "hidden_size": 224 if ragged else 256,
        "head_dim": 64,
        "q_lora_rank": 96 if ragged else 128,
        "o_lora_rank": 48 if ragged else 32,
        "moe_intermediate_size": 160 if ragged else 128,
        "index_head_dim": 24 if ragged else 32,
        "vocab_size": 520 if ragged else 512,
    }
    return replace_spec(
        spec,
        **widths,
        num_hidden_layers=6,
        num_attention_heads=8,
        qk_rope_head_dim=16,
        o_groups=4,
        n_routed_experts=8,
        num_experts_per_tok=2,
        index_n_heads=8,
        index_topk=8,
        hc_sinkhorn_iters=4,  # twenty would be an eighth of the time of a step, and no other code
        dspark=DSparkSpec(5, 511, (3, 4, 5), 16) if spec.dspark else None,
        compress_ratios=(*start, 4, 128, 4, 128, *(0,) * spec.draft_blocks),
    )


def _tiny_v41(spec: V41Spec, ragged: bool) -> ModelSpec:
    """Window layers, sources of ratio 2 and 1, layers that only use them, two Engram tables, one beside a source."""
    return replace_spec(
        spec,
        hidden_size=224 if ragged else 256,
        head_dim=64,
        q_lora_rank=96 if ragged else 128,
        o_lora_rank=36 if ragged else 32,
        moe_intermediate_size=160 if ragged else 128,
        index_head_dim=24 if ragged else 32,
        vocab_size=520 if ragged else 512,
        num_hidden_layers=7,
        num_attention_heads=8,
        qk_rope_head_dim=16,
        o_groups=4,
        n_routed_experts=8,
        num_experts_per_tok=2,
        index_n_heads=3 if ragged else 8,
        index_topk=8,
        hc_sinkhorn_iters=4,
        dspark=DSparkSpec(5, 511, (4, 5, 6), 16),
        compress_ratios=(0, 0, 2, 2, 2, 1, 1, 0, 0, 0),
        image_token_id=509,
        kv_source_layer_ids=(2, 4, 5),
        index_source_layer_ids=(2, 4, 5, 6),
        candidate_source_layer_id=5,
        candidate_topk_blocks=16,
        dspark_n_routed_experts=4,
        dspark_num_experts_per_tok=2,
        # Buckets are the next primes behind 97: 3 lengths, 2 hashes each, in both layers different ones.
        engram=EngramSpec((1, 4), (101 + 103 + 107 + 109 + 113 + 127, 5131), 4, 97, 2, 40 if ragged else 64, 2, 300),
        vision=replace(spec.vision, num_hidden_layers=2, hidden_size=48, num_attention_heads=4, intermediate_size=72),
    )


def shortened(variant: Variant, layers: int) -> ModelSpec:
    """The released numbers with the first `layers` decoder layers, and the draft blocks as they are.

    Kinds of attention that come later in the release take the place of its last layers here, as far as there is room:
    Flash begins with window, window, CSA, HCA, so three layers are window, CSA, HCA. At most half of the layers route
    by token id, so that routed ones are among them.

    Args:
        variant: the release.
        layers: how many, from 1 to the released number.

    Raises:
        BridgeError: no such number.
    """
    spec = variant.spec
    if isinstance(spec, V41Spec):
        raise BridgeError(
            f"{layers} layers of {variant.name}: it is not shortened, for its layers take keys, indices and candidates "
            "from others; take the tiny width"
        )
    if not 1 <= layers <= spec.num_hidden_layers:
        raise BridgeError(f"{layers} layers of {variant.name}: it has {spec.num_hidden_layers}, expected 1 to that")
    released = spec.compress_ratios[: spec.num_hidden_layers]
    ratios = tuple(dict.fromkeys(released))[:layers]  # where not even one of each fits
    for kept in range(layers + 1):
        late = tuple(r for r in dict.fromkeys(released) if r not in released[:kept])
        if kept + len(late) == layers:
            ratios = (*released[:kept], *late)
    stages = spec.dspark.stages if spec.dspark else 0
    targets = tuple(max(0, layers - stages + k) for k in range(stages))  # the last ones, as released
    return replace_spec(
        spec,
        num_hidden_layers=layers,
        num_hash_layers=min(spec.num_hash_layers, layers // 2),
        dspark=replace(spec.dspark, target_layer_ids=targets) if spec.dspark else None,
        compress_ratios=(*ratios, *spec.compress_ratios[spec.num_hidden_layers :]),
    )


def nearest_variant(name: str) -> str:
    """For a message: `; did you mean Flash?`, or "" where no name is near."""
    names = {v.name.lower(): v.name for v in VARIANTS.values()}
    word = name.lower().removeprefix("deepseek-ai/").removeprefix("deepseek-v4-")
    near = difflib.get_close_matches(word, names, 1)
    return f"; did you mean {names[near[0]]}?" if near else ""


def variant_named(name: str) -> Variant:
    """A variant by its name, any case.

    Raises:
        BridgeError: no such variant.
    """
    for variant in VARIANTS.values():
        if variant.name.lower() == _short(name):
            return variant
    raise BridgeError(f"no variant {short(name)}{nearest_variant(name)}; known are {', '.join(VARIANTS)}")


def known_variant(name: str) -> Variant | None:
    """The variant called `name`, short or by its repository, any case; planning it needs no files."""
    known = {v.name.lower(): v for v in VARIANTS.values()} | {v.hub_id.lower(): v for v in VARIANTS.values()}
    return known.get(_short(name)) or known.get(name.lower())


def _short(name: str) -> str:
    return name.lower().removeprefix("deepseek-ai/").removeprefix("deepseek-").removeprefix("v4-")


def guess(config: dict[str, Any], spec: ModelSpec | None = None) -> Variant:
    """The variant that a config alone points to."""
    if isinstance(spec, V41Spec):
        return VARIANTS["V4.1-Flash"] if _quantised(config) else replace(VARIANTS["V4.1-Flash"], encodings=V41_BF16)
    quantised = _quantised(config)
    expert = config.get("expert_dtype")
    # The launch config of the FP4 releases has no expert_dtype, nor have the FP8 repacks.
    encodings = BF16 if not quantised else {"fp8": BASE}.get(str(expert), FP4)
    family = [v for v in VARIANTS.values() if v.encodings == encodings or (v.encodings == FP8 and encodings is FP8)]
    if spec:  # those of the very numbers first: a width alone may be that of several
        family.sort(key=lambda variant: family_of(variant.spec) != family_of(spec))
    for variant in family:
        same = spec and variant.spec.hidden_size == spec.hidden_size and variant.spec.dspark == spec.dspark
        if same:
            return variant
    return next(v for v in family if (v.spec.dspark is not None) == bool(spec and spec.dspark) or not spec)


def _quantised(config: dict[str, Any]) -> bool:
    # DeepSeek's own inference/config.json says by `dtype` how weights are stored; everywhere else it is a type to
    # compute with.
    return isinstance(config.get("quantization_config"), dict) or ("dim" in config and config.get("dtype") == "fp8")
