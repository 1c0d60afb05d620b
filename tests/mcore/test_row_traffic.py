"""Bytes that layers send between context-parallel ranks: as planned, and little more than any such cut must send."""

from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from reference import small_spec

from dsv4_bridge import make_toy
from dsv4_bridge.planning.activations import Shape
from dsv4_bridge.planning.row_traffic import Sent, queries_sent, sent_backward, sent_forward
from dsv4_bridge.spec.variants import VARIANTS

FLASH = VARIANTS["Flash"].spec
RATIOS = small_spec().compress_ratios
CASES: dict[str, dict[str, Any]] = {
    "float32": {"settings": {}, "batch": 2, "length": 262},  # shares that are no multiple of a block
    "bf16": {"settings": {"dtype": "bfloat16"}, "batch": 1, "length": 512},
    "queries": {"settings": {"index_queries": "spread"}, "batch": 2, "length": 300},
    "bf16-queries": {"settings": {"dtype": "bfloat16", "index_queries": "spread"}, "batch": 1, "length": 512},
    "indexer": {"settings": {"dsa_indexer_loss_coeff": 0.3}, "batch": 1, "length": 280},
    "indexer-queries": {
        "settings": {"dsa_indexer_loss_coeff": 0.3, "index_queries": "spread"},
        "batch": 1,
        "length": 280,
    },
}


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, int]]]:
    folder: Path = tmp_path_factory.mktemp("traffic")
    toy = make_toy(folder / "toy", "Flash", 4, spec=small_spec(index_topk=5), payload="natural")
    cases = [{"action": "traffic", "parallel": {"cp": 2}} | case for case in CASES.values()]
    return dict(zip(CASES, run_ranks(folder, "traffic", 2, cases, weights=toy), strict=True))


@pytest.mark.megatron
@pytest.mark.parametrize("name", CASES)
def test_ranks_send_what_is_planned(counted: dict[str, list[dict[str, int]]], name: str) -> None:
    case, (first, last) = CASES[name], counted[name]
    spec = small_spec(index_topk=5)
    dtype = "bf16" if case["settings"].get("dtype") else "float32"
    shape = Shape(case["batch"], case["length"] // 2, dtype, cp=2, indexer=name.startswith("indexer"))
    queries = case["settings"].get("index_queries", "auto")
    forth = [sent_forward(spec, ratio, shape, queries) for ratio in spec.compress_ratios]
    moved = [queries_sent(spec, shape, queries) if ratio == 4 else (0, 0) for ratio in spec.compress_ratios]
    assert [max(by_rank) for by_rank in moved] == [sent.queries for sent in forth]
    assert all(any(by_rank) == (name.endswith("queries") and r == 4) for r, by_rank in zip(RATIOS, moved, strict=True))
    # The last rank has no next one; its gradients go to the rank before.
    for rank, sends in enumerate((first, last)):
        others = [sent.window + sent.tails if rank == 0 else 0 for sent in forth]
        gathered = [sent.entries + sent.keys + by_rank[rank] for sent, by_rank in zip(forth, moved, strict=True)]
        assert [sends.get(f"layer {n}", 0) for n in range(4)] == [a + b for a, b in zip(others, gathered, strict=True)]
    back = [sent_backward(spec, ratio, shape) for ratio in spec.compress_ratios]
    assert last["backward"] == sum(sent.total for sent in back)
    assert first["backward"] == sum(sent.entries + sent.keys for sent in back)


def test_a_layer_sends_little_more_than_it_must() -> None:
    """Of Flash at 64K over 8 ranks: entries are nearly all of it; keys of all tokens would be 3 to 60 times that.

    The indexer's queries that are scored elsewhere are as much again as half of the entries: time is saved by them.
    """
    shape = Shape(1, 65536 // 8, "bf16", cp=8)
    window, csa, hca = (sent_forward(FLASH, ratio, shape) for ratio in (0, 4, 128))
    assert window == Sent(127 * 512 * 2)
    assert csa.entries == 7 * 2048 * 512 * 2 and csa.keys == 7 * 2048 * 128 * 2
    assert hca == Sent(127 * 512 * 2, 127 * 1024 * 2, 7 * 64 * 512 * 2)
    cut = csa.total - csa.queries
    assert cut / csa.least < 1.01 and hca.total / hca.least < 1.5
    assert csa.queries == max(queries_sent(FLASH, shape)) < csa.entries * 0.52
    everything = 7 * 8192 * 512 * 2
    assert everything / cut > 3.1 and everything / hca.total > 60


def test_one_rank_sends_nothing() -> None:
    assert all(sent_forward(FLASH, r, Shape()) == sent_backward(FLASH, r, Shape()) == Sent() for r in (0, 4, 128))
