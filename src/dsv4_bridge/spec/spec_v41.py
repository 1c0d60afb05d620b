"""The frozen numbers of one DeepSeek-V4.1 model; `store.config_v41` reads and writes them."""

from dataclasses import dataclass, field

from ..errors import short
from .spec import MAX_DIM, ModelSpec

MAX_ROWS = 1 << 32  # of an Engram table; the released ones have 384 million


@dataclass(frozen=True)
class EngramSpec:
    """Tables that are looked up by hashes of the last tokens, one in each of a few layers.

    Attributes:
        layer_ids: the layers that have one.
        num_embeddings: rows of each table: the sum of its buckets, each a prime number.
        max_ngram_size: tokens that one hash sees at most; hashes are of 2 tokens on.
        vocab_size: that the primes begin above.
        n_heads: hashes of each number of tokens.
        head_dim: width of a row.
        pad_token_id: stands before the first token.
        compressed_vocab_size: different tokens, once those that read alike are one.
    """

    layer_ids: tuple[int, ...]
    num_embeddings: tuple[int, ...]
    max_ngram_size: int
    vocab_size: int
    n_heads: int
    head_dim: int
    pad_token_id: int
    compressed_vocab_size: int

    @property
    def width(self) -> int:
        """Values that a token looks up in one table."""
        return (self.max_ngram_size - 1) * self.n_heads * self.head_dim


@dataclass(frozen=True)
class VisionSpec:
    """The vision tower and its aligner, under the names of `vision_config`."""

    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    intermediate_size: int
    patch_size: int
    rope_theta: float
    downsample_ratio: int
    max_image_tokens: int
    min_pixels: int
    max_wh_ratio: float | None


@dataclass(frozen=True)
class V41Spec(ModelSpec):
    """The frozen numbers of one DeepSeek-V4.1 model, under the names of its `text_config`.

    `compress_ratios` are 0 (window), 2 or 1 (compressed, keys and values of the nearest source before); there are no
    hash layers. Draft blocks are DSpark stages with experts of their own.
    """

    pad_token_id: int = field(kw_only=True)
    image_token_id: int = field(kw_only=True)
    kv_source_layer_ids: tuple[int, ...] = field(kw_only=True)
    index_source_layer_ids: tuple[int, ...] = field(kw_only=True)
    candidate_source_layer_id: int = field(kw_only=True)
    candidate_topk_blocks: int = field(kw_only=True)
    candidate_block_size: int = field(kw_only=True)
    dspark_n_routed_experts: int = field(kw_only=True)
    dspark_num_experts_per_tok: int = field(kw_only=True)
    engram: EngramSpec = field(kw_only=True)
    vision: VisionSpec = field(kw_only=True)

    def _rules(self) -> tuple[tuple[bool, str], ...]:
        """What must hold beside the rules of V4, and what to say where it does not."""
        layers, engram, vision = self.num_hidden_layers, self.engram, self.vision
        within = {
            "kv_source_layer_ids": self.kv_source_layer_ids,
            "index_source_layer_ids": self.index_source_layer_ids,
            "candidate_source_layer_id": (self.candidate_source_layer_id,),
            "engram_layer_ids": engram.layer_ids,
        }
        sizes = {f"vision_config.{k}": v for k, v in vars(vision).items() if k != "max_wh_ratio"}
        sizes |= {f"engram_{k}": v for k, v in vars(engram).items() if isinstance(v, int) and k != "pad_token_id"}
        return (
            *(
                (
                    all(0 <= i < layers for i in ids) and list(ids) == sorted(set(ids)),
                    f"{name} is {short(list(ids))}, expected layers of {layers}, in order",
                )
                for name, ids in within.items()
            ),
            *((0 < value <= MAX_DIM * 64, f"{name} is {short(value)}, out of range") for name, value in sizes.items()),
            (
                vision.num_hidden_layers <= 1024,
                "vision_config.num_hidden_layers is above 1024",
            ),
            (
                0 <= engram.pad_token_id < self.vocab_size and self.image_token_id < self.vocab_size,
                "engram_pad_token_id or image_token_id is no token of the vocabulary",
            ),
            (engram.max_ngram_size > 1, f"engram_max_ngram_size is {short(engram.max_ngram_size)}, expected 2 or more"),
            (
                len(engram.num_embeddings) == len(engram.layer_ids)
                and all(0 < n <= MAX_ROWS for n in engram.num_embeddings),
                f"engram_num_embeddings is {short(list(engram.num_embeddings))}, expected rows for each of "
                f"{len(engram.layer_ids)} layers, up to {MAX_ROWS}",
            ),
            (
                all(
                    self.ratio(i) for i in {*self.kv_source_layer_ids, *self.index_source_layer_ids} if 0 <= i < layers
                ),
                "a source of keys or of indices is a window layer; expected compressed ones",
            ),
            (
                bool(self.kv_source_layer_ids and self.index_source_layer_ids) or not any(self.compress_ratios),
                "kv_source_layer_ids or index_source_layer_ids is empty; expected the sources of compressed layers",
            ),
            (
                self.dspark_num_experts_per_tok <= self.dspark_n_routed_experts,
                "dspark_num_experts_per_tok is above dspark_n_routed_experts",
            ),
            (self.num_hash_layers == 0, "num_hash_layers is not 0"),
        )
