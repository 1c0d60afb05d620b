"""Megatron checkpoints under the other naming: the same bytes, read by everything, and back."""

import argparse
import errno
import io
import json
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import yaml
from warm import Warm

from conftest import dsv4, same_files
from dsv4_bridge import BridgeError, Options, export_hf, import_hf, inspect, make_toy, plan, rename, verify
from dsv4_bridge import open as open_checkpoint
from dsv4_bridge.spec.spec import replace_spec
from dsv4_bridge.spec.variants import VARIANTS, tiny
from dsv4_bridge.store.torch_dist.frames import COMMON_STATE_KEY
from dsv4_bridge.store.torch_dist.pickle_tree import read_tree, write_tree
from dsv4_bridge.store.torch_dist.reader import open_torch_dist

ITERATION = "iter_0000000"

# V4.1 has tests of its own: it has one naming, and no shorter form.
V4 = [name for name in VARIANTS if not name.startswith("V4.1")]


@pytest.fixture(scope="module")
def hybrid(toy_flash: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hybrid") / "m"
    import_hf(toy_flash, out, naming="hybrid")
    return out


@pytest.mark.parametrize("payload", ["natural", "extreme"])
@pytest.mark.parametrize("variant", V4)
def test_there_and_back_is_every_byte(variant: str, payload: str, tmp_path: Path) -> None:
    ragged = payload == "extreme"
    spec = replace_spec(tiny(VARIANTS[variant], ragged), n_routed_experts=4)
    source = make_toy(tmp_path / "hf", variant, random.randrange(1 << 20), spec=spec, payload=payload)
    import_hf(source, tmp_path / "gpt")
    import_hf(source, tmp_path / "direct", naming="hybrid")
    rename(tmp_path / "gpt", tmp_path / "hybrid", "hybrid")
    assert same_files(tmp_path / "direct", tmp_path / "hybrid") == []
    rename(tmp_path / "hybrid", tmp_path / "again", "gpt", Options(workers=2))
    assert same_files(tmp_path / "gpt", tmp_path / "again") == []
    export_hf(tmp_path / ("again" if ragged else "hybrid"), tmp_path / "back", source)
    assert same_files(source, tmp_path / "back") == []
    # What the items hold is copied as it is.
    one, other = (sorted((tmp_path / n / ITERATION).glob("*.distcp")) for n in ("gpt", "hybrid"))
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in other]


def test_every_reader_recognises_it(hybrid: Path, toy_flash: Path, toy_megatron: Path, tmp_path: Path) -> None:
    found, before = inspect(hybrid), inspect(toy_megatron)
    assert (found.naming, before.naming) == ("hybrid", "gpt")
    assert found.sound and (found.tensors, found.bytes) == (before.tensors, before.bytes)
    assert verify(toy_flash, hybrid, "values").same and verify(toy_megatron, hybrid, "bytes").same
    with open_checkpoint(hybrid) as a, open_checkpoint(toy_megatron) as b:
        name = "mtp.0.attn.wq_b.weight"
        assert a.values(name).tobytes() == b.values(name).tobytes() and a.variant == b.variant
    export_hf(hybrid, tmp_path / "bf16", None, "bf16")
    assert inspect(tmp_path / "bf16").sound


@pytest.mark.megatron
def test_a_live_model_takes_its_weights(hybrid: Path, toy_megatron: Path) -> None:
    import torch

    from dsv4_bridge import mcore

    one, other = (mcore.from_pretrained(path, dtype=torch.float32) for path in (hybrid, toy_megatron))
    values = other.state_dict()
    assert all(value.equal(values[key]) for key, value in one.state_dict().items() if hasattr(value, "equal"))


def test_the_command_and_its_configuration(toy_megatron: Path, hybrid: Path, tmp_path: Path) -> None:
    done = dsv4("rename", toy_megatron, tmp_path / "out", "--naming", "hybrid", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tensors"] == inspect(toy_megatron).tensors
    assert same_files(hybrid, tmp_path / "out") == []
    model = yaml.safe_load((hybrid / ITERATION / "run_config.yaml").read_text())["model"]
    assert model["_target_"].endswith("DeepSeekV4HybridModelProvider")
    assert model["hybrid_stack_spec"]["_target_"].endswith("hybrid_dsv4_stack_spec")
    assert "transformer_layer_spec" not in model and model["num_layers"] == len(model["hybrid_layer_pattern"])
    shown = dsv4("plan", "Flash", "--naming", "hybrid").stdout
    assert "WEWECEHECEHE" in shown and "CE/WE" in shown
    assert "final_norm" in json.dumps(plan("Pro", naming="hybrid").to_json())


def test_what_cannot_be_renamed_is_refused(toy_megatron: Path, hybrid: Path, toy_flash: Path, tmp_path: Path) -> None:
    with pytest.raises(BridgeError, match="have hybrid names already"):
        rename(hybrid, tmp_path / "out", "hybrid")
    with pytest.raises(BridgeError, match="a Megatron checkpoint is wanted"):
        rename(toy_flash, tmp_path / "out", "hybrid")
    with pytest.raises(BridgeError, match="overlaps the input"):
        rename(toy_megatron, toy_megatron / "inside", "hybrid")
    with pytest.raises(BridgeError, match="not one of gpt, hybrid"):
        rename(toy_megatron, tmp_path / "out", "mamba")  # pyright: ignore[reportArgumentType]
    for misused in (
        lambda: import_hf(toy_flash, tmp_path / "out", naming="main"),  # pyright: ignore[reportArgumentType]
        lambda: plan("Flash", naming="GPT"),  # pyright: ignore[reportArgumentType]
        lambda: make_toy(tmp_path / "out", naming=""),  # pyright: ignore[reportArgumentType]
    ):
        with pytest.raises(BridgeError, match="not one of gpt, hybrid"):
            misused()
    assert not (tmp_path / "out").exists()


def test_a_toy_under_either_naming(tmp_path: Path) -> None:
    import_hf(make_toy(tmp_path / "hf", "Pro", 5), tmp_path / "m", naming="hybrid")
    assert same_files(make_toy(tmp_path / "toy", "Pro", 5, naming="hybrid"), tmp_path / "m") == []
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["hf", "m", "toy"]


def test_every_name_is_listed() -> None:
    done = dsv4("plan", "Flash-Base", "--naming", "hybrid", "--names")
    listed = dict(line.split("\t") for line in done.stdout.splitlines())
    assert listed["layers.2.hc_attn_scale"].split()[0] == "decoder.layers.4.hyper_connection.alpha_pre"
    assert listed["mtp.0.head.weight"] == "-" and len(listed) == len(set(listed))


def test_a_mixture_of_namings_is_told(toy_megatron: Path, tmp_path: Path) -> None:
    """Half of a checkpoint renamed by hand: what the one naming lacks and the other has."""
    from dsv4_bridge.spec.megatron import renamed
    from dsv4_bridge.store.torch_dist.frames import ObjectRecord, TensorRecord, metadata_bytes

    shutil.copytree(toy_megatron, tmp_path / "m")
    with open_torch_dist(toy_megatron) as reader:
        half = {k: renamed(k, "hybrid") if "layers.2." in k else k for k in reader.tensors}
        tensors = [TensorRecord(half[k], t.dtype, t.shape, t.chunks) for k, t in reader.tensors.items()]
        objects = [ObjectRecord(k, o.file, o.offset, o.length) for k, o in reader.objects.items()]
    (tmp_path / "m" / ITERATION / ".metadata").write_bytes(metadata_bytes(tensors, objects))
    with pytest.raises(BridgeError, match="missing"):
        rename(tmp_path / "m", tmp_path / "out", "gpt")
    assert not inspect(tmp_path / "m").sound


# ---------------------------------------------------------------- stored arguments


class Strange:
    """Of a class that nobody has imported when the file is read."""

    def __init__(self, value: object) -> None:
        self.value = value


def stored_args() -> argparse.Namespace:
    shared = ["--x", "--y"]
    return argparse.Namespace(
        experimental_attention_variant="dsv4_hybrid",
        num_layers=3,
        mtp_num_layers=1,
        csa_compress_ratios=[0, 4, 128, 0],
        enable_hyper_connections=True,
        num_residual_streams=4,
        o_groups=2,
        o_lora_rank=64,
        apply_dsa_kernel_fusion=False,
        actual_vocab_size=512,
        moe_n_hash_layers=1,
        lr=3e-4,
        big=1 << 70,
        rest=(shared, shared, {"a": {1, 2}, "b": b"\0\1"}, Strange(shared)),
    )


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("legacy", [True, False])
def test_stored_arguments_are_translated(legacy: bool, protocol: int, toy_megatron: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    folder = tmp_path / "m"
    shutil.copytree(toy_megatron, folder)
    state, buffer = {"args": stored_args(), "iteration": 7, "tensor": torch.arange(5)}, io.BytesIO()
    torch.save(state if legacy else [state], buffer, pickle_protocol=protocol)
    if legacy:
        (folder / ITERATION / "common.pt").write_bytes(buffer.getvalue())
    else:
        _put_common_state(folder / ITERATION, buffer.getvalue())
    rename(folder, tmp_path / "hybrid", "hybrid")
    there = _common_state(tmp_path / "hybrid" / ITERATION, torch, legacy=legacy)
    assert there["iteration"] == 7 and there["tensor"].equal(torch.arange(5))
    args = there["args"]
    assert args.num_layers == 6 and args.hybrid_layer_pattern == "WECEHE" and args.mtp_hybrid_override_pattern == "WE"
    assert args.csa_compress_ratios == [0, 0, 4, 0, 128, 0, 0, 0] and args.dsa_kernel_backend == "none"
    assert args.enable_mhc_connections is True and args.mhc_num_residual_streams == 4
    assert (args.output_projection_groups, args.output_projection_lora_rank) == (2, 64)
    assert (args.hash_moe_vocab_size, args.moe_num_hash_layers, args.lr, args.big) == (512, 1, 3e-4, 1 << 70)
    assert args.rest[0] is args.rest[1] is args.rest[3].value and args.rest[2] == {"a": {1, 2}, "b": b"\0\1"}
    assert not hasattr(args, "o_groups") and not hasattr(args, "enable_hyper_connections")
    rename(tmp_path / "hybrid", tmp_path / "gpt", "gpt")
    back = vars(_common_state(tmp_path / "gpt" / ITERATION, torch, legacy=legacy)["args"])
    assert back.pop("rest")[3].value == ["--x", "--y"]
    before = vars(stored_args())
    before.pop("rest")
    assert back == before


def test_arguments_of_another_model_stay_as_they_are(toy_megatron: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    shutil.copytree(toy_megatron, tmp_path / "m")
    path = tmp_path / "m" / ITERATION / "common.pt"
    torch.save({"args": argparse.Namespace(num_layers=3), "iteration": 1}, path)
    rename(tmp_path / "m", tmp_path / "out", "hybrid")
    assert (tmp_path / "out" / ITERATION / "common.pt").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda data: data[: len(data) // 2], "no usable torch.save item"),
        (lambda data: b"nothing", "no usable torch.save item"),
        (lambda data: data.replace(b"csa_compress_ratios", b"csb_compress_ratios"), "csa_compress_ratios"),
    ],
)
def test_damaged_arguments_are_told(damage: object, match: str, toy_megatron: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    shutil.copytree(toy_megatron, tmp_path / "m")
    buffer = io.BytesIO()
    torch.save({"args": stored_args()}, buffer)
    (tmp_path / "m" / ITERATION / "common.pt").write_bytes(damage(buffer.getvalue()))  # type: ignore[operator]
    with pytest.raises(BridgeError, match=match):
        rename(tmp_path / "m", tmp_path / "out", "hybrid")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_trees_are_written_as_they_were_read(protocol: int) -> None:
    shared = {"k": [1.5, None, True]}
    endless: list[object] = [shared]
    endless.append(endless)
    value = {"a": (1, (), (2,), (3, 4), tuple(range(9))), "s": {1, "x"}, "f": frozenset({2}), "e": endless}
    value |= {"n": stored_args(), "i": [-1, 255, 256, 1 << 16, -(1 << 40), 1 << 300], "t": "ü", "d": shared}
    data = pickle.dumps(value, protocol)
    tree, found = read_tree(data, "here")
    again = pickle.loads(write_tree(tree, found))
    assert found == protocol and again["e"][1] is again["e"] and again["e"][0] is again["d"] == shared
    assert vars(again.pop("n")).keys() == vars(value.pop("n")).keys()  # type: ignore[attr-defined]
    del again["e"], value["e"]
    assert again == value


def test_trees_refuse_what_no_state_does() -> None:
    for data in (b"", b"\x80\x02.", b"\x80\x02(.", pickle.dumps([1])[:-1], b"\x80\x02cos\nsystem\n(S'x'\ntR."):
        with pytest.raises(BridgeError, match="damaged pickle"):
            read_tree(data, "here")
    deep: list[object] = []
    for _ in range(300):
        deep = [deep]
    tree, protocol = read_tree(pickle.dumps(deep), "here")
    with pytest.raises(BridgeError, match="nested"):
        write_tree(tree, protocol)


def _put_common_state(folder: Path, item: bytes) -> None:
    from dsv4_bridge.store.torch_dist.frames import ObjectRecord, TensorRecord, metadata_bytes

    (folder / "__9_0.distcp").write_bytes(item)
    with open_torch_dist(folder) as reader:
        tensors = [TensorRecord(k, t.dtype, t.shape, t.chunks) for k, t in reader.tensors.items()]
        objects = {k: ObjectRecord(k, o.file, o.offset, o.length) for k, o in reader.objects.items()}
    objects[COMMON_STATE_KEY] = ObjectRecord(COMMON_STATE_KEY, "__9_0.distcp", 0, len(item))
    (folder / ".metadata").write_bytes(metadata_bytes(tensors, objects.values()))


def _common_state(folder: Path, torch: object, *, legacy: bool) -> dict:
    if legacy:
        data = (folder / "common.pt").read_bytes()
    else:
        with open_torch_dist(folder) as reader:
            data = reader.item(reader.objects[COMMON_STATE_KEY])
    found = torch.load(io.BytesIO(data), weights_only=False)  # type: ignore[attr-defined]
    return found if legacy else found[0]


# ---------------------------------------------------------------- killed, and training states


def test_killed_it_goes_on_to_the_same_bytes(toy_megatron: Path, hybrid: Path, tmp_path: Path) -> None:
    rng, out = random.Random(4), tmp_path / "out"
    code = """
import os, threading
from dsv4_bridge.convert import journal
enter, left = journal.enter, [{count}]
def counted(*a, **k):
    enter(*a, **k)
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), 9)
journal.enter = counted
"""
    for _ in range(3):
        count = rng.randrange(1, 4)
        words = ["rename", toy_megatron, out, "--naming", "hybrid", "--resume"]
        body = f"{code.format(count=count)}\nfrom dsv4_bridge.cli import main; main()"
        assert Warm("-c", body, *words, out=tmp_path / "said").wait(timeout=120) == -9
        assert not (out / "latest_checkpointed_iteration.txt").exists()
    assert dsv4("rename", toy_megatron, out, "--naming", "hybrid", "--resume").returncode == 0
    assert same_files(hybrid, out) == []


def test_a_folder_that_cannot_be_listed_is_not_left_out(
    toy_megatron: Path, toy_flash: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `Path.rglob` does: an iteration would be copied without its passengers and tokenizer, or without weights."""
    scandir = os.scandir

    def failing(path: str | os.PathLike[str] = ".") -> object:
        if str(path).endswith("/hf"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)
    with pytest.raises(BridgeError, match="Input/output error"):
        rename(toy_megatron, tmp_path / "out", "hybrid")
    assert not (tmp_path / "out").exists()


def test_a_configuration_that_says_nothing_of_the_model_is_copied(
    toy_megatron: Path, toy_flash: Path, tmp_path: Path
) -> None:
    shutil.copytree(toy_megatron, tmp_path / "m")
    path = tmp_path / "m" / ITERATION / "run_config.yaml"
    path.write_text("train: {train_iters: 10}\n")
    rename(tmp_path / "m", tmp_path / "out", "hybrid", like=toy_flash)
    assert (tmp_path / "out" / ITERATION / "run_config.yaml").read_bytes() == path.read_bytes()
