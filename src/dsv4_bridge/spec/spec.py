"""The frozen numbers of one model; `store.hf_config` reads and writes them."""

from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any

from ..errors import BridgeError, short

# Bounds that keep a corrupt config from asking for an endless plan; far above any real model.
MAX_COUNT = {"num_hidden_layers": 1024, "n_routed_experts": 8192, "num_nextn_predict_layers": 64}
MAX_DIM = 1 << 24
MAX_EXPERTS = 1 << 17  # of all layers together; Pro has 23,808


@dataclass(frozen=True)
class DSparkSpec:
    """The DSpark drafter of the 0731 and 0813 releases: its own stages under `mtp.*`."""

    block_size: int
    noise_token_id: int
    target_layer_ids: tuple[int, ...]
    markov_rank: int

    @property
    def stages(self) -> int:
        """Number of drafter blocks, one a target layer."""
        return len(self.target_layer_ids)


@dataclass(frozen=True)
class ModelSpec:
    """The frozen numbers of one DeepSeek-V4 model, under the names of its config.json.

    Of several `eos_token_id` the first counts; generation stops at all of them (`text.end_tokens`).
    `compress_ratios` has one entry a decoder layer and one a draft block (MTP or DSpark stage);
    0 is window attention, 4 compressed sparse, 128 heavily compressed.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_lora_rank: int
    o_groups: int
    moe_intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    num_hash_layers: int
    num_nextn_predict_layers: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    sliding_window: int
    hc_mult: int
    hc_sinkhorn_iters: int
    hc_eps: float
    rms_norm_eps: float
    swiglu_limit: float
    routed_scaling_factor: float
    scoring_func: str
    topk_method: str
    norm_topk_prob: bool
    hidden_act: str
    attention_bias: bool
    attention_dropout: float
    tie_word_embeddings: bool
    initializer_range: float
    max_position_embeddings: int
    bos_token_id: int | None
    eos_token_id: int
    rope_theta: float
    compress_rope_theta: float
    rope_factor: float
    rope_beta_fast: float
    rope_beta_slow: float
    rope_original_max_position_embeddings: int
    compress_ratios: tuple[int, ...]
    dspark: DSparkSpec | None = None

    @classmethod
    def from_pretrained(cls, name: Any, revision: str | None = None) -> "ModelSpec":
        """The numbers of a checkpoint of either format, of `owner/name` on the Hub, or of a variant, as `Flash`.

        Raises:
            BridgeError: there is none of that name, or it is another model.
        """
        # The one look upward: users of transformers expect it here, and reading a checkpoint is not this room's.
        return import_module("dsv4_bridge.store.named").spec_of(name, revision)

    @property
    def mtp_layers(self) -> int:
        """Multi-token-prediction blocks (0 where `mtp.*` holds a DSpark drafter)."""
        return 0 if self.dspark else self.num_nextn_predict_layers

    @property
    def draft_blocks(self) -> int:
        """Blocks under `mtp.*`, of either kind."""
        return self.dspark.stages if self.dspark else self.num_nextn_predict_layers

    @property
    def shared_intermediate_size(self) -> int:
        """Width of the shared expert."""
        return self.n_shared_experts * self.moe_intermediate_size

    def ratio(self, layer: int) -> int:
        """Compress ratio of decoder layer `layer`; draft block k is layer `num_hidden_layers + k`."""
        return self.compress_ratios[layer]

    def _rules(self) -> tuple[tuple[bool, str], ...]:
        """What must hold of a later architecture's numbers, and what to say where it does not."""
        return ()

    def without_draft(self) -> "ModelSpec":
        """The same model with no MTP block and no drafter."""
        return replace_spec(
            self,
            num_nextn_predict_layers=0,
            dspark=None,
            compress_ratios=self.compress_ratios[: self.num_hidden_layers],
        )


def replace_spec[S: ModelSpec](spec: S, **changes: Any) -> S:
    """A validated copy of `spec`, of its own class, with `changes`."""
    values = {f.name: getattr(spec, f.name) for f in fields(spec)} | changes
    return validated(type(spec)(**values), "spec")


# Numbers that no tensor and no computation of the model follows from.
ASIDE = frozenset({"bos_token_id", "eos_token_id", "initializer_range", "max_position_embeddings", "attention_dropout"})


def differing(one: ModelSpec, other: ModelSpec, *, aside: bool = False) -> tuple[str, ...]:
    """The fields in which two models compute otherwise, each as `name: value against value`.

    Args:
        one: a model.
        other: another.
        aside: name those instead that no computation follows from.
    """
    if type(one) is not type(other):
        return () if aside else (f"architecture: {type(one).__name__} against {type(other).__name__}",)
    names = [f.name for f in fields(one) if (f.name in ASIDE) == aside]
    pairs = [(n, getattr(one, n), getattr(other, n)) for n in names]
    return tuple(f"{n}: {short(a)} against {short(b)}" for n, a, b in pairs if a != b)


_ZERO_OK = {
    "num_hash_layers",
    "num_nextn_predict_layers",
    "bos_token_id",
    "eos_token_id",
    "attention_dropout",
    "initializer_range",
}


def validated[S: ModelSpec](spec: S, where: str) -> S:
    """`spec` itself, if its numbers make a DeepSeek-V4 model.

    Raises:
        BridgeError: a number out of range, or two that contradict each other.
    """
    for field in fields(spec):
        value = getattr(spec, field.name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        low = 0 if field.name in _ZERO_OK else 1 if isinstance(value, int) else 1e-300
        high = MAX_COUNT.get(field.name, MAX_DIM) if isinstance(value, int) else 1e300
        if not low <= value <= high:
            raise BridgeError(f"{where}: {field.name!r} is {short(value)}, expected {low} to {high}")
    fixed = {"scoring_func": "sqrtsoftplus", "topk_method": "noaux_tc", "hidden_act": "silu"}
    fixed |= {"norm_topk_prob": True, "attention_bias": False, "tie_word_embeddings": False}
    for name, value in fixed.items():
        if getattr(spec, name) != value:
            raise BridgeError(f"{where}: {name!r} is {short(getattr(spec, name))}, DeepSeek-V4 has {value!r}")
    rules = (
        (spec.num_key_value_heads == 1, "num_key_value_heads is not 1"),
        (spec.num_hash_layers <= spec.num_hidden_layers, "num_hash_layers is above num_hidden_layers"),
        (
            spec.num_hidden_layers * spec.n_routed_experts <= MAX_EXPERTS,
            f"num_hidden_layers {spec.num_hidden_layers} times n_routed_experts {spec.n_routed_experts} is too many",
        ),
        (spec.num_experts_per_tok <= spec.n_routed_experts, "num_experts_per_tok is above n_routed_experts"),
        (spec.qk_rope_head_dim <= spec.head_dim, "qk_rope_head_dim is above head_dim"),
        (
            spec.num_attention_heads * spec.head_dim % spec.o_groups == 0
            and spec.num_attention_heads % spec.o_groups == 0,
            f"o_groups {spec.o_groups} does not divide num_attention_heads {spec.num_attention_heads}",
        ),
        (
            len(spec.compress_ratios) == spec.num_hidden_layers + spec.draft_blocks,
            f"compress_ratios has {len(spec.compress_ratios)} entries for {spec.num_hidden_layers} layers and "
            f"{spec.draft_blocks} draft blocks",
        ),
    )
    for good, message in (*rules, *(spec._rules() if all(good for good, _ in rules) else ())):
        if not good:
            raise BridgeError(f"{where}: {message}")
    if spec.dspark:
        _check_dspark(spec.dspark, spec, where)
    return spec


def _check_dspark(dspark: DSparkSpec, spec: ModelSpec, where: str) -> None:
    limits = (
        ("dspark_block_size", (dspark.block_size,), 1, MAX_DIM),
        ("dspark_noise_token_id", (dspark.noise_token_id,), 0, spec.vocab_size - 1),
        ("dspark_target_layer_ids", dspark.target_layer_ids, 0, spec.num_hidden_layers - 1),
        ("dspark_markov_rank", (dspark.markov_rank,), 1, MAX_DIM),
    )
    for name, values, low, high in limits:
        for value in values:
            if not low <= value <= high:
                raise BridgeError(f"{where}: {name!r} is {short(value)}, expected {low} to {high}")
