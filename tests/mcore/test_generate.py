"""Cached decoding gives what the whole forward pass gives."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from reference import draft_spec, pair, randomise, small_spec, some_ids

from dsv4_bridge import BridgeError
from dsv4_bridge.mcore import DeepSeekV4Model, build_model
from dsv4_bridge.mcore.generate import complete, generate
from dsv4_bridge.mcore.layers.cache import Cache, new_cache
from dsv4_bridge.mcore.layers.observe import watching
from dsv4_bridge.text.sampling import Sampling, choose, distribution

pytestmark = pytest.mark.megatron

# Prompts that lie below and beyond a block of 4, the window and a block of 128; longer ones are shared work.
LENGTHS = (1, 3, 127, 130)


@cache
def model_of(index_topk: int = 8) -> DeepSeekV4Model:
    return randomise(build_model(small_spec(index_topk=index_topk), initialize_weights=False)).eval()


def prompts_of(model: DeepSeekV4Model, lengths: tuple[int, ...] = LENGTHS, seed: int = 1) -> list[list[int]]:
    ids = some_ids(model.spec, len(lengths), max(lengths), seed)
    return [row[:n].tolist() for row, n in zip(ids, lengths, strict=True)]


@contextmanager
def recording(found: dict[str, torch.Tensor]) -> Iterator[None]:
    """Keep the blocks that a forward pass chooses."""

    def see(site: str, block: str, value: torch.Tensor) -> None:
        if site == "attn.index":
            found[block] = value

    with watching(see):
        yield


@contextmanager
def replaying(chosen: dict[str, torch.Tensor], cache: Cache, differing: list[bool]) -> Iterator[None]:
    """Give steps the recorded blocks, and note where theirs were others: blocks of equal score may change places."""

    def put(site: str, block: str, value: torch.Tensor) -> torch.Tensor | None:
        if site != "attn.index" or not cache.filled:
            return None
        rows = torch.arange(len(value))
        recorded = chosen[block][rows, cache.lengths].unsqueeze(1)
        for mine, theirs in zip(value.tolist(), recorded.tolist(), strict=True):
            differing.append(set(mine[0]) - {-1} != set(theirs[0]) - {-1})
        return recorded

    with watching(put):
        yield


@pytest.mark.parametrize(("index_topk", "new"), [pytest.param(8, 300, marks=pytest.mark.slow), (128, 140)])
@torch.no_grad()
def test_steps_equal_the_whole_forward(index_topk: int, new: int) -> None:
    """Up to 300 tokens behind each of four prompts, across windows and blocks; 8 of up to 107 blocks chosen, or all."""
    model = model_of(index_topk)
    lengths = torch.tensor(LENGTHS)
    longest, rows = max(LENGTHS), torch.arange(len(LENGTHS))
    ids = some_ids(model.spec, len(LENGTHS), longest + new)
    chosen: dict[str, torch.Tensor] = {}
    with recording(chosen):
        whole = model(ids)
    scale = whole.abs().max()
    padded = ids[:, :longest].clone()
    padded[torch.arange(longest) >= lengths[:, None]] = 5
    memory, differing = new_cache(model.config, lengths, longest + new), []
    with replaying(chosen, memory, differing):
        logits = model(padded, cache=memory, last_only=True)
        for step in range(new):
            wanted = whole[rows, lengths + step - 1]
            assert (logits[:, 0] - wanted).abs().max() <= 1e-5 * scale, f"step {step}"
            assert torch.equal(logits[:, 0].argmax(-1), wanted.argmax(-1)), f"step {step}"
            logits = model(ids[rows, lengths + step].unsqueeze(1), cache=memory)
    assert memory.lengths.tolist() == [n + new for n in LENGTHS]
    assert len(differing) == new * len(LENGTHS) * 2
    assert sum(differing) <= 0.002 * len(differing)
    assert index_topk == 8 or not any(differing)


@torch.no_grad()
def test_a_batch_of_unequal_prompts_gives_each_prompt_s_own_continuation() -> None:
    """Greedy tokens of a batch, each recomputed from its whole text at several steps."""
    model = model_of()
    prompts = prompts_of(model)
    new = complete(model, prompts, 132)
    for prompt, tokens in zip(prompts, new, strict=True):
        assert len(tokens) == 132
        for step in (0, 1, 2, 4, 63, 127, 128, 131):
            text = torch.tensor([prompt + tokens[:step]])
            assert int(model(text, last_only=True)[0, 0].argmax()) == tokens[step], f"step {step}"
    assert len({tuple(t) for t in new}) == len(prompts)


@pytest.mark.parametrize("length", [2, 126])
def test_greedy_tokens_equal_transformers(length: int) -> None:
    reference, ours = pair(small_spec())
    prompt = prompts_of(ours, (length,), seed=3)
    config = {"do_sample": False, "max_new_tokens": 40, "eos_token_id": None, "pad_token_id": 0}
    theirs = reference.generate(torch.tensor(prompt), attention_mask=torch.ones(1, length), **config)
    assert complete(ours, prompt, 40) == theirs[:, length:].tolist()


def test_mtp_layers_do_not_disturb() -> None:
    draft = randomise(build_model(draft_spec(), initialize_weights=False))
    trunk = build_model(small_spec(), initialize_weights=False).eval()
    trunk.load_state_dict({k: v for k, v in draft.state_dict().items() if not k.startswith("mtp.")})
    prompts = prompts_of(trunk, (5, 9))
    assert draft.training
    assert complete(draft, prompts, 8) == complete(trunk, prompts, 8)
    assert draft.training and draft.decoder.training
    assert all(p.grad is None for p in draft.parameters())


@torch.no_grad()
def test_bf16_steps_follow_the_whole_forward() -> None:
    model = randomise(build_model(small_spec(index_topk=64), dtype=torch.bfloat16, initialize_weights=False)).eval()
    ids = some_ids(model.spec, 2, 150)
    whole = model(ids).float()
    memory = new_cache(model.config, torch.tensor([100, 126]), 150)
    rows, logits = torch.arange(2), model(ids[:, :126], cache=memory, last_only=True)
    for _ in range(20):
        wanted = whole[rows, memory.lengths - 1]
        assert torch.cosine_similarity(logits[:, 0].float(), wanted).min() >= 0.999
        logits = model(ids[rows, memory.lengths].unsqueeze(1), cache=memory)
    assert logits.dtype is torch.bfloat16


def filled(model: DeepSeekV4Model, lengths: tuple[int, ...], capacity: int) -> Cache:
    memory = new_cache(model.config, torch.tensor(lengths), capacity)
    with torch.no_grad():
        model(some_ids(model.spec, len(lengths), max(lengths)), cache=memory, last_only=True)
    return memory


def test_the_cache_holds_windows_unfinished_blocks_and_entries_alone() -> None:
    model, rows, capacity = model_of(), 3, 513
    memory = filled(model, (1, 130, 300), capacity)
    spec = model.spec
    head, index, window = spec.head_dim, spec.index_head_dim, spec.sliding_window
    shapes = {
        0: [(rows, window, head)],
        4: [
            (rows, window, head),
            *[(rows, 8, 2 * head)] * 2,  # a block and the one before, as values and as gates
            (rows, capacity // 4, head),
            *[(rows, 8, 2 * index)] * 2,
            (rows, capacity // 4, index),
        ],
        128: [(rows, window, head), *[(rows, 128, head)] * 2, (rows, capacity // 128, head)],
    }
    for layer, ratio in zip(memory.layers, spec.compress_ratios, strict=True):
        held = [tensor for part in layer.parts() for tensor in part.tensors()]
        assert [tuple(t.shape) for t in held] == shapes[ratio]
        assert not any(t.requires_grad for t in held)
    bytes_of = {r: 4 * sum(torch.Size(s).numel() for s in found) for r, found in shapes.items()}
    assert memory.nbytes == sum(bytes_of[r] for r in spec.compress_ratios)


def test_the_cache_does_not_grow_with_prompts_or_steps_and_shrinks_with_rows() -> None:
    model = model_of()
    memory, short = filled(model, (300, 200), 320), filled(model, (2, 1), 320)
    size = memory.nbytes
    assert short.nbytes == size
    with torch.no_grad():
        model(torch.tensor([[1], [2]]), cache=memory)
    assert memory.nbytes == size
    memory.keep(torch.tensor([1]))
    assert memory.nbytes == size // 2 and memory.lengths.tolist() == [201]


def test_stop_tokens_end_their_own_row() -> None:
    model = model_of()
    prompts = prompts_of(model, (3, 6, 130))
    free = complete(model, prompts, 24)
    at = next(n for n in range(4, 20) if free[1].index(free[1][n]) == n and free[1][n] not in free[0] + free[2])
    sizes, tokens = [], [[], [], []]
    for step in generate(model, prompts, 24, stop_ids={free[1][at]}):
        sizes.append(len(step))
        for token in step:
            tokens[token.row].append(token)
    assert [[t.id for t in row] for row in tokens] == [free[0], free[1][: at + 1], free[2]]
    assert [row[-1].ended for row in tokens] == ["length", "stop", "length"]
    assert all(t.ended is None for row in tokens for t in row[:-1])
    assert sizes == [3] * (at + 1) + [2] * (23 - at)


def test_a_predicate_ends_rows_and_generation_ends_with_the_last() -> None:
    model = model_of()
    prompts = prompts_of(model, (3, 6))
    free, asked = complete(model, prompts, 9), []

    def stops(row: int, ids: list[int]) -> bool:
        asked.append((row, list(ids)))
        return len(ids) == (2, 5)[row]

    assert complete(model, prompts, 9, stops=stops) == [free[0][:2], free[1][:5]]
    assert asked == [(row, free[row][: n + 1]) for n in range(5) for row in (0, 1) if n < (2, 5)[row]]


def test_sampling_is_reproducible_and_a_row_does_not_depend_on_the_others() -> None:
    model = model_of()
    prompts = prompts_of(model, (3, 6))
    how = Sampling(temperature=1.5, top_p=0.95, top_k=200, seed=4)
    drawn = complete(model, prompts, 6, sampling=how)
    assert complete(model, prompts, 6, sampling=how) == drawn
    assert complete(model, prompts[:1], 6, sampling=how) == drawn[:1]
    assert complete(model, prompts, 6, sampling=Sampling(1.5, 0.95, 200, seed=5)) != drawn
    assert (
        complete(model, [prompts[0]] * 2, 6, sampling=how)[0] != complete(model, [prompts[0]] * 2, 6, sampling=how)[1]
    )
    assert complete(model, prompts, 6, sampling=Sampling(0.7, top_k=1)) == complete(model, prompts, 6)


@pytest.mark.parametrize("how", [Sampling(0.7), Sampling(1.3, 0.8), Sampling(1.0, 1.0, 5), Sampling(1.9, 0.6, 20)])
def test_chances_equal_transformers(how: Sampling) -> None:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn((6, 300), generator=torch.Generator().manual_seed(2)) * 3
    wanted = TemperatureLogitsWarper(how.temperature)(None, logits)
    wanted = TopKLogitsWarper(how.top_k)(None, wanted) if how.top_k else wanted
    wanted = TopPLogitsWarper(how.top_p)(None, wanted) if how.top_p < 1 else wanted
    chances, ids = distribution(logits, how)
    assert torch.allclose(torch.zeros_like(logits).scatter_(1, ids, chances), wanted.softmax(-1), atol=1e-6)
    # Numbers that lie evenly in [0, 1) draw every token as often as its chance says.
    draws = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    drawn = choose(logits[:1].expand(20000, -1), how, draws).bincount(minlength=300) / 20000
    assert (drawn - wanted[0].softmax(-1)).abs().max() <= 1.01 / 20000
    assert choose(logits, how, torch.full((6,), 1 - 2**-53, dtype=torch.float64)).tolist() == [
        int(row_ids[int((row > 0).sum()) - 1]) for row, row_ids in zip(chances, ids, strict=True)
    ]


REFUSED = {
    "no prompts": ([], {}, "no prompts"),
    "empty prompt": ([[1], []], {}, "prompt 1 has no tokens"),
    "id too large": ([[1, 512]], {}, "token 512, expected ids from 0 to 511"),
    "negative id": ([[-1]], {}, "token -1"),
    "no tokens asked": ([[1]], {"max_new_tokens": 0}, "0 new tokens"),
    "too long": ([[1] * 9], {"max_new_tokens": 1 << 20}, "the model has 1048576"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unusable_prompts_are_refused_at_once(case: str) -> None:
    prompts, options, message = REFUSED[case]
    with pytest.raises(BridgeError, match=message):
        generate(model_of(), prompts, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config.sequence_parallel": True}, "sequences are cut over ranks"),
        ({"config.context_parallel_size": 2}, "sequences are cut over ranks"),
        ({"post_process": False}, "one pipeline stage, expected the whole model"),
    ],
)
def test_models_that_cannot_decode_are_refused(
    change: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of()
    for name, value in change.items():
        owner, _, field = name.rpartition(".")
        monkeypatch.setattr(model.config if owner else model, field, value)
    with pytest.raises(BridgeError, match=message):
        generate(model, [[1]])


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0, expected 0 or more"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p is 1.5"),
        ({"temperature": 1.0, "top_k": -3}, "top_k is -3"),
        ({"seed": -1}, "seed is -1"),
        ({"top_p": 0.5}, "at temperature 0"),
        ({"top_k": 5}, "at temperature 0"),
    ],
)
def test_numbers_out_of_range_are_refused(numbers: dict[str, float], message: str) -> None:
    with pytest.raises(BridgeError, match=message):
        Sampling(**numbers)


@torch.no_grad()
def test_a_cache_that_does_not_fit_its_call_is_refused() -> None:
    model = model_of()
    cases = {
        "2 rows with a cache of 1": (new_cache(model.config, torch.tensor([2]), 9), some_ids(model.spec, 2, 2)),
        r"prompts of \[3\] tokens in rows of 2": (
            new_cache(model.config, torch.tensor([3]), 9),
            some_ids(model.spec, 1, 2),
        ),
        "2 tokens a row with a filled cache": (filled(model, (4,), 9), some_ids(model.spec, 1, 2)),
        "holds 4 tokens a row, and it is full": (filled(model, (4,), 4), some_ids(model.spec, 1, 1)),
    }
    for message, (memory, ids) in cases.items():
        with pytest.raises(BridgeError, match=message):
            model(ids, cache=memory)
