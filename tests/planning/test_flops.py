"""FLOPs in closed form: equal to torch's counter on the real model, term by term; and the published 90.78."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from dsv4_bridge import BridgeError
from dsv4_bridge.cli.app import app
from dsv4_bridge.parallel.balance import flop_costs
from dsv4_bridge.planning.flops_report import flop_report
from dsv4_bridge.planning.index_queries import rank_flops
from dsv4_bridge.planning.peaks import mfu, peak_tflops
from dsv4_bridge.spec.flops import (
    Terms,
    block_pairs,
    count_flops,
    flops_per_token,
    model_flops,
    published,
    share_flops,
    window_pairs,
)
from dsv4_bridge.spec.lora import DEFAULT_TARGETS, Lora
from dsv4_bridge.spec.spec import ModelSpec, replace_spec
from dsv4_bridge.spec.variants import VARIANTS, tiny

FLASH, PRO = VARIANTS["Flash"].spec, VARIANTS["Pro"].spec
LENGTH = 131  # more than a block of 128; ragged over blocks of 4

# Every width is another number, so that no product stands for another.
SMALL = replace_spec(
    tiny(VARIANTS["Flash"]),
    num_hidden_layers=3,
    compress_ratios=(0, 4, 128, 0),
    num_hash_layers=1,
    hidden_size=28,
    head_dim=24,
    qk_rope_head_dim=8,
    num_attention_heads=6,
    q_lora_rank=20,
    o_lora_rank=11,
    o_groups=2,
    moe_intermediate_size=10,
    n_shared_experts=2,
    n_routed_experts=7,
    num_experts_per_tok=3,
    index_n_heads=5,
    index_head_dim=16,
    index_topk=4,
    vocab_size=150,
    sliding_window=9,
    hc_mult=3,
)


@dataclass(frozen=True)
class Measured:
    """What torch's counter saw."""

    forward: int
    backward: int
    modules: dict[str, int]


@pytest.fixture(scope="module")
def measured() -> Measured:
    """Counts of one forward and backward pass of the real model.

    Queries go one at a time: in larger chunks every query of a chunk is multiplied with keys that only
    others of it see, and the mask throws the result away.
    """
    from dsv4_bridge.mcore import build_model
    from dsv4_bridge.mcore.kernels import attention as attend
    from dsv4_bridge.mcore.kernels import index

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attend, "_LEAST", 1)
        patch.setattr(attend, "_DENSE", 1)  # chosen blocks are gathered as soon as one is left out
        patch.setattr(index, "_CHUNK", 1)
        torch.manual_seed(0)
        model = build_model(SMALL, attention_chunk=1).train()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, 0.0, 0.3)
        ids = torch.randint(SMALL.vocab_size, (1, LENGTH))
        # torch does not count the in-place product that a hyper-connection's backward uses.
        counter = FlopCounterMode(
            display=False,
            depth=9,
            custom_mapping={torch.ops.aten.addmm_: lambda _, a, b, **rest: 2 * a[0] * a[1] * b[1]},
        )
        with counter:
            loss = model(ids, labels=ids.roll(-1, 1)).sum()
            forward = counter.get_total_flops()
            # By module only in the forward pass: torch gives the backward of our own functions to any module.
            modules = {
                name.removeprefix("DeepSeekV4Model").removeprefix("."): sum(ops.values())
                for name, ops in counter.get_flop_counts().items()
            }
            loss.backward()
        return Measured(forward, counter.get_total_flops() - forward, modules)


def elementwise(terms: int) -> int:
    """FLOPs of `terms` products of a number with a stream: written as element-wise products, not counted by torch."""
    return 2 * terms * SMALL.hc_mult * SMALL.hidden_size * LENGTH


SUBLAYERS, HEADS = 2 * 4, 2  # three layers and MTP's; the trunk's learned head and MTP's


@pytest.mark.megatron
def test_forward_is_what_torch_counts_term_by_term(measured: Measured) -> None:
    seen = measured.modules
    layers = ["decoder.layers.0", "decoder.layers.1", "decoder.layers.2", "mtp.layers.0.mtp_model_layer"]

    def inside(*parts: str) -> int:
        return sum(seen.get(f"{layer}.{part}", 0) for layer in layers for part in parts)

    core = "self_attention.core_attention"
    window = 4 * seen[f"decoder.layers.0.{core}"]  # that layer has nothing else
    compressor, indexer = inside(f"{core}.compressor"), inside(f"{core}.indexer")
    inputs = seen["mtp.layers.0.e_proj"] + seen["mtp.layers.0.h_proj"]
    around = inside("self_attention_hyper_connection", "mlp_hyper_connection")
    # Mixing is called beside the modules' forward: what layers and heads do themselves.
    around += sum(seen[x] for x in layers) - inside(
        "self_attention", "mlp", "self_attention_hyper_connection", "mlp_hyper_connection"
    )
    around += seen["decoder"] - sum(seen[x] for x in layers[:3]) + seen["mtp.layers.0"] - seen[layers[3]] - inputs
    found = Terms(
        projections=inside("self_attention") - inside(core),
        window=window,
        compressed=inside(core) - window - compressor - indexer,
        indexer=indexer,
        compressor=compressor,
        experts=inside("mlp.experts", "mlp.shared_experts"),
        router=inside("mlp.router"),
        hyper_connections=around + elementwise(SUBLAYERS),  # the output's, to every stream
        mtp=inputs,
        logits=seen["output_layer"],
    )
    ours = count_flops(SMALL, LENGTH).forward
    assert found.items() == ours.items()
    assert all(value > 0 for name, value in ours.items().items() if name != "adapters")
    assert ours.total == measured.forward + elementwise(SUBLAYERS)


@pytest.mark.megatron
def test_backward_is_what_torch_counts(measured: Measured) -> None:
    count = count_flops(SMALL, LENGTH)
    backward = count.input_gradients.total + count.weight_gradients.total
    # Attention keeps no scores and makes them again: queries with keys, half of its forward.
    again = (count.forward.window + count.forward.compressed) / 2
    # Of each sub-layer, the dots of the output and of the collapsed stream with the streams, and what the
    # streams get back from the collapse; the last two of each head.
    assert measured.backward == backward + again - elementwise(SUBLAYERS + 2 * (SUBLAYERS + HEADS))


def test_published_figure() -> None:
    """Figures recomputed from the published formula by others, for Flash at 4096, GFLOP a token."""
    terms = published(FLASH, 4096)
    giga = {name: round(value / 1e9, 3) for name, value in terms.items().items()}
    assert round(terms.total / 1e9, 3) == 90.781
    assert (giga["experts"], giga["projections"], giga["logits"]) == (46.506, 28.236, 6.354)
    assert (giga["compressor"], giga["mtp"], giga["router"], giga["hyper_connections"]) == (1.560, 0.201, 0, 0)
    # There, sparse attention 5.385 and indexer 1.354 stand apart from what grows with the sequence, 1.183.
    assert giga["window"] + giga["compressed"] + giga["indexer"] == pytest.approx(5.385 + 1.354 + 1.183, abs=2e-3)
    assert flops_per_token(FLASH, 4096, convention="published") == terms.total


@pytest.mark.parametrize(("tflops", "tokens"), [(731.4, 8056.45), (759.28, 8358.84), (142.91, 1573.0)])
def test_published_throughputs_are_of_this_formula(tflops: float, tokens: float) -> None:
    assert flops_per_token(FLASH, 4096, convention="published") * tokens / 1e12 == pytest.approx(tflops, rel=1e-3)


def test_ours_differs_from_the_published_where_the_report_says() -> None:
    report = flop_report("Flash", FLASH, [4096])
    ours, theirs = report.count.training.over(4096).items(), report.convention.items()
    assert set(report.differing()) == {n for n in ours if n not in ("compressor", "experts", "logits", "adapters")}
    # Three of four streams; scores of future blocks, and gradients that the indexer does not have.
    assert ours["mtp"] == 6 * 5 * 4096**2
    assert theirs["mtp"] == 6 * (2 * 4096**2 + 3 * 4096)
    assert 3 * ours["indexer"] < theirs["indexer"]
    assert ours["window"] < theirs["window"] < 1.02 * ours["window"]
    assert ours["compressed"] == pytest.approx(theirs["compressed"], rel=2e-3)
    assert ours["router"] == 6 * 44 * 4096 * 256
    # Field figures: about 0.26 for the hyper-connections, 0.28 for the router.
    assert (round(ours["hyper_connections"] / 1e9, 2), round(ours["router"] / 1e9, 2)) == (0.26, 0.28)


@pytest.mark.parametrize("length", [1, 3, 4, 7, 8, 9, 40, 127, 128, 129, 300])
def test_pairs_are_the_sums_over_queries(length: int) -> None:
    queries = range(1, length + 1)
    for window in (1, 5, 128):
        assert window_pairs(length, window) == sum(min(t, window) for t in queries)
    for ratio in (4, 128):
        assert block_pairs(length, ratio) == sum(t // ratio for t in queries)
        for chosen in (1, 2, 9, 1000):
            assert block_pairs(length, ratio, chosen) == sum(min(t // ratio, chosen) for t in queries)


def test_documents_add_up_and_do_not_meet() -> None:
    random = Random(3)
    lengths = [random.randint(1, 3000) for _ in range(9)]
    alone = Terms()
    for length in lengths:
        alone += count_flops(FLASH, length).training
    packed = count_flops(FLASH, lengths)
    assert packed.training.items() == pytest.approx(alone.items())
    assert packed.tokens == sum(lengths)
    one = count_flops(FLASH, sum(lengths)).training
    assert {n for n in one.items() if packed.training.items()[n] < one.items()[n]} == {
        "window",
        "compressed",
        "indexer",
    }
    theirs = published(FLASH, 4096, [1024, 3072])
    whole = published(FLASH, 4096)
    assert whole.total - theirs.total == pytest.approx(
        6 * (20 * 32768 / 128 + 21 * 64 * 128 / 4) * (4096 - (1024**2 + 3072**2) / 4096)
    )


def test_what_has_no_gradient_costs_none() -> None:
    frozen, trained = count_flops(FLASH, 8192), count_flops(FLASH, 8192, train_indexer=True)
    assert frozen.input_gradients.indexer == frozen.weight_gradients.indexer == 0 < frozen.forward.indexer
    # Its inputs are cut off: of its projections the weights get gradients, of scores of chosen blocks both sides.
    scores, chosen = (2 * 21 * 64 * 129 * block_pairs(8192, 4, most) for most in (None, 512))
    assert trained.input_gradients.indexer == 2 * chosen < scores
    assert trained.weight_gradients.indexer == trained.forward.indexer - scores
    others = {n for n in frozen.training.items() if frozen.training.items()[n] != trained.training.items()[n]}
    assert others == {"indexer"}
    # Where all blocks are chosen, there is nothing to score: only the indexer's compressor runs.
    assert count_flops(FLASH, 2048).forward.indexer == 2048 * 2 * 21 * 4096 * 512
    for name in ("projections", "experts", "logits", "compressor", "mtp", "router"):
        forward = frozen.forward.items()[name]
        assert frozen.input_gradients.items()[name] == frozen.weight_gradients.items()[name] == forward > 0


def adapter_sizes(spec: ModelSpec, rank: int) -> Iterator[tuple[str, int]]:
    h, heads, wide = spec.hidden_size, spec.num_attention_heads * spec.head_dim, spec.moe_intermediate_size
    groups = spec.o_groups * spec.o_lora_rank
    yield "attn.wq_a", rank * (h + spec.q_lora_rank)
    yield "attn.wq_b", rank * (spec.q_lora_rank + heads)
    yield "attn.wkv", rank * (h + spec.head_dim)
    yield "attn.wo_a", rank * (heads + groups)
    yield "attn.wo_b", rank * (groups + h)
    yield "ffn.experts.w2", rank * (h + wide) * spec.num_experts_per_tok
    yield "ffn.shared_experts.w1", rank * (h + wide) * spec.n_shared_experts


def test_lora_leaves_frozen_weights_without_gradients() -> None:
    full = count_flops(PRO, 5000)
    for target, values in adapter_sizes(PRO, 7):
        count = count_flops(PRO, 5000, lora=Lora(7, targets=(target,)))
        assert count.forward.adapters == 2 * 5000 * 61 * values, target
        assert count.weight_gradients.items() == Terms(adapters=count.forward.adapters).items()
        assert count.input_gradients.items() == (full.input_gradients + count.weight_gradients).items()
    five = count_flops(PRO, 5000, lora=Lora(7, targets=("attn",))).forward.adapters
    assert five == 2 * 5000 * 61 * sum(v for name, v in adapter_sizes(PRO, 7) if name.startswith("attn"))
    four = count_flops(PRO, 5000, lora=Lora(7)).forward.adapters
    assert four == count_flops(PRO, 5000, lora=Lora(7, targets=DEFAULT_TARGETS)).forward.adapters < five


def test_recompute_is_apart() -> None:
    plain, full = count_flops(FLASH, 4096), count_flops(FLASH, 4096, recompute="full")
    assert plain.recomputed.total == 0
    assert full.training.items() == plain.training.items()
    head = 2 * 2 * 4096 * (16 + 4) * 4096  # both learned heads stand behind the layers
    outside = Terms(logits=-full.forward.logits, mtp=-full.forward.mtp, hyper_connections=-head)
    assert full.recomputed.items() == (full.forward + outside).items()
    both = count_flops(FLASH, 4096, recompute="full", logits_again=True).recomputed
    assert both.items() == (full.recomputed + Terms(logits=full.forward.logits)).items()
    chunks, short, whole = (
        flop_report("Flash", FLASH, [n], loss_chunk=chunk).count.recomputed.logits
        for n, chunk in ((4096, 2048), (2048, 2048), (4096, 0))
    )
    assert (chunks, short, whole) == (full.forward.logits, 0, 0)
    moe = count_flops(FLASH, 4096, recompute="moe").recomputed
    assert moe.items() == Terms(experts=plain.forward.experts, router=plain.forward.router).items()


def test_without_draft_has_no_mtp() -> None:
    count, drafter = count_flops(FLASH.without_draft(), 4096), count_flops(VARIANTS["Flash-0731"].spec, 4096)
    assert count == drafter
    assert count.forward.mtp == 0
    assert count.forward.logits == 2 * 4096 * 4096 * 129280
    assert count.forward.experts * 44 == count_flops(FLASH, 4096).forward.experts * 43


def test_a_step_of_several_rows() -> None:
    lengths = [4096] * 3
    assert model_flops(FLASH, lengths) == pytest.approx(3 * 4096 * flops_per_token(FLASH, 4096))
    theirs = model_flops(FLASH, lengths, convention="published")
    assert theirs == pytest.approx(3 * 4096 * 90.78147072e9)


def test_peaks_by_the_driver_s_names() -> None:
    names = {
        "NVIDIA H100 80GB HBM3": 989.4,
        "NVIDIA H100 PCIe": 756.5,
        "NVIDIA H200": 989.4,
        "NVIDIA A100-SXM4-80GB": 312.0,
        "NVIDIA GB200": 2500.0,
        "NVIDIA B200": 2250.0,
        "b200": 2250.0,
        "NVIDIA H20": 148.0,
    }
    assert {name: peak_tflops(name) for name in names} == names
    assert peak_tflops("NVIDIA T4") is None
    assert peak_tflops("") is None
    assert mfu(90e9, 5000.0, 1000.0) == pytest.approx(0.45)


def run(*args: str | Path) -> Any:
    return CliRunner().invoke(app, ["flops", *map(str, args)])


def test_command_prints_both_conventions(toy_flash: Path, toy_megatron: Path) -> None:
    shown = run("Flash").stdout
    assert "published convention: 90.781 GFLOP a token" in shown
    for name in ("hyper-connections", "router", "indexer", "89.799"):
        assert name in shown
    asked = ("--lengths", "100,29", "--tokens-per-second", "1e6", "--gpu", "B200", "--recompute", "full", "--json")
    assert "computed again (full, logits)" in run("Flash", "--recompute", "full").stdout
    assert "computed again" not in run("Flash", "--loss-chunk", "0").stdout
    one, other = (json.loads(run(folder, *asked).stdout) for folder in (toy_flash, toy_megatron))
    assert one.pop("what") != other.pop("what")
    assert one == other
    assert (one["seq_length"], one["tokens"], one["lengths"]) == (129, 129, [100, 29])
    per_token = one["flops_per_token"]
    assert per_token["training"]["total"] == pytest.approx(
        sum(per_token[x]["total"] for x in ("forward", "input_gradients", "weight_gradients"))
    )
    assert one["mfu_exact"] == pytest.approx(per_token["training"]["total"] * 1e6 / 2250e12)
    assert one["hfu"] > one["mfu_exact"]
    assert set(one["differences"]) >= {"router", "mtp"}
    no_draft = json.loads(run("Flash", "--no-mtp", "--json").stdout)
    assert no_draft["flops_per_token"]["forward"]["mtp"] == no_draft["published_flops_per_token"]["mtp"] == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("Flush",), "no variant of that name"),
        (("Flash", "--lengths", "3,x"), "is none; give numbers"),
        (("Flash", "--lengths", "3,0"), "length 0, expected tokens"),
        (("Flash", "--lengths", "3", "--seq-length", "4"), "leave --seq-length out"),
        (("Flash", "--lora-rank", "4", "--lora-target", "attn.q"), "no target 'attn.q'; may carry one: attn.wq_a"),
        (("Flash", "--lora-target", "attn.wq_a"), "give both"),
        (("Flash", "--gpu", "H100"), "give both"),
        (("Flash", "--gpu", "H100", "--tokens-per-second", "inf"), "is inf, expected a number"),
        (("Flash", "--gpu", "K80", "--tokens-per-second", "1"), "known are A100"),
    ],
)
def test_unusable_arguments_are_refused(args: tuple[str, ...], message: str) -> None:
    done = run(*args)
    assert isinstance(done.exception, BridgeError)
    assert message in str(done.exception)


def test_unusable_calls_are_refused() -> None:
    with pytest.raises(BridgeError, match="recompute is 'half'"):
        count_flops(FLASH, 10, recompute="half")
    with pytest.raises(BridgeError, match="no sequence"):
        count_flops(FLASH, [])
    with pytest.raises(BridgeError, match="convention 'ours'"):
        flops_per_token(FLASH, 10, convention="ours")
    with pytest.raises(BridgeError, match="rank 0"):
        count_flops(FLASH, 10, lora=Lora(0))


@pytest.mark.parametrize("spec", [FLASH, PRO], ids=["Flash", "Pro"])
def test_the_pipeline_solver_weighs_with_the_one_count(spec: ModelSpec) -> None:
    for length in (7, 300, 4096):
        costs = flop_costs(spec, length)
        trunk, whole = (count_flops(s, length).forward.total / length for s in (spec.without_draft(), spec))
        assert sum(costs.layers) + costs.head + costs.embedding == pytest.approx(trunk, rel=1e-12)
        assert costs.mtp == pytest.approx(whole - trunk, rel=1e-12)


def test_shares_of_a_row_are_its_work() -> None:
    """Cut anywhere, the work is the same; the last rank's share of Flash is what the documentation tells."""
    for length, ranks in ((4096, 1), (5001, 3), (1 << 16, 4)):
        shares, whole = share_flops(FLASH, length, ranks), count_flops(FLASH, length).training.total
        assert max(shares) < 1.1 * min(shares) and sum(shares) == pytest.approx(whole, rel=1e-12)
    for length in (1 << 16, 1 << 18, 1 << 20):
        row = f"| {length:,} |"
        for ranks in (2, 4, 8, 16):
            each = home, level = [rank_flops(FLASH, length, ranks, 2, mode) for mode in ("home", "auto")]
            assert home == share_flops(FLASH, length, ranks) and sum(level) == pytest.approx(sum(home), rel=1e-12)
            row += " {1:.3f} ({0:.3f}) |".format(*(max(shares) * ranks / sum(shares) for shares in each))
        assert row in (Path(__file__).parents[2] / "docs" / "concepts" / "flops.md").read_text()
