"""What is given back of the page cache behind a reader, and in which order a doctor of contents reads."""

import os
import threading
from pathlib import Path

import pytest

from dsv4_bridge import examine
from dsv4_bridge.store import reading
from dsv4_bridge.store.safetensors import SafetensorsFolder

MB = 1 << 20


def test_what_was_read_before_goes_with_what_follows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Large pages lie across the ends of stretches; behind a jump, and of small reads, nothing else is given back."""
    given: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, first, count, how: given.append((first, first + count)))
    monkeypatch.setattr(reading, "_behind", {})
    for first, count in ((0, 4 * MB), (4 * MB + 1000, 4 * MB), (9 * MB, 1000), (9 * MB, 2 * MB), (40 * MB, MB)):
        reading.drop_behind(7, first, count)
    assert given == [(0, 4 * MB), (0, 8 * MB + 1000), (0, 11 * MB), (40 * MB, 41 * MB)]
    reading.drop_behind(8, 41 * MB, MB)  # of another file
    assert given[-1] == (41 * MB, 42 * MB)
    for n in range(41, 80):
        reading.drop_behind(7, n * MB, MB)
    assert given[-1] == (80 * MB - 17 * MB, 80 * MB)  # no further back than the largest page
    with reading.kept_in_cache():
        reading.drop_behind(7, 80 * MB, MB)
    assert given[-1][1] == 80 * MB


def test_files_are_examined_front_to_back(toy_flash: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: dict[str, list[int]] = {}
    by: dict[str, set[int]] = {}
    real = SafetensorsFolder.read_into

    def noted(self: SafetensorsFolder, info, offset, out) -> None:  # type: ignore[no-untyped-def]
        if info.dtype != "F8_E8M0":
            read.setdefault(info.file, []).append(info.start + offset)
            by.setdefault(info.file, set()).add(threading.get_ident())
        real(self, info, offset, out)

    monkeypatch.setattr(SafetensorsFolder, "read_into", noted)
    report = examine(toy_flash)
    assert not report.findings and sum(map(len, read.values())) >= report.tensors
    assert all(places == sorted(places) for places in read.values())
    assert all(len(threads) == 1 for threads in by.values())  # two in one file meet in order only by luck
