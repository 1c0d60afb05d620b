"""DeepSeek-V4 on megatron-core's GPT model."""

from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor

from ..errors import BridgeError, short
from ..parallel.layout import Layout
from ..parallel.topology import Coordinate, Sizes, Topology, check_rows, make_topology
from ..planning.index_queries import query_costs
from ..spec.spec import ModelSpec
from .config import DeepSeekV4Config, model_config
from .layers.block import HyperConnectedBlock
from .layers.cache import Cache
from .layers.context import over_ranks, share_of
from .layers.documents import documents_of, restarting_positions
from .layers.mtp import MTPBlock, moved_ahead
from .layers.mtp_loss import draft_losses, tally_drafts, with_draft_losses
from .layers.rope import Rotary, make_rotary
from .layers.token_loss import token_losses
from .metrics import Tally
from .runtime import initialize


class DeepSeekV4Model(GPTModel):
    """The whole model; parameter names are those of the Megatron-LM dev branch.

    Made by `build_model`.
    """

    config: DeepSeekV4Config

    def __init__(
        self,
        config: DeepSeekV4Config,
        spec: ModelSpec,
        topology: Topology,
        max_sequence_length: int,
        chunk: int = 0,
        pg_collection: ProcessGroupCollection | None = None,
        parallel_output: bool = True,
    ):
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        held = topology.layout.chunks[chunk]
        pre_process, post_process = held.embedding, held.loss
        vp_stage = chunk // topology.pp if topology.layout.vp > 1 else None
        self._built = False
        # GPTModel builds its own kind of decoder; it gets an empty one, and ours takes its place.
        super().__init__(
            config,
            TransformerBlockSubmodules(layer_specs=[], layer_norm=None),  # type: ignore[arg-type]
            vocab_size=spec.vocab_size,
            max_sequence_length=max_sequence_length,
            pre_process=pre_process,
            post_process=post_process,
            parallel_output=parallel_output,
            position_embedding_type="none",
            pg_collection=groups,
            vp_stage=vp_stage,
        )
        self.spec, self.topology, self.chunk = spec, topology, chunk
        self.decoder = HyperConnectedBlock(
            config, pre_process=pre_process, post_process=post_process, pg_collection=groups, vp_stage=vp_stage
        )
        self.tally = ("mtp_loss", Tally())
        self.mtp_process = bool(held.mtp)
        if self.mtp_process:
            self.mtp = MTPBlock(config, groups)
            if not pre_process:  # MTP embeds tokens too: a copy, kept equal to the first stage's
                self.embedding = LanguageModelEmbedding(
                    config, spec.vocab_size, max_sequence_length, "none", tp_group=groups.tp
                )
        self._built = True
        self.setup_embeddings_and_output_layer()

    def setup_embeddings_and_output_layer(self) -> None:
        """Mark the embedding and output layer; called again when the decoder and MTP are in place."""
        if self._built:
            super().setup_embeddings_and_output_layer()

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input: Tensor | None = None,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
        packed_seq_params: Any = None,
        runtime_gather_output: bool | None = None,
        cache: Cache | None = None,
        last_only: bool = False,
        cu_seqlens: Tensor | None = None,
        mtp_share: tuple[float, ...] | None = None,
        **unknown: Any,
    ) -> Tensor:
        """Logits, or the loss of every token.

        Attention is always causal and positions count from 0, in every document of a packed row (or from the
        cache's lengths): `position_ids` and `attention_mask` are accepted for megatron's training loop and not
        read.

        Under context parallelism s is the rank's share of every row, [rank * s, (rank + 1) * s) of ranks * s tokens;
        so are logits, losses and what else is [b, s]. `cu_seqlens` is the whole row's, on every rank.

        Args:
            input_ids: [b, s] int64.
            **unknown: refused, unless None.
            position_ids: not read.
            attention_mask: not read.
            decoder_input: [s, b, h], embeddings in place of the ids' (hash layers read the ids still).
            labels: [b, s], the token after each, a token of the vocabulary also where its weight is 0; then the
                result is the loss, and MTP depths add theirs to the gradients (`mtp_loss_scaling_factor`).
            loss_mask: [b, s], weights of the MTP losses.
            padding_mask: [b, s], True for tokens that expert balance and the indexer's loss do not count.
            packed_seq_params: refused; see `cu_seqlens`.
            runtime_gather_output: gather logits over tensor-parallel ranks.
            cache: memory of decoding: an unfilled one takes the prompts over, a filled one takes one
                token a row.
            last_only: logits of each row's last token only, [b, 1, vocabulary].
            cu_seqlens: [documents + 1] int32, boundaries of documents packed into the one row (b is 1), on every
                stage. The row computes what its documents compute one by one; their last tokens have no MTP
                target. None: every row is one document.
            mtp_share: how this micro-batch counts in the loss of every MTP depth, see `mtp_loss`; the schedule
                says it. None: it is the whole step.

        Returns:
            [b, s, vocabulary], or [b, s] losses with labels; streams [s, b, n*h] on a stage that is not the last.

        Raises:
            BridgeError: what this model does not do.
        """
        refused = {"packed_seq_params": packed_seq_params} | unknown
        if asked := sorted(name for name, value in refused.items() if value is not None):
            raise BridgeError(f"running the model: {', '.join(asked)} is not supported; give whole sequences, [b, s]")
        batch, length = input_ids.shape
        if self.config.sequence_parallel and (cache is not None or length % self.topology.tp):
            raise BridgeError(
                f"running the model with sequence parallelism over {self.topology.tp} ranks: "
                + ("decoding needs sequence_parallel=False" if cache else f"{length} tokens do not divide")
            )
        if self.config.context_parallel_size > 1:
            self._check_share(length, cache is not None or last_only)
        stepping = cache is not None and cache.filled
        if cache is not None:
            if cu_seqlens is not None:
                raise BridgeError("decoding: a cache holds one sequence a row; cu_seqlens is for training")
            _check_cache(cache, batch, length)
        _check_ids(input_ids, self.config.actual_vocab_size)
        if labels is not None:
            _check_ids(labels, self.config.actual_vocab_size, "labels")
        if self.pre_process and decoder_input is None:
            decoder_input = self.embedding(input_ids=input_ids, position_ids=position_ids)
        rotary = make_rotary(self.config, cache.lengths) if stepping and cache else self.rotary(input_ids, cu_seqlens)
        hidden, streams = self.decoder(decoder_input, rotary, input_ids, cache, padding_mask)
        if not self.post_process:
            return streams
        if labels is not None and self.mtp_process:
            depths = self.mtp_hidden(streams, input_ids, position_ids, rotary, padding_mask)
            hidden = self._with_mtp_loss(hidden, depths, labels, loss_mask, runtime_gather_output, rotary, mtp_share)
        if cache is not None:
            if last_only and not stepping:
                hidden = hidden[cache.lengths - 1, torch.arange(batch, device=hidden.device)].unsqueeze(0)
            if stepping:
                cache.advance()
            cache.filled = True
        elif last_only:
            hidden = hidden[-1:]
        if labels is not None:
            return self._losses(hidden, labels, runtime_gather_output)
        logits, _ = self.output_layer(hidden, runtime_gather_output=runtime_gather_output)
        return logits.transpose(0, 1).contiguous()

    @property
    def coordinate(self) -> Coordinate:
        """This rank's place in each group."""
        groups = self.pg_collection
        return Coordinate(groups.tp.rank(), groups.pp.rank(), groups.ep.rank(), groups.expt_tp.rank())

    def rotary(self, input_ids: Tensor, cu_seqlens: Tensor | None) -> Rotary:
        """Turns of whole rows, or of the documents of one; of this rank's share of them."""
        if self.pg_collection.cp.size() > 1:
            batch, length = input_ids.shape
            costs = query_costs(self.spec, self.config.params_dtype.itemsize)
            cut = self.pg_collection.cp, batch, length, cu_seqlens, input_ids.device
            share = share_of(*cut, costs, self.config.index_queries)
            return make_rotary(self.config, share.positions(), None, share)
        if cu_seqlens is None:
            return make_rotary(self.config, torch.arange(input_ids.shape[1], device=input_ids.device))
        documents = documents_of(cu_seqlens, *input_ids.shape)
        return make_rotary(self.config, restarting_positions(documents, input_ids.device), documents)

    def mtp_hidden(
        self,
        streams: Tensor,
        input_ids: Tensor,
        position_ids: Tensor | None,
        rotary: Rotary,
        padding_mask: Tensor | None,
    ) -> list[Tensor]:
        """Normed hidden states of every MTP depth, [s, b, h] each; depth k looks at the token k + 1 ahead.

        Beyond the end of a document stands token 0, as megatron has it.
        """
        found, ids = [], input_ids
        for layer in self.mtp.layers:
            ids = moved_ahead(ids, rotary)
            embedded = self.embedding(input_ids=ids, position_ids=position_ids)
            hidden, streams = layer(streams, embedded, rotary, padding_mask)
            found.append(hidden)
        return found

    def mtp_logits(
        self, input_ids: Tensor, cu_seqlens: Tensor | None = None, streams: Tensor | None = None
    ) -> list[Tensor]:
        """Logits of every MTP depth, [b, s, vocabulary] each: depth k at position t predicts token t + k + 2.

        Args:
            input_ids: [b, s].
            cu_seqlens: see `forward`.
            streams: [s, b, n*h] behind the last decoder layer; None: they are computed.
        """
        _check_ids(input_ids, self.config.actual_vocab_size)
        rotary = self.rotary(input_ids, cu_seqlens)
        given = streams
        if given is None:
            _, given = self.decoder(self.embedding(input_ids=input_ids, position_ids=None), rotary, input_ids)
        depths = self.mtp_hidden(given, input_ids, None, rotary, None)
        return [self.output_layer(hidden)[0].transpose(0, 1).contiguous() for hidden in depths]

    def _losses(self, hidden: Tensor, labels: Tensor, gather: bool | None) -> Tensor:
        """[b, s] losses of labels [b, s] by normed hidden states [s, b, h], a share of s under sequence parallelism."""

        def loss_of(hidden: Tensor, labels: Tensor, weight: Tensor | None = None) -> Tensor:
            given = {} if weight is None else {"weight": weight}
            logits = self.output_layer(hidden, runtime_gather_output=gather, **given)[0]
            return self.compute_language_model_loss(labels, logits)

        ranks = self.topology.tp if self.config.sequence_parallel else 1
        weight = getattr(self.output_layer, "weight", None)
        return token_losses(loss_of, hidden, labels, weight, self.config.loss_chunk, ranks)

    def _with_mtp_loss(
        self,
        hidden: Tensor,
        depths: list[Tensor],
        labels: Tensor,
        loss_mask: Tensor | None,
        gather: bool | None,
        rotary: Rotary,
        share: tuple[float, ...] | None,
    ) -> Tensor:
        if not torch.is_grad_enabled():  # nobody would see it
            return hidden

        loss_of = partial(self._losses, gather=gather)
        losses = draft_losses(depths, labels, loss_mask, partial(moved_ahead, rotary=rotary), loss_of)
        if self.training:
            tally_drafts(self.tally[1], losses)
        learned = torch.full_like(losses[0][1], labels.numel()) if loss_mask is None else loss_mask.sum()
        if (group := self.pg_collection.cp).size() > 1:  # the weights are the whole rows'
            weights = over_ranks(torch.stack([learned, *(count for _, count in losses)]), group)
            learned, *counts = weights.unbind()
            losses = [(total, count) for (total, _), count in zip(losses, counts, strict=True)]
        return with_draft_losses(hidden, losses, self.config, learned, share)

    def _check_share(self, length: int, decoding: bool) -> None:
        ranks = self.topology.cp
        doing = f"running the model with rows cut over {ranks} context-parallel ranks"
        if decoding:
            raise BridgeError(f"{doing}: a cache and the last token's logits need whole rows; build it with cp 1")
        check_rows(length * ranks, self.topology.sizes, self.config.csa_window_size, doing)


def _check_ids(ids: Tensor, vocab_size: int, what: str = "token ids") -> None:
    """Refuse tokens that the model does not have: ranks that share the vocabulary would leave them out, all of them."""
    if ids.device.type != "cpu":  # without waiting for the device; it stops with the message
        known = ((ids >= 0) & (ids < vocab_size)).all()
        torch._assert_async(known, f"{what} outside of the vocabulary")  # type: ignore[reportPrivateUsage]
    elif ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        least, most = int(ids.min()), int(ids.max())
        raise BridgeError(f"running the model: {what} from {least} to {most}, expected 0 to {vocab_size - 1}")


def _check_cache(cache: Cache, batch: int, length: int) -> None:
    if len(cache.known) != batch:
        raise BridgeError(f"decoding: {batch} rows with a cache of {len(cache.known)}")
    if cache.filled and length != 1:
        raise BridgeError(f"decoding: {length} tokens a row with a filled cache, expected 1")
    longest = max(cache.known)
    if not cache.filled and not 0 < min(cache.known) <= longest <= length:
        raise BridgeError(f"decoding: prompts of {list(cache.known)} tokens in rows of {length}")
    if longest + cache.filled > cache.capacity:
        raise BridgeError(f"decoding: the cache holds {cache.capacity} tokens a row, and it is full")


def build_model(
    spec: ModelSpec,
    *,
    dtype: torch.dtype = torch.float32,
    max_sequence_length: int = 4096,
    initialize_weights: bool = True,
    layout: Layout | None = None,
    **settings: Any,
) -> DeepSeekV4Model:
    """Build this rank's part of the model on its device (the CPU where there is no GPU).

    Makes one-process groups first where none exist (`initialize` makes larger ones). With several
    chunks a rank, see `build_chunks`.

    Args:
        spec: the model's numbers.
        dtype: type of the parameters; what released checkpoints keep in float32 stays so.
        max_sequence_length: what megatron-core is told; nothing is allocated by it.
        initialize_weights: False saves the time where a checkpoint follows.
        layout: pipeline layout; by default the solver's.
        **settings: further configuration fields, see `model_config`.

    Raises:
        BridgeError: a setting that is refused, or groups that do not cut the model.
    """
    chunks = build_chunks(
        spec,
        dtype=dtype,
        max_sequence_length=max_sequence_length,
        initialize_weights=initialize_weights,
        layout=layout,
        **settings,
    )
    if len(chunks) > 1:
        raise BridgeError(f"building the model: the layout has {len(chunks)} chunks a rank; use build_chunks")
    return chunks[0]


def build_chunks(
    spec: ModelSpec,
    *,
    dtype: torch.dtype = torch.float32,
    max_sequence_length: int = 4096,
    initialize_weights: bool = True,
    layout: Layout | None = None,
    **settings: Any,
) -> list[DeepSeekV4Model]:
    """Build this rank's chunks in the order of the data, where a layout has several a rank; see `build_model`."""
    if not isinstance(spec, ModelSpec):
        raise BridgeError(
            f"building the model: its numbers are {short(spec)}, expected a ModelSpec, as "
            "ModelSpec.from_pretrained(NAME); mcore.from_pretrained(NAME) builds a checkpoint's model and loads it"
        )
    initialize()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    parallel_state.set_virtual_pipeline_model_parallel_world_size(None)
    sizes = Sizes(groups.tp.size(), groups.pp.size(), groups.ep.size(), groups.expt_tp.size(), groups.cp.size())
    topology = make_topology(spec, sizes, layout)
    config = model_config(spec, topology, dtype=dtype, perform_initialization=initialize_weights, **settings)
    if topology.layout.vp > 1:
        parallel_state.set_virtual_pipeline_model_parallel_world_size(topology.layout.vp)
    chunks = [
        DeepSeekV4Model(config, spec, topology, max_sequence_length, number, groups)
        for number in range(groups.pp.rank(), len(topology.layout.chunks), topology.pp)
    ]
    return chunks if config.use_cpu_initialization else [chunk.cuda() for chunk in chunks]
