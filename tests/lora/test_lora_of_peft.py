"""Adapters that peft itself makes, in every manner that it offers: a merge equals peft's own, bit for bit but for sums
that lie between two bf16 values."""

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from lora_tools import spec_of
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from dsv4_bridge import make_toy
from dsv4_bridge.cli.app import app
from dsv4_bridge.convert.merge import merge
from dsv4_bridge.errors import BridgeError
from dsv4_bridge.lora.peft import CONFIG, WEIGHTS, export_peft, import_peft, open_adapters
from dsv4_bridge.spec.spec import ModelSpec, replace_spec
from dsv4_bridge.store.hf import open_hf

pytestmark = pytest.mark.hf

TUTORIAL = ["q_a_proj", "q_b_proj", "kv_proj", "o_b_proj"]
LAST = "model.layers.2.self_attn.kv_proj"
SELF = ["self_attn.q_a_proj", "self_attn.q_b_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
PATTERNS: dict[str, Any] = {
    "rank_pattern": {
        "self_attn.q_b_proj": 6,
        r"model\.layers\.[12]\.self_attn\.q_a_proj": 2,
        "q_a_proj": 5,
        "layers.0.mlp.experts.down_proj": 3,
        "o_a_proj.weight": 2,
    },
    "alpha_pattern": {"layers.1.self_attn.q_b_proj": 20, "^model.layers.2.*": 3, "gate_up_proj": 7},
}
KINDS: dict[str, dict[str, Any]] = {
    "short names": {"target_modules": TUTORIAL},
    "all-linear": {"target_modules": "all-linear"},
    "gate_proj of three parents": {"target_modules": ["gate_proj", "scorer.weights_proj"]},
    "regex": {"target_modules": r".*\.self_attn\.(q_[ab]|kv)_proj"},
    "patterns": {"target_modules": SELF, "target_parameters": [*EXPERTS, "o_a_proj.weight"], **PATTERNS},
    "patterns, rslora": {"target_modules": [*SELF, "o_a_proj"], "use_rslora": True, **PATTERNS},
    "dora": {"target_modules": [*TUTORIAL, "o_a_proj"], "use_dora": True, "alpha_pattern": {"kv_proj": 2}},
    "o_a_proj, a module": {"target_modules": ["o_a_proj"]},
    "o_a_proj, a parameter": {"target_parameters": ["o_a_proj.weight"]},
    "some layers": {"target_modules": TUTORIAL, "layers_to_transform": [0, 2]},
    "one layer": {"target_modules": TUTORIAL, "layers_to_transform": 1, "layers_pattern": "layers"},
    "without some": {"target_modules": TUTORIAL, "exclude_modules": ["indexer.q_b_proj", LAST]},
    "without a regex": {"target_modules": TUTORIAL, "exclude_modules": r".*compressor.*"},
    "whole head": {"target_modules": SELF, "modules_to_save": ["lm_head", "embed_tokens"]},
    "adapted head": {"target_modules": [*SELF, "lm_head"]},
}  # fmt: skip


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    """Every kind of attention."""
    return replace_spec(spec_of(), num_hidden_layers=3, compress_ratios=(0, 4, 128, 0))


@pytest.fixture(scope="module")
def base(spec: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy(tmp_path_factory.mktemp("peft") / "toy", "Flash-BF16", 3, spec=spec)


@pytest.fixture(scope="module")
def weights(base: Path) -> dict[str, torch.Tensor]:
    """What transformers makes of the base."""
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()


@pytest.fixture(scope="module")
def plain(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that nothing is odd about."""
    folder = tmp_path_factory.mktemp("plain") / "adapter"
    of_peft(base, folder, target_modules=SELF)
    return folder


def of_peft(base: Path, out: Path, **settings: Any) -> Any:
    """peft's model with adapters whose every value is random, saved into `out`."""
    torch.manual_seed(5)
    config = LoraConfig(**{"r": 4, "lora_alpha": 6} | settings)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "magnitude" in name:
                value.mul_(1 + 0.3 * torch.rand_like(value))
            elif "lora_" in name or "modules_to_save" in name:
                value.copy_(torch.randn_like(value) * 0.05)
    model.save_pretrained(out, save_embedding_layers="auto")
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_is_pefts_own(kind: str, base: Path, weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    model = of_peft(base, tmp_path / "adapter", **KINDS[kind])
    report = merge(base, tmp_path / "adapter", tmp_path / "out")
    theirs = model.merge_and_unload().state_dict()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    assert theirs.keys() == ours.keys() == weights.keys()
    changed = {name for name, wanted in theirs.items() if not torch.equal(weights[name], wanted)}
    for name, wanted in theirs.items():
        rounded = wanted.bfloat16().float() if name in changed else wanted
        worst = float((ours[name] - wanted).abs().max())
        assert worst <= 2**-7 * float(wanted.abs().max()), name
        assert float((ours[name] != rounded).float().mean()) <= 1e-3, name
    items = {item.name: item for item in open_hf(base).plan.items}
    assert changed and report.total.delta > 0 and not report.dry_run
    for tensor in report.tensors:
        row, layer = items[tensor.name].row, items[tensor.name].block
        name = row.transformers if layer.kind == "model" else f"model.{layer.prefix}{row.transformers}"
        assert name in changed or tensor.delta == 0, name


def test_what_training_takes_is_what_it_has_a_place_for(base: Path, spec: ModelSpec, tmp_path: Path) -> None:
    """Names are told apart by where they are: the compressor's kv_proj is not attention's."""
    for kind, words in (
        ("short names", r"compressor.*is of attn\.(compressor|indexer).*`dsv4 merge` puts it into the base"),
        ("all-linear", r"is of attn\.(compressor|indexer)"),
        ("whole head", r"modules_to_save names lm_head, a whole weight.*`dsv4 merge`"),
        ("adapted head", r"lm_head.* is (of head|a whole weight), and training"),
    ):
        of_peft(base, tmp_path / kind, **KINDS[kind])
        with pytest.raises(BridgeError, match=words):
            import_peft(tmp_path / kind, spec)
        assert open_adapters(tmp_path / kind, spec, merging=True).values
    of_peft(base, tmp_path / "without", **KINDS["without a regex"])
    found = import_peft(tmp_path / "without", spec)
    assert set(found.values) == {f"layers.{i}.attn.{w}" for i in range(3) for w in ("wq_a", "wq_b", "wkv", "wo_b")}


def test_ranks_of_their_own_go_out_as_they_came(base: Path, spec: ModelSpec, tmp_path: Path) -> None:
    of_peft(base, tmp_path / "a", **KINDS["patterns"])
    found = import_peft(tmp_path / "a", spec)
    assert found.rank("layers.0.attn.wq_b") == 6 and found.scale("layers.1.attn.wq_b") == pytest.approx(20 / 6)
    assert (found.rank("layers.0.attn.wq_a"), found.rank("layers.1.attn.wq_a")) == (5, 2)
    assert found.rank("layers.0.ffn.experts.2.w2") == 3 and found.rank("layers.1.ffn.experts.2.w2") == 4
    assert found.alpha("layers.0.ffn.experts.0.w1") == 7
    again = import_peft(export_peft(found, spec, tmp_path / "b"), spec)
    assert again.values.keys() == found.values.keys()
    for name, one in again.values.items():
        assert (again.rank(name), again.alpha(name)) == (found.rank(name), found.alpha(name))
        assert all(torch.equal(x, y) for x, y in zip(one[:2], found.values[name][:2], strict=True))
    merge(base, tmp_path / "a", tmp_path / "one")
    merge(base, tmp_path / "b", tmp_path / "two")
    for file in (tmp_path / "one").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


# ---------------------------------------------------------------- a configuration and its file have to agree


def edited(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | changes))

    return change


def without(part: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        state = load_file(folder / WEIGHTS)
        save_file({n: t for n, t in state.items() if part not in n}, folder / WEIGHTS)

    return change


def with_two_names(folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    name = "base_model.model.model.layers.0.self_attn.q_a_proj.lora_A.weight"
    save_file(state | {"base_model.model.layers.0.attn.wq_a.lora_A.weight": state[name].clone()}, folder / WEIGHTS)


CATASTROPHE = "(" + "a|" * 20 + "(([a-z_.0-9]+)+)+)+x"
BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "not named": (edited(target_modules=["self_attn.q_a_proj"]), r"adapters of 3 that it does not name .*q_b_proj"),
    "excluded": (edited(exclude_modules=["layers.1.self_attn.q_b_proj"]), "out of exclude_modules"),
    "no tensors of a name": (edited(target_modules=[*SELF, "o_b_proj"]), "names o_b_proj, and the file has no tensors"),
    "a layer lost": (without("layers.1.self_attn.q_b"), r"names 1 that the file has no tensors of .*layers\.1"),
    "other layers": (edited(layers_to_transform=[0]), "adapters of 4 that it does not name"),
    "layers and regex": (edited(layers_to_transform=[0], target_modules=".*q_a_proj"), "layers_to_transform beside"),
    "hangs": (edited(target_modules=CATASTROPHE), "takes more than .* s or 512 MB to match"),
    "hangs too": (edited(rank_pattern={"self_attn.q_a_proj": 4, CATASTROPHE: 4}), "takes more than .* to match"),
    "no regex": (edited(target_modules="(self_attn"), "is no regular expression"),
    "nested": (edited(target_modules="(" * 2000 + ")" * 2000), "is no regular expression"),
    "too long": (edited(alpha_pattern={"a" * 5000: 3}), "a pattern of 5000 characters"),
    "of no type": (edited(target_modules=[1]), "target_modules is .1., expected a list"),
    "pattern of text": (edited(rank_pattern={"q_a_proj": "4"}), r"rank_pattern of 'q_a_proj' is '4', expected a whole"),
    "pattern, no object": (edited(rank_pattern=[4]), "rank_pattern is .4., expected an object"),
    "rank of a pattern": (edited(rank_pattern={"q_a_proj": 5}), r"\[4, 256\], expected \[5, 256\]: rank_pattern is"),
    "huge rank": (edited(r=1 << 20), "is .128, 256. and its adapter of rank 1048576"),
    "rank true": (edited(r=True), "r is True, expected a whole number"),
    "rank 0": (edited(r=0), "r is 0"),
    "alpha nan": (edited(lora_alpha=float("nan")), "lora_alpha is nan, expected a number from 0"),
    "alpha huge": (edited(lora_alpha=10**400), "lora_alpha is a huge integer, expected a number from 0"),
    "alpha true": (edited(lora_alpha=True), "lora_alpha is True"),
    "rslora text": (edited(use_rslora="no"), "use_rslora is 'no', expected true or false"),
    "layers of text": (edited(layers_to_transform=["0"]), "layers_to_transform is .'0'., expected numbers"),
    "layers pattern": (edited(layers_to_transform=[0], layers_pattern="(a+)+"), "layers_pattern is"),
    "saved norm": (edited(modules_to_save=["norm"]), "modules_to_save names 'norm'"),
    "saved lost": (edited(modules_to_save=["lm_head"]), "lacks base_model.model.lm_head.weight"),
    "tokens": (edited(trainable_token_indices=[1]), "trainable_token_indices is .1."),
    "lora_bias": (edited(lora_bias=True), "lora_bias is True"),
    "all biases": (edited(bias="all"), "bias is 'all'.*merge_and_unload"),
    "pissa": (edited(init_lora_weights="pissa_niter_4"), "changes the base; convert it to plain LoRA"),
    "two names": (with_two_names, "are one tensor"),
    "nothing": (without("lora_"), "there is no adapter in it"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_refused(name: str, base: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv4_bridge.lora.peft_patterns.SECONDS", 2.0)
    change, words = BAD[name]
    copytree(plain, tmp_path / "a")
    change(tmp_path / "a")
    with pytest.raises(BridgeError, match=words):
        merge(base, tmp_path / "a", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_by_name_what_has_no_place(base: Path, tmp_path: Path) -> None:
    of_peft(base, tmp_path / "a", target_modules=[*SELF, "embed_tokens"])
    with pytest.raises(BridgeError, match=r"lora_embedding_A.* an embedding's adapter has no place here"):
        merge(base, tmp_path / "a", tmp_path / "out")
    of_peft(base, tmp_path / "b", target_modules=SELF, target_parameters=["mlp.gate.weight"])
    with pytest.raises(BridgeError, match=r"mlp\.gate\.lora_A.*may carry one"):
        merge(base, tmp_path / "b", tmp_path / "out")


# ---------------------------------------------------------------- the command


def _run(*args: Any) -> Any:
    return CliRunner().invoke(app, [str(a) for a in args])


def test_a_dry_run_says_what_would_be_merged(base: Path, tmp_path: Path) -> None:
    of_peft(base, tmp_path / "a", **KINDS["patterns"])
    dry = _run("merge", base, tmp_path / "a", tmp_path / "out", "--dry-run", "--json")
    assert dry.exit_code == 0 and not (tmp_path / "out").exists()
    wet = _run("merge", base, tmp_path / "a", tmp_path / "out", "--json")
    said, done = json.loads(dry.stdout), json.loads(wet.stdout)
    assert said.pop("dry_run") and not done.pop("dry_run") and said == done
    ranks = {t["name"]: (t["rank"], t["scale"]) for t in said["tensors"]}
    assert ranks["layers.1.attn.wq_b.weight"] == (6, pytest.approx(20 / 6))
    assert ranks["layers.1.attn.wq_a.weight"] == (2, 3)
    shown = _run("merge", base, tmp_path / "a", tmp_path / "out", "--dry-run").stdout
    assert "nothing written" in " ".join(shown.split()) and "2 to 5" in shown


def test_lossy_only_when_asked(base: Path, plain: Path, tmp_path: Path) -> None:
    refused = _run("merge", base, plain, tmp_path / "out", "--encoding", "fp8")
    assert isinstance(refused.exception, BridgeError) and "--allow-lossy accepts that" in str(refused.exception)
    done = _run("merge", base, plain, tmp_path / "out", "--encoding", "fp8", "--allow-lossy", "--json")
    facts = json.loads(done.stdout)
    assert facts["rounded"]["attn.wkv"] > 0 and facts["rounded"]["ffn.experts.w1"] > 0
    draft = 128 * 256  # the MTP block's, which has no adapter
    assert 0 < facts["rounded"]["attn.wq_a"] <= draft and "values rounded where no adapter is" in done.stderr


def test_adapters_that_were_never_trained(base: Path, tmp_path: Path) -> None:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), LoraConfig(target_modules=SELF)
    )
    model.save_pretrained(tmp_path / "a")
    assert merge(base, tmp_path / "a", tmp_path / "out").warnings == (
        "the adapters change nothing: B is zero, as before any training",
    )


def test_adapters_in_the_way(plain: Path, spec: ModelSpec, tmp_path: Path) -> None:
    found = import_peft(plain, spec)
    export_peft(found, spec, tmp_path / "b")
    with pytest.raises(BridgeError, match="not an empty folder; choose another, or --overwrite"):
        export_peft(found, spec, tmp_path / "b")
    before = (tmp_path / "b" / WEIGHTS).read_bytes()
    (tmp_path / "b" / WEIGHTS).write_bytes(b"")
    export_peft(found, spec, tmp_path / "b", overwrite=True)
    assert (tmp_path / "b" / WEIGHTS).read_bytes() == before
    (tmp_path / "b" / "mine").touch()
    with pytest.raises(BridgeError, match="this one holds mine too"):
        export_peft(found, spec, tmp_path / "b", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b"]


def test_a_whole_model_is_no_adapter(base: Path, tmp_path: Path) -> None:
    with pytest.raises(BridgeError, match="a whole model, and adapters are wanted"):
        merge(base, base, tmp_path / "out")
