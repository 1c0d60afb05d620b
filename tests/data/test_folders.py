"""Folders of text: all that is in them, or words."""

import errno
import os
from pathlib import Path

import pytest

from dsv4_bridge import BridgeError
from dsv4_bridge.data.sources import find_sources


def test_a_folder_that_cannot_be_listed_is_not_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/one.txt", "b/two.txt", "b/c/three.txt", ".hidden/four.txt"):
        path = tmp_path / "text" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "work").mkdir()
    found = find_sources([tmp_path / "text"], tmp_path / "work")
    assert [s.path.name for s in found] == ["one.txt", "three.txt", "two.txt"]
    scandir = os.scandir

    def failing(path: str | os.PathLike[str] = ".") -> object:
        if str(path).endswith("/b/c"):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)
    with pytest.raises(BridgeError, match=r"b/c: Permission denied"):
        find_sources([tmp_path / "text"], tmp_path / "work")
