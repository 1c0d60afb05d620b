"""Pipeline layouts: the rules hold for every solution, and each broken one is named."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_bridge import BridgeError
from dsv4_bridge.parallel.balance import parameter_costs, solve
from dsv4_bridge.parallel.layout import broken_rules
from dsv4_bridge.parallel.notation import layout_of, parse_layout
from dsv4_bridge.spec.spec import ModelSpec, replace_spec
from dsv4_bridge.spec.variants import VARIANTS

FLASH, PRO = VARIANTS["Flash"].spec, VARIANTS["Pro"].spec
# Published by hand: what tools ship for these sizes today.
PUBLISHED = {
    ("Flash", 4, 1): "Et*11|t*11|t*11|t*10mL",
    ("Flash", 8, 1): "Et*6|t*6|t*6|t*5|t*5|t*5|t*5|t*5mL",
    ("Pro", 4, 4): "Et*4|(tttt|)*14tmL",
    ("Pro", 4, 1): "Et*16|t*15|t*15|t*15mL",
    ("Pro", 16, 1): "Et*4|(t*4|)*12t*3|t*3|t*3mL".replace("(t*4|)*12", "t*4|" * 12),
}


@pytest.mark.parametrize("vp", [1, 2])
@pytest.mark.parametrize("pp", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("name", ["Flash", "Pro", "Flash-0731"])
def test_solutions_keep_the_rules(name: str, pp: int, vp: int) -> None:
    spec = VARIANTS[name].spec
    layout = solve(spec, pp, vp)
    assert broken_rules(layout, spec) == []
    assert parse_layout(str(layout), pp, spec) == layout
    assert layout_of(layout.to_list(), pp, spec) == layout
    assert layout.vp == vp
    # Nothing can be better than the mean, and a layer more or less is the step of what can be chosen.
    params = parameter_costs(spec)
    mean = sum(map(params.of, layout.chunks)) / pp
    # The first rank holds the hash layers and one more for each further chunk, like it or not.
    forced = params.embedding + (spec.num_hash_layers + vp - 1) * max(params.layers)
    assert params.worst(layout) <= max(mean + 1.25 * max(params.layers), forced)


@pytest.mark.parametrize("case", PUBLISHED, ids=lambda c: f"{c[0]}-pp{c[1]}-vp{c[2]}")
def test_published_layouts_are_matched_or_beaten(case: tuple[str, int, int]) -> None:
    name, pp, vp = case
    spec = VARIANTS[name].spec
    theirs, ours = parse_layout(PUBLISHED[case], pp, spec), solve(spec, pp, vp)
    assert parameter_costs(spec).worst(ours) <= parameter_costs(spec).worst(theirs)


@settings(deadline=None, max_examples=60)
@given(st.integers(3, 20), st.integers(0, 3), st.integers(0, 2), st.integers(1, 6), st.integers(1, 3), st.data())
def test_any_model_is_cut_by_the_rules(
    layers: int, hashed: int, draft: int, pp: int, vp: int, data: st.DataObject
) -> None:
    ratios = data.draw(st.lists(st.sampled_from([0, 4, 128]), min_size=layers + draft, max_size=layers + draft))
    spec = replace_spec(
        FLASH,
        num_hidden_layers=layers,
        num_hash_layers=hashed,
        num_nextn_predict_layers=draft,
        compress_ratios=tuple(ratios),
    )
    if pp * vp > layers - max(hashed, 1) + 1:
        with pytest.raises(BridgeError, match="chunks, at most"):
            solve(spec, pp, vp)
        return
    layout = solve(spec, pp, vp)
    assert broken_rules(layout, spec) == []
    if vp == 1:  # the optimum: no way of cutting has a smaller largest rank
        size = parameter_costs(spec)
        assert size.worst(layout) <= _exhaustive(spec, pp) * (1 + 1e-9)


def _exhaustive(spec: ModelSpec, pp: int) -> float:
    """The smallest largest rank over every way of cutting."""
    size, layers, first = parameter_costs(spec), spec.num_hidden_layers, max(spec.num_hash_layers, 1)
    best = float("inf")
    for inner in itertools.combinations(range(first, layers), pp - 1):
        cuts = (0, *inner, layers)
        kinds = [["E"] * (n == 0) + ["t"] * (b - a) for n, (a, b) in enumerate(itertools.pairwise(cuts))]
        kinds[-1] += ["m"] * spec.mtp_layers + ["L"]
        best = min(best, size.worst(layout_of(kinds, pp, spec)))
        if pp > 4:
            break
    return best if pp <= 4 else float("inf")


@pytest.mark.parametrize(
    ("text", "pp", "why"),
    [
        ("Et*2|t*41mL", 2, "the 3 hash layers stand with the embedding, and its chunk has only 2"),
        ("Et*20|t*23|mL", 3, "the last decoder layer stands with the loss"),
        ("Et*20|t*22m|tL", 3, "MTP stands with the last decoder layer"),
        ("Et*20|t*22mL", 2, "it has 42 decoder layers, the model 43"),
        ("Et*20|t*23L", 2, "it has 0 MTP layers, the model 1"),
        ("t*20|Et*23mL", 2, "the embedding opens the first chunk"),
        ("Et*20L|t*23m", 2, "the loss closes the last chunk"),
        ("Et*20||t*23mL", 3, "chunk 1 is empty"),
        ("Et*20|t*23mL", 3, "do not divide over 3"),
        ("Et*20|t*23Lm", 2, "expected the order"),
        ("Et*20|x*23mL", 2, "'x' is no part of one"),
        ("Et*9999|(t*9999|)*9999mL", 2, "unrolls to more than"),
    ],
)
def test_a_broken_rule_is_named(text: str, pp: int, why: str) -> None:
    with pytest.raises(BridgeError) as caught:
        parse_layout(text, pp, FLASH)
    assert why in str(caught.value)


def test_a_refusal_offers_a_layout_that_works() -> None:
    with pytest.raises(BridgeError, match=r"A layout that keeps them: (\S+)") as caught:
        parse_layout("Et*2|t*41mL", 2, FLASH)
    offered = str(caught.value).rsplit(" ", 1)[1]
    assert broken_rules(parse_layout(offered, 2, FLASH), FLASH) == []


def test_trap_27_hash_layers_never_leave_the_first_chunk() -> None:
    spec: ModelSpec = replace_spec(FLASH, num_hash_layers=20)
    for pp in (2, 4, 8):
        assert solve(spec, pp).chunks[0].stop >= 20


def test_megatron_reads_the_written_form() -> None:
    layer_layout = pytest.importorskip("megatron.core.transformer.pipeline_parallel_layer_layout")
    for spec, pp, vp in ((FLASH, 4, 1), (FLASH, 4, 2), (PRO, 8, 2)):
        layout = solve(spec, pp, vp)
        theirs = layer_layout.PipelineParallelLayerLayout(str(layout), pp)
        theirs.validate_layer_layout(num_layers=spec.num_hidden_layers, mtp_num_layers=spec.mtp_layers)
        for rank in range(pp):
            held = [[kind.name for kind in chunk] for chunk in theirs.layout[rank]]
            assert held == layout.to_list()[rank::pp]
