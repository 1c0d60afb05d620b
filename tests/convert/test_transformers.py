"""transformers as the other reader and writer: it loads what we write, and we take what it saves.

Its values are the independent ones here: it decodes FP8 and MXFP4 with code of its own, merges the
experts itself and renames by its own rules. It reads FP8 tensors rightly only where both dimensions
are at most 128 or multiples of 128 (others it decodes wrongly without saying so), as all released
ones are; the toys here are like that. It drops `mtp.*` on load, silently: those tensors are not
among the ones compared, and a folder it saves has none.
"""

import json
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packaging.version import Version

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers import DeepseekV4Config, DeepseekV4ForCausalLM, DeepseekV4Model  # noqa: E402
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer  # noqa: E402

from conftest import same_files  # noqa: E402
from dsv4_bridge import BridgeError, export_hf, import_hf, inspect, make_toy, repack  # noqa: E402
from dsv4_bridge.spec.plan import expand  # noqa: E402
from dsv4_bridge.spec.spec import replace_spec  # noqa: E402
from dsv4_bridge.spec.variants import BF16, VARIANTS, tiny  # noqa: E402
from dsv4_bridge.store.hf import disk_name, open_hf  # noqa: E402
from dsv4_bridge.store.safetensors import SafetensorsFolder  # noqa: E402
from dsv4_bridge.store.values import HFValues, Scratch  # noqa: E402

pytestmark = pytest.mark.hf

TOYS = ("Flash", "Flash-Base", "Flash-FP8", "Flash-BF16", "Pro", "Flash-0731")
FOLDERS = ("source", "fp8", "bf16", "repacked-fp8", "repacked-bf16")
SCHEMES = ("saved", "modules", "resaved")
# The one thing it says of a quantised folder on a machine without an accelerator.
EXPECTED_LOG = re.compile("Using FP8 quantized models requires a GPU")
Tensors = dict[str, Any]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def small_toy(out: Path, variant: str, seed: int, payload: str = "natural") -> Path:
    spec = replace_spec(tiny(VARIANTS[variant]), n_routed_experts=4)
    return make_toy(out, variant, seed, spec=spec, payload=payload)


def load(folder: Path, kind: Any = DeepseekV4ForCausalLM, **options: Any) -> Any:
    """from_pretrained; nothing may be missing, left over, mismatched, or worth a warning."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("transformers").addHandler(handler)
    try:
        model, info = kind.from_pretrained(folder, output_loading_info=True, **options)
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert not any(info.values()), info
    assert [s for s in said if not EXPECTED_LOG.search(s)] == []
    return model


def decoded(folder: Path) -> Tensors:
    """Every value of a folder but `mtp.*`, decoded by this package, by its name in transformers."""
    checkpoint = open_hf(folder)
    values, scratch = HFValues(checkpoint), Scratch()
    found: Tensors = {}
    merged: dict[str, list[Any]] = {}
    for item in checkpoint.plan.items:
        if item.block.kind not in ("model", "layer"):
            continue
        raw = np.concatenate([s.copy() for s in values.stripes(item, 0, item.shape[0], scratch)])
        tensor = torch.from_numpy(raw.view("<i2")).view(torch.bfloat16) if raw.dtype == "<u2" else torch.from_numpy(raw)
        name, stack = disk_name(item, "modules", checkpoint.spec)
        if stack is None:
            found[name] = tensor
        else:
            parts = merged.setdefault(name, [tensor] * stack[1])
            parts[stack[0]] = tensor
    for name, parts in merged.items():
        found[name] = torch.stack(parts).reshape(checkpoint.spec.n_routed_experts, -1, parts[0].shape[-1])
    checkpoint.close()
    return found


def assert_same(ours: Tensors, theirs: Tensors) -> None:
    """Equal names, shapes and bits; bf16 against float32 counts as equal where widening is all it takes."""
    assert set(ours) == set(theirs)
    for name, mine in ours.items():
        other = theirs[name].detach()
        if {mine.dtype, other.dtype} == {torch.bfloat16, torch.float32}:
            mine, other = mine.float(), other.float()  # noqa: PLW2901
        assert (mine.dtype, mine.shape) == (other.dtype, other.shape), name
        raw = {8: torch.int64, 4: torch.int32, 2: torch.int16}[mine.element_size()]
        assert torch.equal(mine.contiguous().view(raw), other.contiguous().view(raw)), name


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def stored(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor on disk: name -> dtype, shape, bytes."""
    opened = SafetensorsFolder(folder)
    found = {n: (i.dtype, i.shape, opened.read(n).tobytes()) for n, i in opened.tensors.items()}
    opened.close()
    return found


# ---------------------------------------------------------------- what we write


@dataclass
class Family:
    """A toy and everything that `export` and `repack` make of it."""

    name: str
    toy: Path
    folders: dict[str, Path]
    _read: dict[Path, tuple[Any, Tensors]] = field(default_factory=dict)

    @property
    def reference(self) -> Any:
        """The toy, loaded as it is."""
        return self.read(self.toy)[0]

    @property
    def values(self) -> Tensors:
        """The toy's, decoded by this package."""
        return self.read(self.toy)[1]

    def read(self, folder: Path) -> tuple[Any, Tensors]:
        """A folder as transformers loads and as this package decodes it; folders of the same files are read once."""
        first = next((other for other in self._read if same_files(other, folder) == []), folder)
        if first not in self._read:
            self._read[first] = load(first), decoded(first)
        return self._read[first]


@pytest.fixture(scope="module", params=TOYS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    base = tmp_path_factory.mktemp(request.param)
    toy, megatron = small_toy(base / "toy", request.param, 11), base / "megatron"
    # FP8 can hold what was FP8 or MXFP4 before; a BF16 release it has to round.
    lossy = request.param == "Flash-BF16"
    folders = {name: base / name for name in FOLDERS}
    import_hf(toy, megatron)
    export_hf(megatron, folders["source"], toy)
    export_hf(megatron, folders["fp8"], toy, "fp8", allow_lossy=lossy)
    export_hf(megatron, folders["bf16"], None, "bf16")
    repack(toy, folders["repacked-fp8"], "fp8", allow_lossy=lossy)
    repack(toy, folders["repacked-bf16"], "bf16")
    return Family(request.param, toy, folders)


@pytest.mark.parametrize("folder", FOLDERS)
def test_what_we_write_loads_with_equal_values(family: Family, folder: str) -> None:
    model, ours = family.read(family.folders[folder])
    theirs = model.state_dict()
    assert {n for n, _ in model.named_parameters()} <= set(theirs)
    assert_same(ours, theirs)
    if not (family.name == "Flash-BF16" and folder.endswith("fp8")):
        assert_same(family.values, theirs)
    # the rest is computed from config.json alone: rotary frequencies
    computed = {n: b for n, b in model.named_buffers() if n not in theirs}
    assert any("inv_freq" in n for n in computed)
    assert_same({n: b for n, b in family.reference.named_buffers() if n not in theirs}, computed)
    # ids of experts arrive as integers, never through a float
    arrived, table = model.model.layers[0].mlp.gate.tid2eid, stored(family.toy)["layers.0.ffn.gate.tid2eid"]
    assert arrived.dtype == torch.int64 and table[0] == "I64"
    assert arrived.numpy().tobytes() == table[2]


def test_trap53_a_bf16_folder_says_nothing_of_quantisation(family: Family) -> None:
    for folder in ("bf16", "repacked-bf16"):
        config = config_of(family.folders[folder])
        assert not {"quantization_config", "expert_dtype"} & set(config)
        assert config["torch_dtype"] == "bfloat16"
    for folder in ("fp8", "repacked-fp8"):
        config = config_of(family.folders[folder])
        assert config["quantization_config"]["quant_method"] == "fp8" and config["expert_dtype"] == "fp8"


@pytest.mark.parametrize("variant", ["Flash", "Flash-Base"])
def test_extreme_codes_and_scales_decode_alike(variant: str, tmp_path: Path) -> None:
    toy = small_toy(tmp_path / "toy", variant, 5, payload="extreme")
    assert_same(decoded(toy), load(toy).state_dict())
    # Base's float32 scales are no powers of two: one rounding, here and there.
    repack(toy, tmp_path / "bf16", "bf16", allow_lossy=variant == "Flash-Base")
    assert_same(decoded(toy), load(tmp_path / "bf16").state_dict())


def test_a_loaded_model_computes_the_same_from_every_folder(tmp_path: Path) -> None:
    toy = small_toy(tmp_path / "toy", "Flash", 3)
    repack(toy, tmp_path / "fp8", "fp8")
    repack(toy, tmp_path / "bf16", "bf16")
    tokens = torch.arange(300)[None] % 512
    with torch.no_grad():
        out = [load(f).float()(tokens, use_cache=False).logits for f in (toy, tmp_path / "fp8", tmp_path / "bf16")]
    assert out[0].isfinite().all()
    assert torch.equal(out[0], out[1]) and torch.equal(out[0], out[2])


# ---------------------------------------------------------------- what it saves


@pytest.fixture(scope="module")
def origins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """What a model may have been loaded from before it was saved."""
    base = tmp_path_factory.mktemp("origins")
    fp4 = small_toy(base / "fp4", "Flash", 21)
    repack(fp4, base / "bf16", "bf16")
    return {
        "plain": (base / "bf16", {}),
        "float32": (base / "bf16", {"dtype": torch.float32}),
        "fp4": (fp4, {}),
        "fp8-f32-scales": (small_toy(base / "base", "Flash-Base", 22), {}),
    }


def save(model: Any, out: Path, scheme: str, **options: Any) -> Any:
    """save_pretrained so that the folder has the names of `scheme`; the model it then holds."""
    if scheme == "saved":
        # After decoding FP8 without an accelerator the default save raises until these are gone.
        rules = getattr(model, "_weight_conversions", None) or ()
        if any("Fp8" in type(step).__name__ for rule in rules for step in getattr(rule, "operations", ())):
            del model._weight_conversions
        model.save_pretrained(out, **options)
        return model
    model.save_pretrained(out, save_original_format=False, **options)
    if scheme == "resaved":
        model = load(out, dtype=model.dtype)
        for path in out.iterdir():
            path.unlink()
        model.save_pretrained(out, **options)
    return model


def released_names(folder: Path) -> set[str]:
    """Names of a folder without draft blocks, as released."""
    spec = open_hf(folder).spec.without_draft()
    return {s.name for s in expand(spec).stored(BF16)}


def round_trip(folder: Path, tmp_path: Path, **options: bool) -> Path:
    """Import a folder and export it like itself; the outcome is a released one in every respect."""
    import_hf(folder, tmp_path / "megatron", **options)
    export_hf(tmp_path / "megatron", tmp_path / "out", folder, **options)
    out, config = tmp_path / "out", config_of(tmp_path / "out")
    found = inspect(out)
    assert found.sound and found.naming == "released" and found.draft == "none"
    assert len(config["compress_ratios"]) == config["num_hidden_layers"]
    assert config["num_nextn_predict_layers"] == 0
    assert not {"layer_types", "mlp_layer_types", "rope_parameters", "compress_rates", "dtype"} & set(config)
    return out


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("origin", ["plain", "float32", "fp4", "fp8-f32-scales"])
def test_a_saved_folder_comes_back_in_released_names(
    origin: str, scheme: str, origins: dict[str, Any], tmp_path: Path
) -> None:
    source, options = origins[origin]
    model = save(load(source, **options), tmp_path / "saved", scheme)
    assert inspect(tmp_path / "saved").naming == scheme
    out = round_trip(tmp_path / "saved", tmp_path)
    assert set(stored(out)) == released_names(source)
    assert_same(decoded(out), model.state_dict())
    assert_same(decoded(out), decoded(source))
    config, original = config_of(out), config_of(source)
    original["compress_ratios"] = original["compress_ratios"][: original["num_hidden_layers"]]
    differ = {k for k in config.keys() | original.keys() if config.get(k) != original.get(k)}
    assert differ <= {"num_nextn_predict_layers", "quantization_config", "expert_dtype"}
    assert not {"quantization_config", "expert_dtype"} & set(config)
    assert_same(load(out).state_dict(), model.state_dict())


def test_a_sharded_save_and_its_generation_config_come_along(origins: dict[str, Any], tmp_path: Path) -> None:
    model = save(load(origins["plain"][0]), tmp_path / "saved", "saved", max_shard_size="1MB")
    assert len(list((tmp_path / "saved").glob("model-*-of-*.safetensors"))) > 2
    out = round_trip(tmp_path / "saved", tmp_path)
    assert_same(decoded(out), model.state_dict())
    saved = (tmp_path / "saved" / "generation_config.json").read_bytes()
    assert (out / "generation_config.json").read_bytes() == saved


def test_a_model_cast_to_bf16_by_hand_is_taken_and_reported(origins: dict[str, Any], tmp_path: Path) -> None:
    # `.to(bfloat16)` also casts what from_pretrained keeps in float32.
    model = load(origins["plain"][0]).to(torch.bfloat16)
    save(model, tmp_path / "saved", "modules")
    assert any("already rounded" in n for n in inspect(tmp_path / "saved").notes)
    assert_same(decoded(round_trip(tmp_path / "saved", tmp_path)), model.state_dict())


@pytest.mark.parametrize("scheme", ["saved", "modules"])
def test_float32_weights_that_bf16_cannot_hold_are_refused_by_name(
    scheme: str, origins: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = DeepseekV4ForCausalLM(DeepseekV4Config.from_pretrained(origins["plain"][0]))
    for name, buffer in model.named_buffers():
        if name.endswith("tid2eid"):
            buffer.copy_(torch.randint(0, 4, buffer.shape))
    save(model, tmp_path / "saved", scheme)
    with pytest.raises(BridgeError, match=r"writing embed\.weight as bf16 would round .*allow-lossy"):
        import_hf(tmp_path / "saved", tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    report = import_hf(tmp_path / "saved", tmp_path / "megatron", allow_lossy=True)
    assert report.rounded["ffn.experts.w1"] > 0 and "ffn.gate.bias" not in report.rounded
    export_hf(tmp_path / "megatron", tmp_path / "out", tmp_path / "saved")
    ours, theirs = decoded(tmp_path / "out"), model.state_dict()
    assert_same(ours, {n: t.to(ours[n].dtype) for n, t in theirs.items()})


def test_a_model_that_only_transformers_ever_saw_becomes_a_release(tmp_path: Path) -> None:
    # built from its own config class, with none of the released keys
    config = DeepseekV4Config(
        hidden_size=256,
        num_hidden_layers=3,
        layer_types=[f"{kind}_attention" for kind in ("sliding", "compressed_sparse", "heavily_compressed")],
        mlp_layer_types=["hash_moe", "moe", "moe"],
        num_attention_heads=4,
        head_dim=64,
        partial_rotary_factor=0.25,
        q_lora_rank=128,
        o_lora_rank=32,
        o_groups=2,
        moe_intermediate_size=128,
        n_routed_experts=4,
        num_experts_per_tok=2,
        index_n_heads=4,
        index_head_dim=32,
        index_topk=8,
        vocab_size=512,
        rope_scaling=YARN,
    )
    torch.manual_seed(1)
    model = DeepseekV4ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "saved")
    out = round_trip(tmp_path / "saved", tmp_path)
    assert config_of(out)["compress_ratios"] == [0, 4, 128]
    assert (config_of(out)["num_hash_layers"], config_of(out)["qk_rope_head_dim"]) == (1, 16)
    assert_same(decoded(out), model.state_dict())
    assert_same(load(out).state_dict(), model.state_dict())


YARN = {
    "type": "yarn",
    "factor": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "original_max_position_embeddings": 65536,
}


def test_a_model_saved_without_its_head_is_refused(origins: dict[str, Any], tmp_path: Path) -> None:
    model = DeepseekV4Model.from_pretrained(origins["plain"][0])
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(BridgeError, match=r"missing\s+head: 1 \(head\.weight\)"):
        import_hf(tmp_path / "saved", tmp_path / "megatron")


# ---------------------------------------------------------------- what it saves with an accelerator


@pytest.fixture
def quantised_modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], Any]]:
    """Load with FP8 modules kept, as on a machine with an accelerator, though nothing can be computed."""
    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda self, *args, **kwargs: None)
    yield load


@pytest.mark.parametrize("scheme", ["saved", "modules"])
@pytest.mark.parametrize("variant", ["Flash", "Flash-FP8", "Flash-Base"])
def test_a_quantised_save_comes_back_code_for_code(
    variant: str, scheme: str, quantised_modules: Callable[[Path], Any], tmp_path: Path
) -> None:
    if scheme == "saved" and Version(transformers.__version__) < Version("5.21"):
        pytest.skip("transformers before 5.21 loses the experts' scales")
    toy = small_toy(tmp_path / "toy", variant, 31)
    quantised_modules(toy).save_pretrained(tmp_path / "saved", save_original_format=scheme == "saved")
    found = inspect(tmp_path / "saved")
    assert found.sound and found.naming == scheme
    # it turns the float32 scales of Base into powers of two, which these are
    as_saved = "fp8" if variant == "Flash-Base" else VARIANTS[variant].encodings["expert"]
    assert found.encodings["expert"] == as_saved
    out = stored(round_trip(tmp_path / "saved", tmp_path))
    original = {n: t for n, t in stored(toy).items() if not n.startswith("mtp.")}
    assert set(out) == set(original)
    differ = {n for n in out if out[n] != original[n]}
    assert differ == ({n for n in out if n.endswith(".scale")} if variant == "Flash-Base" else set())
