"""Progress and threads: a display can fail, hang or vanish, a writer can die; nothing wrong comes of it."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from conftest import same_files
from dsv4_bridge import BridgeError, Options, export_hf, import_hf
from dsv4_bridge.store import stream
from dsv4_bridge.store.stream import Buffers, FileStream


class Bad:
    """A display whose every call does something bad."""

    def __init__(self, act):
        self.act, self.calls = act, 0

    def start(self, label: str, total: int, done: int) -> None:
        pass

    def advance(self, nbytes: int) -> None:
        self.calls += 1
        self.act()

    def stop(self) -> None:
        self.act()


def broken_pipe() -> None:
    raise SystemExit(1)  # what rich makes of one


def cancel() -> None:
    raise RuntimeError("cancel")


@pytest.mark.parametrize("act", [broken_pipe, cancel])
@pytest.mark.filterwarnings("ignore:the progress display failed")
def test_a_display_that_raises_changes_no_byte(act, toy_flash: Path, toy_megatron: Path, tmp_path: Path) -> None:
    display = Bad(act)
    report = export_hf(toy_megatron, tmp_path / "out", toy_flash, "source", Options(progress=display))
    assert report.bytes_written > 0
    assert same_files(tmp_path / "out", toy_flash) == []
    assert display.calls == 1  # told once, then quiet


def test_a_display_that_raises_is_told_of_once(toy_flash: Path, tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match=r"progress display failed .*cancel.*goes on without it") as told:
        import_hf(toy_flash, tmp_path / "out", Options(progress=Bad(cancel)))
    assert len(told) == 1


def test_a_display_that_hangs_delays_nothing(toy_flash: Path, toy_megatron: Path, tmp_path: Path) -> None:
    release = threading.Event()
    try:
        began = time.monotonic()
        import_hf(toy_flash, tmp_path / "out", Options(progress=Bad(lambda: release.wait(600) and None)))
        assert time.monotonic() - began < 60
    finally:
        release.set()
    assert same_files(tmp_path / "out", toy_megatron) == []


_EXPORT = """
import sys, time
from pathlib import Path
from dsv4_bridge.cli.show import progress
from dsv4_bridge.cli import main
progress._QUIET_SECONDS = 0.0  # a line at every word
print("ready", flush=True)
sys.argv = ["dsv4", *sys.argv[1:]]
main()
"""


@pytest.mark.parametrize("stderr", ["closed", "no reader", "full"])
def test_a_terminal_that_goes_away_changes_no_byte(
    stderr: str, toy_flash: Path, toy_megatron: Path, tmp_path: Path
) -> None:
    reader, writer = os.pipe()
    if stderr == "full":
        os.set_blocking(writer, False)
        while True:
            try:
                os.write(writer, b"x" * 65536)
            except BlockingIOError:
                break
        os.set_blocking(writer, True)
    else:
        os.close(reader)
    command = [sys.executable, "-c", _EXPORT, "export", toy_megatron, tmp_path / "out", "--like", toy_flash, "--json"]
    shell = ["sh", "-c", 'exec "$@" 2>&-', "sh"] if stderr == "closed" else []
    process = subprocess.Popen([*shell, *map(str, command)], stdout=subprocess.PIPE, stderr=writer)
    os.close(writer)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert out.startswith(b"ready\n{")
    assert same_files(tmp_path / "out", toy_flash) == []


@pytest.mark.parametrize("error", [OSError(5, "gone"), MemoryError(), SystemExit(3), ValueError("odd")])
def test_what_ends_the_thread_that_writes_is_raised(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffers = Buffers(3, 1 << 16)

    def fail(fd: int, view: memoryview, offset: int) -> None:
        raise error

    monkeypatch.setattr(stream, "_write_all", fail)
    target = FileStream(tmp_path / "file", buffers)
    with pytest.raises(type(error)):
        for _ in range(10):  # more than the buffers hold: it must not hang either
            target.write(np.zeros(1 << 16, np.uint8))
        target.close()
    target.abort()
    target.abort()
    assert buffers.free.qsize() == 3
    assert len({id(buffers.free.get()) for _ in range(3)}) == 3


def test_a_thread_that_vanishes_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_LOOK", 0.05)
    monkeypatch.setattr(FileStream, "_run", lambda self: None)
    target = FileStream(tmp_path / "file", Buffers(2, 4096))
    with pytest.raises(OSError, match="the thread that writes it died"):
        target.write(np.zeros(1 << 16, np.uint8))
    target = FileStream(tmp_path / "small", Buffers(2, 4096))
    target.write(b"x")
    with pytest.raises(OSError, match=r"died|0 of 1 bytes were written"):
        target.close()


def test_a_file_of_another_size_than_planned_is_not_placed(
    toy_flash: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = FileStream.close

    def close(self: FileStream) -> None:
        real(self)
        os.truncate(self._path, self._path.stat().st_size - 1)

    monkeypatch.setattr(FileStream, "close", close)
    with pytest.raises(BridgeError, match=r"\d+ bytes and \d+ were made of the \d+ that were planned; it is not kept"):
        import_hf(toy_flash, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_stopped_reader_and_a_killed_run(toy_flash: Path, toy_megatron: Path, tmp_path: Path) -> None:
    """SIGSTOP makes the next word due at once; stderr's reader is gone."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "dsv4_bridge", "import", toy_flash, tmp_path / "out"]
    process = subprocess.Popen([str(c) for c in command], stderr=writer, stdout=subprocess.DEVNULL)
    os.close(writer)
    time.sleep(0.8)
    process.send_signal(signal.SIGSTOP)
    time.sleep(0.3)
    process.send_signal(signal.SIGCONT)
    assert process.wait(120) == 0
    assert same_files(tmp_path / "out", toy_megatron) == []
