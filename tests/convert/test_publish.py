"""A checkpoint to the Hub: only what is whole, once, with a card that says what is known; from a server here."""

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from fake_upload import UploadHub
from warm import Warm

from conftest import dsv4
from dsv4_bridge import export_hf, import_hf
from dsv4_bridge.convert.checksums import checksums_path
from dsv4_bridge.convert.prepare import WORK

REPO = "somebody/flash-back"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, toy_flash: Path) -> Path:
    folder = tmp_path_factory.mktemp("push")
    source = folder / "source"
    shutil.copytree(toy_flash, source)
    (source / "LICENSE").write_text("MIT License\n\nCopyright (c) somebody\n")
    (source / "README.md").write_text("# The source's own\n")
    import_hf(source, folder / "megatron")
    export_hf(folder / "megatron", folder / "out", like=source)
    return folder / "out"


@pytest.fixture
def out(exported: Path, tmp_path: Path) -> Path:
    shutil.copytree(exported, tmp_path / "out")
    shutil.copy(checksums_path(exported), checksums_path(tmp_path / "out"))
    return tmp_path / "out"


@pytest.fixture
def server() -> Iterator[UploadHub]:
    hub = UploadHub()
    hub.start()
    yield hub
    hub.stop()


def env(server: UploadHub, cache: Path) -> dict[str, str]:
    return {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(cache),
        "HF_TOKEN": "hf_test",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
    }


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_pushed_killed_and_pushed_again(out: Path, server: UploadHub, tmp_path: Path) -> None:
    expected = files_of(out)
    reached, go = threading.Event(), threading.Event()

    def wait(count: int) -> None:
        if count == 1 and not go.is_set():  # one object is there, the next is on its way
            reached.set()
            go.wait(60)
            raise ConnectionError

    server.before = wait
    said = tmp_path / "said"
    body = "from dsv4_bridge.cli import main; main()"
    process = Warm("-c", body, "push", out, REPO, out=said, err=said, **env(server, tmp_path / "cache"))
    assert reached.wait(120), said.read_text()
    process.kill()
    process.wait()
    go.set()
    server.rest()
    first = set(server.sent)
    assert first and set(server.repos[REPO]) < set(expected)
    server.before = lambda count: None
    done = dsv4("push", out, REPO, "--private", "--json", **env(server, tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert len(server.sent) == len(set(server.sent)) > len(first)  # nothing is sent twice
    sent = server.repos[REPO]
    assert sent.pop("README.base.md") == expected.pop("README.md")
    card = sent.pop("README.md").decode()
    assert sent == expected and files_of(out).keys() - expected.keys() == {"README.md"}
    facts = json.loads(done.stdout)
    assert facts["sent"] and facts["card"] == card and set(facts["files"]) == {*expected, "README.base.md"}
    head = yaml.safe_load(card.split("---")[1])
    assert head["license"] == "mit" and head["license_link"] == "LICENSE"
    kept = json.loads(checksums_path(out).read_text())["files"]
    assert all(f"| `{name}` | {one['bytes']:,} | `{one['crc32c']}` |" in card for name, one in kept.items())
    assert f"{len(kept):,} files of" in card and str(tmp_path) not in card


def test_dry_run_sends_nothing(out: Path, server: UploadHub, tmp_path: Path) -> None:
    commit = "a" * 40
    words = ("push", out, REPO, "--dry-run", "--base", "deepseek-ai/DeepSeek-V4-Flash", "--revision", commit)
    done = dsv4(*words, **env(server, tmp_path / "cache"))
    assert done.returncode == 0 and not server.repos, done.stderr
    assert commit in done.stdout and "base_model: deepseek-ai/DeepSeek-V4-Flash" in done.stdout
    assert all(name in done.stdout for name in files_of(out)) and "nothing was sent" in done.stdout


@pytest.mark.parametrize("what", ["unfinished", "changed", "lost", "part", "tensor", "nothing"])
def test_what_is_not_whole_is_refused(what: str, out: Path, server: UploadHub, tmp_path: Path) -> None:
    shard = max(out.glob("*.safetensors"), key=lambda p: p.stat().st_size)
    said = {
        "unfinished": "has not ended",
        "changed": "are not as they were written",
        "lost": "not there",
        "part": "not written to its end",
        "tensor": "faults",
        "nothing": "config.json",
    }[what]
    if what == "unfinished":
        (out / WORK).mkdir()
    elif what == "changed":
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
    elif what == "lost":
        (out / "LICENSE").unlink()
    elif what == "part":
        (out / "config.json.part").write_bytes(b"{")
    elif what == "tensor":
        checksums_path(out).unlink()
        path = out / "config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps(config | {"n_routed_experts": config["n_routed_experts"] * 2}))
    else:
        checksums_path(out).unlink()
        shutil.rmtree(out)
        out.mkdir()
        (out / "notes.txt").write_text("x")
    done = dsv4("push", out, REPO, **env(server, tmp_path / "cache"))
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not server.repos


def test_names_of_files_do_not_break_the_head_of_a_card(server: UploadHub, out: Path, tmp_path: Path) -> None:
    checksums_path(out).unlink()
    for name in ("LICENSE: all [rights], #none", "LICENSE-7", "license 'quoted' {x}"):
        for path in out.iterdir():
            if path.name.upper().startswith("LICENSE"):
                path.rename(out / name)
                (out / name).write_text("Some other licence")
        done = dsv4("push", out, REPO, "--dry-run", "--json", **env(server, tmp_path / "cache"))
        assert done.returncode == 0, done.stderr
        head = yaml.safe_load(json.loads(done.stdout)["card"].split("---\n")[1])
        assert head["license_link"] == name and head["license_name"] == "see-file"


def test_adapters_have_a_card_too(server: UploadHub, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    base = "deepseek-ai/DeepSeek-V4-Flash"
    config = {"r": 7, "lora_alpha": 14, "base_model_name_or_path": base, "target_modules": ["a", "b"], "use_dora": True}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    done = dsv4("push", folder, "somebody/adapter", **env(server, tmp_path / "cache"))
    assert done.returncode == 2 and "no adapter_model.safetensors" in done.stderr
    (folder / "adapter_model.safetensors").write_bytes(b"x" * 9000)
    done = dsv4("push", folder, "somebody/adapter", **env(server, tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    card = server.repos["somebody/adapter"]["README.md"].decode()
    head = yaml.safe_load(card.split("---")[1])
    assert (head["base_model"], head["library_name"], head["tags"]) == (base, "peft", ["lora"])
    assert "DoRA of rank 7, alpha 14" in card and head["license_link"].startswith("https://huggingface.co/" + base)
    server.refuse = True
    done = dsv4("push", folder, "somebody/adapter", **env(server, tmp_path / "cache"))
    assert done.returncode == 2 and "HF_TOKEN" in done.stderr and "Traceback" not in done.stderr
    for repo in ("adapter", "a/b/c", "../x"):
        assert "owner/name" in dsv4("push", folder, repo, **env(server, tmp_path / "cache")).stderr


def test_a_card_of_ours_is_no_card_of_the_source(out: Path, server: UploadHub, tmp_path: Path) -> None:
    """A repository that was pushed from here, fetched and pushed again: the source's card stays the source's."""
    source = (out / "README.md").rename(out / "README.base.md").read_bytes()
    (out / "README.md").write_text("# made by a push before\n")
    checksums_path(out).unlink()
    done = dsv4("push", out, REPO, **env(server, tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    sent = server.repos[REPO]
    assert sent["README.base.md"] == source and b"made by a push before" not in sent["README.md"]
