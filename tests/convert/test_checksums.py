"""Checksums of what was written: right whatever was replaced on the way, and every change of a file is seen."""

import json
import os
import shutil
from pathlib import Path

import pytest
from fastcrc import crc32
from hypothesis import given
from hypothesis import strategies as st

from conftest import dsv4, same_files
from dsv4_bridge import BridgeError, Options, export_hf, import_hf, make_toy, repack, verify_files
from dsv4_bridge.convert.checksums import checksums_path
from dsv4_bridge.store.checksum import Checksum
from dsv4_bridge.store.stream import Buffers, FileStream


def test_the_check_value_of_rfc_3720() -> None:
    whole = Checksum()
    whole.add(b"1234")
    whole.add(b"56789")
    assert whole.value() == 0xE3069283


@given(st.binary(min_size=1, max_size=3000), st.data())
def test_replaced_pieces(raw: bytes, data: st.DataObject) -> None:
    """As if the whole had been read again."""
    whole, end = Checksum(), bytearray(raw)
    whole.add(raw)
    at = 0
    while at < len(raw) and data.draw(st.booleans()):
        start = data.draw(st.integers(at, len(raw) - 1))
        stop = data.draw(st.integers(start + 1, len(raw)))
        new = data.draw(st.binary(min_size=stop - start, max_size=stop - start))
        whole.replace(start, bytes(raw[start:stop]), new)
        end[start:stop] = new
        at = stop
    assert whole.value() == crc32.iscsi(bytes(end))


def test_a_stream_that_is_patched(tmp_path: Path) -> None:
    raw = os.urandom(300_001)
    stream = FileStream(tmp_path / "f", Buffers(size=65536))
    stream.write(raw[:100_000])
    stream.patch(70_001, raw[70_001:90_000], os.urandom(19_999))
    stream.write(raw[100_000:])
    stream.close()
    assert stream.crc32c == crc32.iscsi((tmp_path / "f").read_bytes())


@pytest.fixture(scope="module")
def folders(toy_flash: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One output of every verb; the export from another model's scales, so that some of them are patched."""
    top = tmp_path_factory.mktemp("sums")
    import_hf(toy_flash, top / "import", Options(workers=2))
    other = make_toy(top / "other", "Flash", 12)
    export_hf(top / "import", top / "export", like=other)
    repack(toy_flash, top / "repack", "bf16")
    return {verb: top / verb for verb in ("import", "export", "repack")}


@pytest.mark.parametrize("verb", ["import", "export", "repack"])
def test_every_file_of_an_output_is_as_written(folders: dict[str, Path], verb: str) -> None:
    out = folders[verb]
    report = verify_files(out)
    assert report.same and not report.others
    files = [p for p in out.rglob("*") if p.is_file()]
    assert report.files == len(files) and report.bytes == sum(p.stat().st_size for p in files)
    kept = json.loads(checksums_path(out).read_text())["files"]
    for path in files:
        assert int(kept[str(path.relative_to(out))]["crc32c"], 16) == crc32.iscsi(path.read_bytes())


@pytest.mark.parametrize("damage", ["bit", "cut", "longer", "gone", "swapped"])
def test_every_damage_is_seen(folders: dict[str, Path], tmp_path: Path, damage: str) -> None:
    out = tmp_path / "copy"
    shutil.copytree(folders["export"], out)
    shutil.copy(checksums_path(folders["export"]), checksums_path(out))
    shards = sorted(out.glob("*.safetensors"))
    raw = bytearray(shards[0].read_bytes())
    match damage:
        case "bit":
            raw[len(raw) // 3] ^= 4
            shards[0].write_bytes(raw)
        case "cut":
            shards[0].write_bytes(raw[:-1])
        case "longer":
            shards[0].write_bytes(raw + b"\0")
        case "gone":
            (out / "config.json").unlink()
        case "swapped":
            shards[0].rename(out / "x")
            shards[1].rename(shards[0])
            (out / "x").rename(shards[1])
    wrong = verify_files(out, workers=3).wrong
    assert set(wrong) == {"gone": {"config.json"}, "swapped": {p.name for p in shards[:2]}}.get(
        damage, {shards[0].name}
    )


def test_a_resumed_run_keeps_all_of_them(toy_flash: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dsv4_bridge.convert import journal

    real, entered = journal.enter, []

    def enter(*args: object) -> None:
        real(*args)  # type: ignore[arg-type]
        entered.append(args[2])
        if len(entered) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(journal, "enter", enter)
        import_hf(toy_flash, tmp_path / "out")
    assert not checksums_path(tmp_path / "out").exists()
    import_hf(toy_flash, tmp_path / "out", Options(resume=True))
    assert verify_files(tmp_path / "out").same


def test_an_output_replaced_is_not_held_against_the_old_ones(toy_flash: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    import_hf(toy_flash, out)
    before = checksums_path(out).read_bytes()
    import_hf(make_toy(tmp_path / "other", "Flash", 5), out, Options(overwrite=True))
    assert checksums_path(out).read_bytes() != before
    assert verify_files(out).same


def test_the_folder_itself_holds_nothing_of_them(folders: dict[str, Path], toy_flash: Path, tmp_path: Path) -> None:
    export_hf(folders["import"], tmp_path / "back", like=toy_flash)
    assert same_files(toy_flash, tmp_path / "back") == []


def test_no_room_beside_the_folder_is_told(toy_flash: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr("dsv4_bridge.convert.checksums.put", refuse)
    with pytest.warns(RuntimeWarning, match="no checksums are kept of"):
        import_hf(toy_flash, tmp_path / "out")
    with pytest.raises(BridgeError, match=r"out\.checksums\.json\): No such|--checksums"):
        verify_files(tmp_path / "out")


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format": "dsv4-checksums-1", "files": {}}', '{"format": "dsv4-checksums-1", "files": {"a": 1}}']
    + [
        f'{{"format": "dsv4-checksums-1", "files": {{"{name}": {{"bytes": {size}, "crc32c": {crc}}}}}}}'
        for name, size, crc in [
            ("../a", 1, '"00000000"'),
            ("a", -1, '"00000000"'),
            ("a", 1, "7"),
            ("a", "true", '"00000000"'),
            ("a", 1, '"+0000000"'),
            ("/etc/passwd", 1, '"00000000"'),
            ("a", "1e400", '"00000000"'),
        ]
    ],
)
def test_a_file_of_checksums_that_is_none(folders: dict[str, Path], tmp_path: Path, text: str) -> None:
    (tmp_path / "sums").write_text(text)
    with pytest.raises(BridgeError):
        verify_files(folders["export"], tmp_path / "sums")


def test_the_command(folders: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "moved"
    shutil.copytree(folders["repack"], out)
    (out / "mine.txt").write_text("of my own")
    assert dsv4("verify", out).returncode == 2
    told = dsv4("verify", out, "--checksums", checksums_path(folders["repack"]))
    assert told.returncode == 0 and "as written" in told.stdout and "mine.txt" in told.stdout
    with (out / "model.safetensors.index.json").open("ab") as file:
        file.write(b" ")
    told = dsv4("verify", out, "--checksums", checksums_path(folders["repack"]), "--json")
    assert told.returncode == 1 and list(json.loads(told.stdout)["wrong"]) == ["model.safetensors.index.json"]
    assert dsv4("verify", out, "--level", "bytes").returncode == 2
    assert dsv4("verify", out, out, "--checksums", "x").returncode == 2
