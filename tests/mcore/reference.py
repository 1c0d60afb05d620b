"""transformers' DeepseekV4ForCausalLM with every parameter random, and our model with the same values."""

import json
import math
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoConfig, DeepseekV4ForCausalLM

from dsv4_bridge.mcore import DeepSeekV4Model, build_model, load_weights
from dsv4_bridge.mcore.layers.observe import watching
from dsv4_bridge.spec.spec import ModelSpec, replace_spec
from dsv4_bridge.spec.variants import VARIANTS, tiny
from dsv4_bridge.store.hf import disk_name
from dsv4_bridge.store.hf_config import released_config


def small_spec(**changes: object) -> ModelSpec:
    """A window, two CSA and an HCA layer, the first routed by id; no MTP, which transformers lacks.

    The clamp of the experts is reached by several per cent of the activations.
    """
    base = replace_spec(
        tiny(VARIANTS["Flash"]).without_draft(),
        num_hidden_layers=4,
        compress_ratios=(0, 4, 128, 4),
        num_hash_layers=1,
        swiglu_limit=2.5,
    )
    return replace_spec(base, **changes) if changes else base


def draft_spec(depth: int = 1, **changes: object) -> ModelSpec:
    """`small_spec` with MTP layers, the first of ratio 0."""
    ratios = changes.pop("mtp_ratios", (0,) * depth)
    trunk = small_spec(**changes)
    return replace_spec(trunk, num_nextn_predict_layers=depth, compress_ratios=(*trunk.compress_ratios, *ratios))


def reference_model(
    spec: ModelSpec, folder: Path, seed: int = 0, embedding_rms: float = 0.005
) -> DeepseekV4ForCausalLM:
    """A random float32 reference; sinks, biases, ape, bases, norms, scales and tables are random too.

    Small embeddings show where eps stands; wide expert inputs reach the clamp.
    """
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(released_config(spec, None, False)))
    config = AutoConfig.from_pretrained(folder)
    config._attn_implementation = "eager"
    model = DeepseekV4ForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" in name:
                continue
            if "tid2eid" in name:
                tensor.copy_(_table(tensor.shape, spec.n_routed_experts))
            elif "embed_tokens" in name:
                tensor.normal_(0, embedding_rms)
            elif "norm" in name:
                tensor.normal_(1.0, 0.3)
            elif name.endswith("scale"):
                tensor.normal_(0.8, 0.5)
            elif name.endswith(("base", "sinks", "position_bias", "bias")):
                tensor.normal_(0, 0.7)
            elif "_hc.fn" in name or "hc_fn" in name:
                tensor.normal_(0, 0.05)
            elif "gate.weight" in name:
                tensor.normal_(0, 0.15)
            else:
                tensor.normal_(0, 1.5 * tensor.shape[-1] ** -0.5)
    return model


def _table(shape: torch.Size, experts: int) -> torch.Tensor:
    return torch.stack([torch.randperm(experts)[: shape[1]] for _ in range(shape[0])])


def randomise(model: DeepSeekV4Model, seed: int = 0) -> DeepSeekV4Model:
    """Every parameter and saved buffer of our model random, in the manner of `reference_model`."""
    generator = torch.Generator().manual_seed(seed)
    saved = set(model.state_dict())
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name not in saved:
                continue
            if name.endswith("tid2eid"):
                order = torch.rand((len(tensor), model.spec.n_routed_experts), generator=generator)
                tensor.copy_(order.argsort(1)[:, : tensor.shape[1]])
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if "word_embeddings" in name:
                noise *= 0.005
            elif "norm" in name:
                noise = 1 + 0.3 * noise
            elif "alpha" in name or name.endswith("scale"):
                noise = 0.8 + 0.5 * noise
            elif name.endswith(("base", "attn_sink", "ape", "bias")):
                noise *= 0.7
            elif "mapping_proj" in name or "hc_head_fn" in name:
                noise *= 0.05
            elif "router" in name:
                noise *= 0.15
            else:
                noise *= 1.5 * tensor.shape[-1] ** -0.5
            tensor.copy_(noise)
    return model


def our_model(reference: DeepseekV4ForCausalLM, spec: ModelSpec, folder: Path, **settings: object) -> DeepSeekV4Model:
    """Our model with the reference's values, by way of a folder that transformers saved."""
    reference.save_pretrained(folder / "saved")
    return loaded_model(spec, folder / "saved", **settings)


def loaded_model(spec: ModelSpec, saved: Path, **settings: object) -> DeepSeekV4Model:
    """Our model with the values of a folder."""
    model = build_model(spec, initialize_weights=False, **settings)
    load_weights(model, saved, allow_lossy=True)
    return model.eval()


class Pair(NamedTuple):
    """The same model twice."""

    reference: DeepseekV4ForCausalLM
    ours: DeepSeekV4Model


_FOLDERS = tempfile.TemporaryDirectory()  # until the process ends


def new_folder() -> Path:
    """A folder that stays until the process ends."""
    return Path(tempfile.mkdtemp(dir=_FOLDERS.name))


@cache
def pair(spec: ModelSpec, seed: int = 0) -> Pair:
    """The reference and ours in float32, made once for all tests: they leave the values as they are."""
    folder = new_folder()
    reference = reference_model(spec, folder, seed)
    return Pair(reference, our_model(reference, spec, folder))


@cache
def saved_folder(spec: ModelSpec, seed: int = 0) -> Path:
    """The reference as transformers saves it."""
    folder = new_folder()
    pair(spec, seed).reference.save_pretrained(folder)
    return folder


def some_ids(spec: ModelSpec, batch: int, length: int, seed: int = 1) -> torch.Tensor:
    """Random token ids, unequal rows: [b, s] int64."""
    return torch.randint(0, spec.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def gradients_of(
    reference: DeepseekV4ForCausalLM, model: DeepSeekV4Model
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Name -> (the reference's gradient, ours), for every item that has one in the reference."""
    from dsv4_bridge.mcore.weights.places import places

    theirs = dict(reference.named_parameters())
    plan, found = places(model)
    pairs = {}
    for item in plan.items:
        name, stack = disk_name(item, "modules", model.spec)
        if name not in theirs or theirs[name].grad is None:
            continue
        grad = theirs[name].grad
        if stack:  # stacked along experts, then along gate and up
            count = item.row.part[1]
            rows = item.shape[0]
            part = stack[0] % count
            grad = grad[item.expert, part * rows : (part + 1) * rows]
        ours = [p.tensor.grad[p.row : p.row + p.stop - p.start] for p in found[item.name]]
        pairs[item.name] = (grad, torch.cat(ours))
    return pairs


class Choices(NamedTuple):
    """What a model chose, by our site and block, in our layouts.

    Attributes:
        chosen: experts [s*b, k] (`ffn.router`) or compressed blocks [b, s, k] (`attn.index`), -1 for none.
        scores: what they were chosen by, [s*b, experts] or [b, s, blocks]; none for a hash layer.
    """

    chosen: dict[tuple[str, str], torch.Tensor]
    scores: dict[tuple[str, str], torch.Tensor]


class Recorded(NamedTuple):
    """One pass of the reference: logits [b, s, vocabulary], and the choices it made."""

    logits: torch.Tensor
    choices: Choices


def record(reference: DeepseekV4ForCausalLM, ids: torch.Tensor) -> Recorded:
    """Run the reference on ids [b, s] without gradients, and watch its choices."""
    with torch.no_grad(), recording_choices(reference, len(ids)) as choices:
        return Recorded(reference(ids).logits, choices)


@cache
def recorded(spec: ModelSpec, batch: int, length: int) -> Recorded:
    """What transformers computes for `some_ids`, made once for all tests."""
    return record(pair(spec).reference, some_ids(spec, batch, length))


@contextmanager
def recording_choices(reference: DeepseekV4ForCausalLM, batch: int) -> Iterator[Choices]:
    """The experts and blocks that the reference chooses in the body, for `batch` rows."""
    found = Choices({}, {})
    handles = []
    for i, layer in enumerate(reference.model.layers):
        block = f"layers.{i}"

        def see_experts(gate: torch.nn.Module, args: object, output: tuple, at: tuple = ("ffn.router", block)) -> None:
            logits, _, chosen = output
            found.chosen[at] = _tokens_first(chosen, batch)
            if hasattr(gate, "e_score_correction_bias"):
                scores = torch.nn.functional.softplus(logits.detach().float()).sqrt() + gate.e_score_correction_bias
                found.scores[at] = _tokens_first(scores, batch)

        def see_blocks(indexer: object, args: object, chosen: torch.Tensor, at: tuple = ("attn.index", block)) -> None:
            found.chosen[at] = chosen

        def see_scores(scorer: object, args: object, scores: torch.Tensor, at: tuple = ("attn.index", block)) -> None:
            visible = (torch.arange(scores.shape[1])[:, None] + 1) // 4
            hidden = torch.arange(scores.shape[2]) >= visible
            found.scores[at] = scores.detach().masked_fill(hidden, float("-inf"))

        handles.append(layer.mlp.gate.register_forward_hook(see_experts))
        indexer = getattr(layer.self_attn.compressor, "indexer", None)
        if indexer is not None:
            handles.append(indexer.register_forward_hook(see_blocks))
            handles.append(indexer.scorer.register_forward_hook(see_scores))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _tokens_first(x: torch.Tensor, batch: int) -> torch.Tensor:
    """[b*s, n] -> [s*b, n]."""
    return x.unflatten(0, (batch, -1)).transpose(0, 1).flatten(0, 1)


@contextmanager
def replaying(choices: Choices) -> Iterator[dict[tuple[str, str], torch.Tensor]]:
    """Our model takes these choices in the body; yields what it would have chosen itself."""
    own: dict[tuple[str, str], torch.Tensor] = {}

    def replace(site: str, block: str, value: torch.Tensor) -> torch.Tensor | None:
        if (site, block) not in choices.chosen:
            return None
        own[site, block] = value
        return choices.chosen[site, block]

    with watching(replace):
        yield own


def assert_same_choices(own: dict[tuple[str, str], torch.Tensor], choices: Choices) -> None:
    """Equal sets; where the last chosen and the first left out score alike within rounding, either may be in."""
    assert set(own) == set(choices.chosen)
    for at, theirs in choices.chosen.items():
        assert own[at].shape == theirs.shape, at
        differing = (own[at].sort(-1).values != theirs.sort(-1).values).any(-1)
        if not differing.any():
            continue
        assert at in choices.scores, f"{at} is looked up, and differs for {int(differing.sum())} tokens"
        scores = choices.scores[at][differing]
        best = scores.topk(theirs.shape[-1] + 1, dim=-1).values
        gap = float((best[..., -2] - best[..., -1]).max() / best[..., 0].abs().max())
        assert gap <= 1e-5, f"{at} differs for {int(differing.sum())} tokens, by a gap of {gap}"


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference in units of the largest value; not a number counts as infinite."""
    worst = float((ours - theirs).abs().max() / theirs.abs().max())
    return float("inf") if math.isnan(worst) else worst


def assert_equal_to_reference(spec: ModelSpec, batch: int, length: int, model: DeepSeekV4Model | None = None) -> None:
    """Choices as transformers', and equal logits for its choices, at every position.

    Among thousands of choices some are ties within rounding: taken the other way, one moves a token's
    logits by 1e-3. So each is compared on its own, and the logits for the same choices.
    """
    theirs = recorded(spec, batch, length)
    with torch.no_grad(), replaying(theirs.choices) as own:
        ours = (model or pair(spec).ours)(some_ids(spec, batch, length))
    assert theirs.logits.abs().max() > 1
    assert_same_choices(own, theirs.choices)
    assert distance(ours, theirs.logits) <= 1e-5
    assert torch.equal(theirs.logits.argmax(-1), ours.argmax(-1))


RECOMPUTING = {
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "moe": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
}


def two_in_flight(spec: ModelSpec, **settings: object) -> tuple[list[torch.Tensor], dict[str, torch.Tensor], int]:
    """Losses and gradients of two micro-batches, both forward before either backward; and forwards run."""
    model = randomise(build_model(spec, initialize_weights=False, **settings), 3).train()
    runs = 0

    def count(*_: object) -> None:
        nonlocal runs
        runs += 1

    for router in (m for m in model.modules() if type(m).__name__ in ("BiasRouter", "HashRouter")):
        router.register_forward_hook(count)
    ids = [some_ids(spec, 2, 140, seed) for seed in (5, 6)]
    losses = [model(x, labels=x.roll(-1, 1)) for x in ids]
    losses[0].sum().backward()
    losses[1].mean().backward()
    return losses, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, runs


@contextmanager
def counting_clamped(spec: ModelSpec) -> Iterator[Counter[str]]:
    """Counts activations of the reference beyond the limit, in routed and shared experts."""
    found: Counter[str] = Counter()

    def count(kind: str, gate: torch.Tensor, up: torch.Tensor) -> None:
        found[f"{kind} gate"] += int((gate > spec.swiglu_limit).sum())
        found[f"{kind} up"] += int((up > spec.swiglu_limit).sum())
        found[f"{kind} -up"] += int((up < -spec.swiglu_limit).sum())

    handles = []
    for layer in pair(spec).reference.model.layers:
        experts, shared = layer.mlp.experts, layer.mlp.shared_experts

        def see(module: torch.nn.Module, args: tuple, output: object) -> None:
            hidden, chosen = args[0], args[1]
            for e in range(module.num_experts):
                tokens = (chosen == e).any(-1)
                count("routed", *(hidden[tokens] @ module.gate_up_proj[e].T).chunk(2, -1))

        def see_shared(module: torch.nn.Module, args: tuple, output: object) -> None:
            count("shared", module.gate_proj(args[0]), module.up_proj(args[0]))

        handles += [experts.register_forward_hook(see), shared.register_forward_hook(see_shared)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
