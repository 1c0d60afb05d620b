"""Toys at the released widths: which layers, how many bytes, whose values; and the same bytes from any threads."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import dsv4_bridge
from conftest import dsv4, same_files
from dsv4_bridge import BridgeError, examine, inspect, make_toy
from dsv4_bridge.cli.app import app
from dsv4_bridge.codec import CODECS
from dsv4_bridge.spec.encodings import ALLOWED, QUANTISED
from dsv4_bridge.spec.plan import expand, layer_kinds
from dsv4_bridge.spec.spec import replace_spec
from dsv4_bridge.spec.variants import VARIANTS, shortened, tiny
from dsv4_bridge.toy.checkpoint import toy_bytes, toy_spec
from dsv4_bridge.toy.payloads import PAYLOADS, coded

# V4.1 has tests of its own: it has one naming, and no shorter form.
V4 = [name for name in VARIANTS if not name.startswith("V4.1")]


@pytest.mark.parametrize("name", V4)
def test_layers_of_every_number(name: str) -> None:
    """Every kind of attention as soon as there is room, the first layers as released, routed ones always."""
    whole = VARIANTS[name].spec
    released = whole.compress_ratios[: whole.num_hidden_layers]
    for layers in range(1, whole.num_hidden_layers + 1):
        spec = shortened(VARIANTS[name], layers)
        ratios = spec.compress_ratios[:layers]
        assert len(set(ratios)) == min(layers, len(set(released)))
        same = next((i for i, pair in enumerate(zip(ratios, released, strict=False)) if len(set(pair)) > 1), layers)
        assert layers - same < len(set(released)), "only kinds that would be missing replace released layers"
        assert spec.num_hash_layers == min(3, layers // 2) < layers
        assert spec.draft_blocks == whole.draft_blocks and set(spec.compress_ratios[layers:]) == {0}
        widths = {"num_hidden_layers", "num_hash_layers", "compress_ratios", "dspark"}
        assert all(getattr(spec, n) == getattr(whole, n) for n in vars(whole) if n not in widths)
    assert shortened(VARIANTS[name], whole.num_hidden_layers) == whole


def test_three_layers_of_flash_are_window_csa_hca() -> None:
    assert shortened(VARIANTS["Flash"], 3).compress_ratios == (0, 4, 128, 0)
    assert shortened(VARIANTS["Flash"], 6).num_hash_layers == 3
    kinds = layer_kinds(shortened(VARIANTS["Flash"], 3))
    assert kinds == {"window": 1, "CSA": 1, "HCA": 1, "hash": 1, "routed": 2, "MTP": 1, "DSpark": 0}


@pytest.mark.parametrize("name", ["Flash", "Flash-Base", "Pro-0813"])
def test_bytes_told_are_those_of_a_layer(name: str) -> None:
    """What is told before anything is written, held against the released sizes."""
    inventory = json.loads((Path(__file__).parents[1] / "files" / f"DeepSeek-V4-{name}.tensors.json").read_text())
    assert toy_bytes(name, VARIANTS[name].spec) == inventory["total_size"]
    one, two, four = (toy_bytes(name, toy_spec(name, "full", n)) for n in (1, 2, 4))
    assert one < two < four < inventory["total_size"] / 5


@pytest.mark.parametrize("name", VARIANTS)
def test_the_same_bytes_from_any_number_of_threads_and_sound(name: str, tmp_path: Path) -> None:
    """The values of a full width, in a tiny model: its stripes have rows beyond a multiple of 128."""
    spec = replace_spec(tiny(VARIANTS[name], ragged=True), vocab_size=2600)
    made = [make_toy(tmp_path / str(n), name, 3, spec=spec, width="full", workers=n) for n in (1, 3)]
    assert same_files(*made) == []
    assert inspect(made[0]).sound and examine(made[0]).findings == ()
    assert same_files(made[0], make_toy(tmp_path / "other", name, 4, spec=spec, width="full")) != []


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("encoding", sorted({e for found in ALLOWED.values() for e in found} & QUANTISED))
def test_every_encoding_has_legal_codes_of_every_payload(encoding: str, payload: str) -> None:
    item = next(i for i in expand(tiny(VARIANTS["Flash"], ragged=True)).items if i.row.key == "attn.wq_b")
    for wide in (False, True):
        for codes, scale in coded(item, encoding, 5, payload, wide=wide):
            values = np.empty((len(codes), item.shape[1]), np.uint16)
            CODECS[encoding].decode(codes, scale, values)
            assert len(np.unique(values)) > 9


@pytest.mark.parametrize("seed", [1, 2])
def test_values_are_gaussian_and_independent(seed: int, tmp_path: Path) -> None:
    spec = replace_spec(tiny(VARIANTS["Flash"]), vocab_size=3001)
    folder = make_toy(tmp_path / "toy", "Flash", seed, spec=spec, width="full")
    with dsv4_bridge.open(folder) as checkpoint:
        found = {
            name: checkpoint.values(name).astype(np.float64).reshape(-1) / 0.05
            for name in ("embed.weight", "head.weight", "layers.0.attn.wq_b.weight", "layers.3.ffn.experts.1.w1.weight")
        }
    for name, values in found.items():
        n = values.size
        assert abs(values.mean()) < 5 / math.sqrt(n), name
        assert abs(values.std() - 1) < (0.03 if "expert" in name else 0.003) + 5 / math.sqrt(2 * n), name
    embed, head = found["embed.weight"], found["head.weight"]
    for order, moment in ((3, 0.0), (4, 3.0), (6, 15.0)):  # of a normal; 4.3 deviations at most
        assert abs((embed**order).mean() - moment) < 6 * math.sqrt(math.prod(range(1, 2 * order, 2)) / embed.size)
    assert 4.0 < np.abs(embed).max() < 4.4
    apart = [(embed[:-n], embed[n:]) for n in (1, 4, 1024 * spec.hidden_size)]
    for one, other in ((embed, head), *apart):
        assert abs(np.dot(one, other)) / one.size < 5 / math.sqrt(one.size)


@pytest.fixture
def small_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=10**9))


@pytest.mark.usefixtures("small_disk")
def test_the_command_tells_the_size_and_refuses_a_full_disk(tmp_path: Path) -> None:
    told = CliRunner().invoke(app, ["toy", str(tmp_path / "x"), "--width", "full", "--layers", "2"])
    assert isinstance(told.exception, BridgeError) and not (tmp_path / "x").exists()
    assert "12.9 GB" in str(told.exception) and "1.0 GB are free" in str(told.exception)
    assert "12.9 GB of disk, 2 layers (1 window, 1 CSA, 1 hash, 1 routed, 1 MTP); too few layers for HCA" in told.stderr


def test_the_command_on_a_tiny_one(tmp_path: Path) -> None:
    told = dsv4("toy", tmp_path / "x", "--variant", "Pro", "--json")
    facts = json.loads(told.stdout)
    assert told.returncode == 0 and told.stderr == "" and facts["absent"] == []
    assert facts["layers"]["HCA"] == 4 and inspect(tmp_path / "x").tensors == facts["tensors"]


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"width": "huge"}, "huge"),
        ({"width": "full"}, "say how many decoder layers.* from 1 to 43; each is some 3.6 GB"),
        ({"width": "full", "layers": 0}, "expected 1 to"),
        ({"width": "full", "layers": 44}, "it has 43"),
        ({"width": "full", "layers": 2, "ragged": True}, "ragged"),
        ({"layers": 2}, "counted at full width"),
    ],
)
def test_what_cannot_be_asked(wrong: dict[str, Any], what: str, tmp_path: Path) -> None:
    with pytest.raises(BridgeError, match=what):
        make_toy(tmp_path / "x", **wrong)
    assert not (tmp_path / "x").exists()


def test_what_is_given_up_leaves_no_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard of a full width is gigabytes."""
    from dsv4_bridge.store.stream import FileStream

    real, closed = FileStream.close, []

    def close(stream: FileStream) -> None:
        real(stream)
        closed.append(stream)
        if len(closed) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(FileStream, "close", close)
    with pytest.raises(BridgeError, match="No space left"):
        make_toy(tmp_path / "x", workers=2)
    assert list((tmp_path / "x").iterdir()) == []
