"""Threads that do not begin: the system gives none, or a signal comes first. Nothing hangs, nothing stays locked."""

import threading
from pathlib import Path

import pytest

from conftest import dsv4, same_files
from dsv4_bridge import Options, import_hf
from dsv4_bridge.lock import hold
from dsv4_bridge.progress import Progress
from dsv4_bridge.store.reading import Readahead

NONE_LEFT = RuntimeError("can't start new thread")
NAMES = ("progress", "ranks", "write")


def stop_at(monkeypatch: pytest.MonkeyPatch, name: str, error: BaseException) -> list[str]:
    """Have the start of threads of that name fail; the names that met it."""
    start, met = threading.Thread.start, list[str]()

    def started(self: threading.Thread) -> None:
        if self.name.startswith(name):
            met.append(self.name)
            raise error
        start(self)

    monkeypatch.setattr(threading.Thread, "start", started)
    return met


@pytest.mark.parametrize("error", [NONE_LEFT, KeyboardInterrupt()], ids=["none left", "a signal"])
@pytest.mark.parametrize("name", NAMES)
def test_a_thread_that_does_not_begin(
    name: str,
    error: BaseException,
    toy_flash: Path,
    toy_megatron: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown: Progress = _Display()
    with monkeypatch.context() as patch:
        met = stop_at(patch, name, error)
        if error is NONE_LEFT and name == "progress":  # done without
            import_hf(toy_flash, tmp_path / "out", Options(progress=shown))
        else:
            with pytest.raises(type(error)) as caught:
                import_hf(toy_flash, tmp_path / "out", Options(progress=shown))
            assert caught.value is error
    assert met
    assert not list(tmp_path.glob("*.lock*")) and not list(tmp_path.glob(".*lock*"))
    import_hf(toy_flash, tmp_path / "out", Options(overwrite=True))  # nobody holds it
    assert same_files(toy_megatron, tmp_path / "out") == []


@pytest.mark.parametrize("error", [NONE_LEFT, KeyboardInterrupt()], ids=["none left", "a signal"])
def test_locks_and_readers_without_a_thread(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    with monkeypatch.context() as patch, (tmp_path / "file").open() as file:
        met, ahead = stop_at(patch, "", error), Readahead()
        with pytest.raises(type(error)), hold(tmp_path / "out", "writing out"):
            raise AssertionError
        if error is NONE_LEFT:
            ahead.ask(file.fileno(), 0, 1 << 20)
        else:
            with pytest.raises(type(error)):
                ahead.ask(file.fileno(), 0, 1 << 20)
        ahead.close()
    assert len(met) == 2
    with hold(tmp_path / "out", "writing out"):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


class _Display:
    def start(self, label: str, total: int, done: int) -> None:
        pass

    def advance(self, nbytes: int) -> None:
        pass

    def stop(self) -> None:
        pass


def test_the_command_says_that_no_thread_is_left(toy_flash: Path, tmp_path: Path) -> None:
    code = """
import threading
start = threading.Thread.start
def started(self):
    if self.name.startswith("write"):
        raise RuntimeError("can't start new thread")
    start(self)
threading.Thread.start = started
"""
    done = dsv4("import", toy_flash, tmp_path / "out", code=code)
    assert done.returncode == 2 and "no more threads" in done.stderr and "Traceback" not in done.stderr
