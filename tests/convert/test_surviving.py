"""Killed, out of disk, interrupted: a later --resume gives the same bytes, and no half looks whole."""

import errno
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from warm import Warm

from conftest import dsv4, same_files
from dsv4_bridge import BridgeError, Options, export_hf, import_hf, make_toy, repack, verify
from dsv4_bridge.spec.spec import ModelSpec, replace_spec
from dsv4_bridge.spec.variants import VARIANTS, tiny

KILLS = int(os.environ.get("DSV4_KILLS", "4"))  # 20 for the figures in docs/reference/benchmarks.md

_RUN = """
import sys
import torch
from pathlib import Path
from dsv4_bridge import Options, export_hf, import_hf
from dsv4_bridge.codec import fp8, mxfp4
kind, source, out, like = sys.argv[1], *map(Path, sys.argv[2:])
print("ready", flush=True)
options = Options(workers=2, resume=True)
import_hf(source, out, options) if kind == "import" else export_hf(source, out, like, "source", options)
"""


def larger_spec() -> ModelSpec:
    """A tiny model wide enough that a conversion takes a noticeable moment."""
    return replace_spec(tiny(VARIANTS["Flash"]), hidden_size=512, moe_intermediate_size=512, n_routed_experts=16)


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("larger")
    source = make_toy(folder / "hf", "Flash", 11, spec=larger_spec(), payload="random")
    import_hf(source, folder / "megatron")
    return source, folder / "megatron"


def looks_complete(folder: Path) -> bool:
    """What the readers of both formats look for."""
    tracker = folder / "latest_checkpointed_iteration.txt"
    return (folder / "config.json").exists() or tracker.exists()


def kill_and_resume(kind: str, source: Path, like: Path, expected: Path, tmp: Path, seed: int) -> tuple[int, int]:
    """Kill runs at random moments until KILLS of them died; how many, and how many left something."""
    rng, killed, partial, length = random.Random(seed), 0, 0, 1.0
    for attempt in range(10 * KILLS):
        if killed == KILLS:
            break
        out = tmp / f"{kind}-{attempt}"
        said = tmp / "said"
        said.unlink(missing_ok=True)
        process = Warm("-c", _RUN, kind, source, out, like, out=said)
        while not (said.exists() and said.read_bytes() == b"ready\n"):
            assert process.poll() is None, said.read_text()
            time.sleep(0.002)
        began = time.monotonic()
        time.sleep(rng.uniform(0, length))
        process.send_signal(signal.SIGKILL)
        died = process.wait() == -signal.SIGKILL
        if not died:  # it was done before: next time a shorter wait
            length = max(0.02, 0.8 * (time.monotonic() - began))
        killed += died
        partial += died and out.exists()
        if died and out.exists() and (out / ".dsv4-partial").exists() and looks_complete(out):
            # Only the very last step may lie between: everything must be there already.
            assert [n for n in same_files(expected, out) if not n.startswith(".dsv4-partial/")] == []
        options = Options(workers=1 + attempt % 2, resume=out.exists() and (out / ".dsv4-partial").exists())
        if not looks_complete(out) or options.resume:
            import_hf(source, out, options) if kind == "import" else export_hf(source, out, like, "source", options)
        assert same_files(expected, out) == []
        shutil.rmtree(out)
    return killed, partial


def test_import_survives_sigkill(larger: tuple[Path, Path], tmp_path: Path) -> None:
    source, megatron = larger
    killed, partial = kill_and_resume("import", source, source, megatron, tmp_path, seed=1)
    print(f"import: killed {killed} times, {partial} with partial output, every resume identical")
    assert killed == KILLS


def test_export_survives_sigkill(larger: tuple[Path, Path], tmp_path: Path) -> None:
    source, megatron = larger
    killed, partial = kill_and_resume("export", megatron, source, source, tmp_path, seed=2)
    print(f"export: killed {killed} times, {partial} with partial output, every resume identical")
    assert killed == KILLS


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Make the disk full after so many bytes."""
    real = os.pwrite

    def fill_after(room: int) -> None:
        left = [room]

        def pwrite(fd: int, data: memoryview, offset: int) -> int:
            left[0] -= len(data)
            if left[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(fd, data, offset)

        monkeypatch.setattr(os, "pwrite", pwrite)

    return fill_after


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("kind", ["import", "export", "repack"])
def test_out_of_disk_half_way_is_resumable(
    kind: str,
    workers: int,
    toy_flash: Path,
    toy_megatron: Path,
    tmp_path: Path,
    full_disk: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(out: Path, options: Options) -> None:
        if kind == "import":
            import_hf(toy_flash, out, options)
        elif kind == "export":
            export_hf(toy_megatron, out, toy_flash, "source", options)
        else:
            repack(toy_flash, out, "fp8", options)

    run(tmp_path / "whole", Options())
    full_disk(4_000_000)
    with pytest.raises(BridgeError, match=r"disk is full.*--resume"):
        run(tmp_path / "out", Options(workers=workers))
    assert not looks_complete(tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == [tmp_path / "out" / ".dsv4-partial"]
    monkeypatch.undo()
    with pytest.raises(BridgeError, match="half way"):
        run(tmp_path / "out", Options())
    run(tmp_path / "out", Options(resume=True))
    assert same_files(tmp_path / "whole", tmp_path / "out") == []


def test_too_small_a_disk_is_refused_before_anything_is_written(
    toy_flash: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(BridgeError, match=r"needs 17\.\d MB more and 67\.1 MB to spare, 1\.0 MB are free"):
        import_hf(toy_flash, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_resume_wants_the_same_input_and_options(
    toy_flash: Path, tmp_path: Path, full_disk: Callable[[int], None]
) -> None:
    full_disk(2_000_000)
    with pytest.raises(BridgeError, match="disk is full"):
        repack(toy_flash, tmp_path / "out", "fp8")
    with pytest.raises(BridgeError, match="another input or other options"):
        repack(toy_flash, tmp_path / "out", "bf16", Options(resume=True))


def test_overwrite_replaces_checkpoints_and_nothing_else(toy_flash: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    for options in (Options(), Options(overwrite=True), Options(resume=True)):
        with pytest.raises(BridgeError, match=r"not empty|folder is none"):
            import_hf(toy_flash, out, options)
    assert [p.name for p in out.iterdir()] == ["thesis.txt"]
    (out / "thesis.txt").unlink()
    import_hf(toy_flash, out)
    other = make_toy(tmp_path / "other", "Flash", 99)
    with pytest.raises(BridgeError, match="not empty"):
        import_hf(other, out)
    assert verify(out, toy_flash).same
    import_hf(other, out, Options(overwrite=True))
    assert verify(out, other).same and not verify(out, toy_flash).same


@pytest.mark.parametrize("workers", [2, 5])
def test_workers_do_not_change_a_byte(workers: int, toy_flash: Path, toy_megatron: Path, tmp_path: Path) -> None:
    import_hf(toy_flash, tmp_path / "m", Options(workers=workers))
    assert same_files(tmp_path / "m", toy_megatron) == []
    export_hf(toy_megatron, tmp_path / "hf", toy_flash, "source", Options(workers=workers))
    assert same_files(tmp_path / "hf", toy_flash) == []


def test_the_command_says_how_to_go_on(toy_flash: Path, tmp_path: Path) -> None:
    assert dsv4("import", toy_flash, tmp_path / "m").returncode == 0
    again = dsv4("import", toy_flash, tmp_path / "m")
    assert again.returncode == 2 and "--overwrite" in again.stderr and "Traceback" not in again.stderr
