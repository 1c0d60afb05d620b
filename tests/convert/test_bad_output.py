"""Bad places to write, disks that fill up, files that change meanwhile, bad arguments: one clear message."""

import contextlib
import errno
import os
import re
import resource
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from damage import (
    INDEX,
    edit,
    linked,
    listing,
    one_message,
    poke,
    put,
    refuses,
)

from conftest import dsv4, same_files
from dsv4_bridge import Options, export_hf, import_hf, inspect, make_toy, verify

# ---------------------------------------------------------------- where it is to be written


def test_a_folder_that_is_not_empty_needs_overwrite(tmp_path: Path, toy_flash: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    before = listing(tmp_path)
    refuses(lambda: import_hf(toy_flash, out), "not empty; choose another, or --overwrite replaces a checkpoint")
    # Not even then: this is no checkpoint.
    refuses(lambda: import_hf(toy_flash, out, Options(overwrite=True)), r"this folder is none \(notes\.txt")
    refuses(lambda: import_hf(toy_flash, out, Options(resume=True)), "not empty")
    assert "not empty" in one_message(dsv4("import", toy_flash, out))
    assert listing(tmp_path) == before


def test_a_failed_overwrite_keeps_what_was_there(tmp_path: Path, toy_flash: Path) -> None:
    folder, out = linked(toy_flash, tmp_path / "hf"), tmp_path / "out"
    import_hf(toy_flash, out)
    weight = "layers.2.attn.wq_a.weight"
    edit(poke(weight, b"\x7f"))(folder)
    before = {n: s for n, s in listing(out).items() if (out / n).is_file()}
    refuses(lambda: import_hf(folder, out, Options(overwrite=True)), weight)
    assert {n: s for n, s in listing(out).items() if (out / n).is_file()} == before
    import_hf(toy_flash, out, Options(overwrite=True))


def test_an_output_inside_or_around_the_input_is_refused(tmp_path: Path, toy_flash: Path) -> None:
    folder = linked(toy_flash, tmp_path / "around" / "hf")
    before = listing(tmp_path)
    for out in (folder, folder / "out", folder.parent):
        refuses(lambda out=out: import_hf(folder, out, Options(overwrite=True)), "it overlaps the input")
    assert listing(tmp_path) == before


def test_an_output_under_or_instead_of_a_file_is_refused(tmp_path: Path, toy_flash: Path) -> None:
    (tmp_path / "file").write_text("mine")
    before = listing(tmp_path)
    refuses(lambda: import_hf(toy_flash, tmp_path / "file"), "exists and is not a folder")
    refuses(lambda: import_hf(toy_flash, tmp_path / "file", Options(overwrite=True)), "exists and is not a folder")
    refuses(lambda: import_hf(toy_flash, tmp_path / "file" / "a" / "out"), "Not a directory")
    refuses(lambda: make_toy(tmp_path / "file" / "toy"), "Not a directory")
    assert "Not a directory" in one_message(dsv4("import", toy_flash, tmp_path / "file" / "out"))
    refuses(lambda: import_hf(toy_flash, tmp_path / ("x" * 300)), "name too long")
    assert listing(tmp_path) == before


@contextlib.contextmanager
def without_privileges() -> Iterator[None]:
    """Even if it is root's, this process is nobody in particular."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_no_permission_to_write_is_said(toy_flash: Path, toy_megatron: Path) -> None:
    # toy_megatron: everything is imported and compiled before the privileges are gone.
    source = Path(tempfile.mkdtemp(prefix="dsv4-"))
    try:
        folder = shutil.copytree(toy_flash, source / "hf")
        source.chmod(0o555)
        with without_privileges():
            refuses(lambda: import_hf(folder, source / "a" / "out"), "Permission denied")
        assert [p.name for p in source.iterdir()] == ["hf"]
    finally:
        source.chmod(0o755)
        shutil.rmtree(source)


@pytest.mark.parametrize("file", ["config.json", INDEX, "model-00002-of-00009.safetensors", "generation_config.json"])
def test_no_permission_to_read_is_said(file: str, toy_flash: Path) -> None:
    source = Path(tempfile.mkdtemp(prefix="dsv4-"))
    try:
        folder = shutil.copytree(toy_flash, source / "hf")
        (folder / file).chmod(0)
        source.chmod(0o777)
        with without_privileges():
            refuses(lambda: import_hf(folder, source / "a" / "out"), f"{re.escape(file)}.*Permission denied")
        assert [p.name for p in source.iterdir()] == ["hf"]
    finally:
        shutil.rmtree(source)


def test_no_space_is_found_before_anything_is_written(
    tmp_path: Path, toy_flash: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = shutil._ntuple_diskusage(10**12, 10**12 - 10**6, 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    before = listing(tmp_path)
    refuses(
        lambda: import_hf(toy_flash, tmp_path / "a" / "out"),
        r"needs \d+\.\d MB more and 67\.1 MB to spare, [\d.]+ .B are free on that disk",
    )
    assert listing(tmp_path) == before


def test_a_disk_that_fills_up_is_said_and_resume_continues(
    tmp_path: Path, toy_flash: Path, toy_megatron: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, count = os.pwrite, 0

    def pwrite(*args: Any) -> int:
        nonlocal count
        count += 1
        if count > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        refuses(lambda: import_hf(toy_flash, out), r"the disk is full; .* repeat the command with --resume")
    assert [p.name for p in out.iterdir()] == [".dsv4-partial"]
    refuses(lambda: import_hf(toy_flash, out), "an earlier run stopped half way here; --resume continues it")
    refuses(lambda: inspect(out), "no such file|not a Hugging Face")
    import_hf(toy_flash, out, Options(resume=True))
    assert same_files(out, toy_megatron) == []


def test_a_limit_on_file_sizes_is_said(tmp_path: Path, toy_flash: Path, toy_megatron: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        refuses(lambda: import_hf(toy_flash, tmp_path / "out"), "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    import_hf(toy_flash, tmp_path / "out", Options(resume=True))
    assert same_files(tmp_path / "out", toy_megatron) == []


def test_resuming_with_another_input_is_refused(tmp_path: Path, toy_flash: Path, monkeypatch: Any) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda *a: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        refuses(lambda: import_hf(toy_flash, out), "the disk is full")
    before = listing(out)
    other = make_toy(tmp_path / "other", "Flash", 8)
    refuses(lambda: import_hf(other, out, Options(resume=True)), "had another input or other options")
    assert listing(out) == before


# ---------------------------------------------------------------- while it is read


def once_written(monkeypatch: pytest.MonkeyPatch, act: Callable[[], Any]) -> None:
    """Do something when the first bytes are written."""
    real, acts, lock = os.pwrite, [act], threading.Lock()

    def pwrite(fd: int, data: Any, offset: int) -> int:
        with lock:
            due, acts[:] = list(acts), []
        for each in due:
            each()
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)


def overwrite_in_place(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))


CHANGES: dict[str, Callable[[Path], Any]] = {
    "overwritten in place": overwrite_in_place,
    "cut short": lambda path: os.truncate(path, path.stat().st_size - 4096),
    "appended to": lambda path: path.open("ab").write(b"x"),
    "replaced": lambda path: put(path, path.read_bytes()),
    "removed": lambda path: path.unlink(),
}


@pytest.mark.parametrize("how", CHANGES)
def test_a_tensor_that_changes_while_it_is_read_is_refused(
    how: str, tmp_path: Path, toy_flash: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(toy_flash, tmp_path / "hf")
    last = sorted(folder.glob("*.safetensors"))[-1]
    once_written(monkeypatch, lambda: CHANGES[how](last))
    refuses(
        lambda: import_hf(folder, tmp_path / "a" / "out"),
        f"{last.name}.*(changed while being read|No such file)",
    )
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("how", CHANGES)
def test_a_megatron_file_that_changes_while_it_is_read_is_refused(
    how: str, tmp_path: Path, toy_flash: Path, toy_megatron: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(toy_megatron, tmp_path / "megatron")
    # The last tensor of the released order is written last, wherever it lies.
    largest = max((folder / "iter_0000000").glob("*.distcp"), key=lambda p: (p.stat().st_size, p.name))
    once_written(monkeypatch, lambda: CHANGES[how](largest))
    refuses(
        lambda: export_hf(folder, tmp_path / "a" / "out", toy_flash),
        f"{largest.name}.*(changed while being read|No such file|truncated)",
    )
    assert not (tmp_path / "a").exists()


def test_a_megatron_source_replaced_between_opening_and_reading_is_refused(
    tmp_path: Path, toy_flash: Path, toy_megatron: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another checkpoint's files, whole and of the same sizes, put where those of the source were."""
    other = make_toy(tmp_path / "other", "Flash", 99)
    import_hf(other, tmp_path / "other-megatron")
    folder = shutil.copytree(toy_megatron, tmp_path / "megatron")
    names = sorted(p.name for p in (folder / "iter_0000000").glob("*.distcp"))[-2:]

    def swap() -> None:
        for name in names:
            put(folder / "iter_0000000" / name, (tmp_path / "other-megatron/iter_0000000" / name).read_bytes())

    once_written(monkeypatch, swap)
    refuses(lambda: export_hf(folder, tmp_path / "a" / "out", toy_flash), "changed while being read")
    assert not (tmp_path / "a").exists()


# ---------------------------------------------------------------- arguments


def test_paths_that_are_no_checkpoint_are_refused(tmp_path: Path, toy_flash: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    before = listing(tmp_path)
    for name, message in (("empty", "config.json"), ("file", "not a folder"), ("none", "no such|not a folder")):
        refuses(lambda name=name: import_hf(tmp_path / name, tmp_path / "out"), message)
        refuses(lambda name=name: inspect(tmp_path / name), f"{message}|no such file")
        wanted = "no such folder; a Megatron" if name == "none" else "expected a Megatron|neither"
        refuses(lambda name=name: export_hf(tmp_path / name, tmp_path / "out", None, "bf16"), wanted)
        refuses(lambda name=name: verify(toy_flash, tmp_path / name), f"{message}|no such file")
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    "args",
    [
        ("import", "/nowhere/at/all", "out"),
        ("import", "no-such-folder", "out"),
        ("import", "../x/y/z", "out"),
        ("export", "nowhere", "out"),
        ("export", "nowhere", "out", "--encoding", "int4"),
        ("repack", "nowhere", "out", "--encoding", "bf16"),
        ("import", "nowhere"),
        ("import", "nowhere", "out", "--workers", "0"),
        ("inspect", "nowhere"),
        ("verify", "nowhere", "nowhere"),
        ("plan", "Flash-9"),
        ("toy", "out", "--variant", "Flash-9"),
        ("unknown-verb",),
    ],
    ids=" ".join,
)
def test_bad_arguments_are_one_message_and_exit_code_2(
    args: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one_message(dsv4(*args, HF_HUB_OFFLINE="1"))
    assert not list(tmp_path.iterdir())
