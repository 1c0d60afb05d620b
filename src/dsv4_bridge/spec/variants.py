"""The released variants: their numbers, which encoding each class of tensor has, how to tell them.

| variant | experts | linears | draft blocks |
|---|---|---|---|
| Flash, Pro | MXFP4 | FP8, E8M0 scales | one MTP block |
| Flash-Base, Pro-Base | FP8, F32 scales | FP8, F32 scales | one MTP block with its own embedding and head |
| Flash-0731, Pro-0813 | MXFP4 | FP8, E8M0 scales | three DSpark stages (passengers) |
| Flash-FP8, Pro-FP8 | FP8, E8M0 scales | FP8, E8M0 scales | one MTP block |
| Flash-BF16, Pro-BF16 | BF16 | BF16 | one MTP block |
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from ..errors import BridgeError, short
from .spec import DSparkSpec, ModelSpec, replace_spec

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

# What each encoding class of the table is on disk (codec/ defines the encodings).
_PLAIN = {"plain": "bf16", "f32": "f32", "int": "i64"}
FP4 = {**_PLAIN, "linear": "fp8", "expert": "mxfp4"}
FP8 = {**_PLAIN, "linear": "fp8", "expert": "fp8"}
BASE = {**_PLAIN, "linear": "fp8_f32", "expert": "fp8_f32"}
BF16 = {**_PLAIN, "linear": "bf16", "expert": "bf16"}


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
    return f"custom ({size}, {stored}, linears {encodings.get('linear')})"


def family_of(spec: ModelSpec) -> str | None:
    """`Flash` or `Pro` where every architectural number is theirs, else None."""
    for name, known in (("Flash", _FLASH), ("Pro", _PRO)):
        layers = known.num_hidden_layers
        if spec.compress_ratios[:layers] == known.compress_ratios[:layers] and all(
            getattr(spec, f.name) == getattr(known, f.name) for f in fields(ModelSpec) if f.name not in _FREE
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
        if variant.name.lower() == name.lower().removeprefix("deepseek-v4-"):
            return variant
    raise BridgeError(f"no variant {short(name)}{nearest_variant(name)}; known are {', '.join(VARIANTS)}")


def known_variant(name: str) -> Variant | None:
    """The variant called `name`, short or by its repository, any case; planning it needs no files."""
    known = {v.name.lower(): v for v in VARIANTS.values()} | {v.hub_id.lower(): v for v in VARIANTS.values()}
    return known.get(name.lower().removeprefix("deepseek-ai/").removeprefix("deepseek-v4-")) or known.get(name.lower())


def guess(config: dict[str, Any], spec: ModelSpec | None = None) -> Variant:
    """The variant that a config alone points to."""
    quantised = isinstance(config.get("quantization_config"), dict)
    expert = config.get("expert_dtype")
    # The launch config of the FP4 releases has no expert_dtype, nor have the FP8 repacks.
    encodings = BF16 if not quantised else {"fp8": BASE}.get(str(expert), FP4)
    family = [v for v in VARIANTS.values() if v.encodings == encodings or (v.encodings == FP8 and encodings is FP8)]
    for variant in family:
        same = spec and variant.spec.hidden_size == spec.hidden_size and variant.spec.dspark == spec.dspark
        if same:
            return variant
    return next(v for v in family if (v.spec.dspark is not None) == bool(spec and spec.dspark) or not spec)
