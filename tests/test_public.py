"""What is public, with its signatures: tests/files/public.txt lists it, and a change there is a change for users."""

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dsv4_bridge
from conftest import DATA
from dsv4_bridge import BridgeError

LIST = DATA / "public.txt"


def told(name: str, thing: Any) -> str:
    if isinstance(thing, type):
        methods = [m for m in vars(thing) if not m.startswith("_") and callable(getattr(thing, m))]
        return f"{name}: {', '.join(sorted(methods))}" if methods else name
    return name + re.sub(r"<.*? at 0x[0-9a-f]+>", "…", str(inspect.signature(thing)))


def public() -> list[str]:
    from dsv4_bridge import mcore, parity

    return [
        told(f"{room.__name__}.{name}", getattr(room, name))
        for room in (dsv4_bridge, mcore, parity)
        for name in room.__all__
    ]


@pytest.mark.megatron
def test_what_is_public() -> None:
    assert public() == LIST.read_text().splitlines(), "changed on purpose? python tests/test_public.py writes the list"


def test_the_package_is_light() -> None:
    """Its import loads no library, and knows all its names."""
    code = "import sys, dsv4_bridge; print(*(m for m in ('torch', 'numpy', 'yaml', 'rich') if m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"
    assert set(dsv4_bridge.__all__) <= set(dir(dsv4_bridge))
    assert (Path(dsv4_bridge.__file__).parent / "py.typed").is_file()
    with pytest.raises(AttributeError):
        dsv4_bridge.nothing  # noqa: B018


def test_what_a_prompt_shows() -> None:
    """Completion has the package's own names and its rooms, the version is where it is looked for."""
    shown = [name for name in dir(dsv4_bridge) if not name.startswith("__")]
    assert shown == sorted([*dsv4_bridge.__all__, "mcore", "parity"])
    assert re.fullmatch(r"\d+\.\d+.*", dsv4_bridge.__version__)
    code = "import dsv4_bridge as d; print(d.mcore.__name__, d.parity.__name__)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["dsv4_bridge.mcore", "dsv4_bridge.parity"]


def test_reports_are_short_at_a_prompt(toy_flash: Path) -> None:
    for report in (
        dsv4_bridge.inspect(toy_flash),
        dsv4_bridge.plan("Flash"),
        dsv4_bridge.plan(toy_flash),
        dsv4_bridge.verify(toy_flash, toy_flash),
    ):
        assert len(repr(report)) < 800, type(report)


@pytest.mark.parametrize("workers", [0, -1, True, 1.5, "2"])
def test_workers_are_some(workers: Any) -> None:
    with pytest.raises(BridgeError, match=r"workers is .*expected a whole number from 1 on"):
        dsv4_bridge.Options(workers=workers)


@pytest.mark.megatron
@pytest.mark.parametrize("name", ["toy", Path("toy"), None])
def test_a_model_is_not_built_from_a_name(name: Any) -> None:
    with pytest.raises(BridgeError, match=r"expected a ModelSpec, .*mcore\.from_pretrained"):
        dsv4_bridge.mcore.build_model(name)


@pytest.mark.parametrize("kind", ["hf", "megatron", "iteration"])
def test_a_checkpoint_of_either_kind(kind: str, toy_flash: Path, toy_megatron: Path) -> None:
    where = {"hf": toy_flash, "megatron": toy_megatron, "iteration": toy_megatron / "iter_0000000"}[kind]
    with dsv4_bridge.open(str(where)) as checkpoint:
        assert "tensors>" in repr(checkpoint) and checkpoint.kind == ("huggingface" if kind == "hf" else "megatron")
        assert checkpoint.spec == dsv4_bridge.ModelSpec.from_pretrained(str(where))
        facts = checkpoint.tensors["layers.0.attn.wq_a.weight"]
        assert facts.encoding == ("fp8" if kind == "hf" else "bf16")
        found = {name: checkpoint.values(name) for name in list(checkpoint.tensors)[::11]}
        ids = checkpoint.values("layers.0.ffn.gate.tid2eid")
        for name, what in (("layers.0.attn.wq_a", r"it has layers\.0\.attn\.wq_a\.weight"), ("nope", "released ones")):
            with pytest.raises(BridgeError, match=what):
                checkpoint.values(name)
    with dsv4_bridge.open(toy_flash) as released:
        for name, values in found.items():
            assert values.dtype in (np.float32, np.int64) and values.shape == released.tensors[name].shape
            assert np.array_equal(values, released.values(name))
        assert ids.dtype == np.int64 and np.array_equal(ids, released.values("layers.0.ffn.gate.tid2eid"))


@pytest.mark.parametrize("name", ["nope", "/nowhere/at/all", "a://b"])
def test_what_is_not_there(name: str) -> None:
    for call in (dsv4_bridge.open, dsv4_bridge.ModelSpec.from_pretrained, dsv4_bridge.inspect, dsv4_bridge.plan):
        with pytest.raises(BridgeError):
            call(name)


def test_the_verbs_take_strings(toy_flash: Path, tmp_path: Path) -> None:
    made = str(tmp_path / "m")
    dsv4_bridge.import_hf(str(toy_flash), made)
    dsv4_bridge.export_hf(made, str(tmp_path / "h"), str(toy_flash))
    assert dsv4_bridge.verify(str(toy_flash), str(tmp_path / "h"), "bytes").same
    dsv4_bridge.repack(str(toy_flash), str(tmp_path / "b"), "bf16")
    assert dsv4_bridge.inspect(str(tmp_path / "b")).sound
    assert dsv4_bridge.make_toy(str(tmp_path / "t")).is_dir()


@pytest.mark.megatron
def test_a_model_is_saved(toy_flash: Path, tmp_path: Path) -> None:
    """A changed tensor is written, nothing else moves; without a release, in bf16; what cannot be is refused."""
    import torch

    from dsv4_bridge import mcore

    model = mcore.from_pretrained(toy_flash, dtype=torch.float32)
    with torch.no_grad():
        model.output_layer.weight.mul_(2)  # exact in bf16
    mcore.save_pretrained(model, tmp_path / "like", like=toy_flash)
    report = dsv4_bridge.verify(toy_flash, tmp_path / "like", "bytes")
    assert [d.name for d in report.differences] == ["head.weight"]
    mcore.save_pretrained(model, tmp_path / "bf16")
    assert dsv4_bridge.verify(tmp_path / "like", tmp_path / "bf16").same
    with pytest.raises(BridgeError, match="not empty"):
        mcore.save_pretrained(model, tmp_path / "bf16")
    with pytest.raises(BridgeError, match="needs like="):
        mcore.save_pretrained(model, tmp_path / "none", encoding="source")
    other = dsv4_bridge.make_toy(tmp_path / "pro", "Pro", 1)
    with pytest.raises(BridgeError, match="two models"):
        mcore.save_pretrained(model, tmp_path / "none", like=other)
    with pytest.raises(BridgeError, match="overlaps"):
        mcore.save_pretrained(model, toy_flash / "inside", like=toy_flash)


if __name__ == "__main__":
    LIST.write_text("\n".join(public()) + "\n")
