"""`dsv4 verify A --hub ID`: a folder against the Hub's own list, no weight fetched; and by what way weights come."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_hub import REPO, SMALL, UNWANTED, Answer, FakeHub, commit_of

from conftest import dsv4, same_files
from dsv4_bridge import import_hf, make_toy


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_toy(tmp_path_factory.mktemp("listing") / "repo", "Flash", 43)
    for name, data in (SMALL | UNWANTED).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def hub(repo: Path) -> Iterator[FakeHub]:
    fake = FakeHub({REPO: {"main": repo}})
    fake.start()
    yield fake
    fake.stop()


def _env(hub: FakeHub, tmp_path: Path) -> dict[str, str]:
    env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "HF_TOKEN": "", "HF_HUB_OFFLINE": "0"}
    return env | dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1,localhost")


@pytest.fixture
def verify(hub: FakeHub, tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    def run(*args: str | Path) -> tuple[int, str, str]:
        told = dsv4("verify", *args, **_env(hub, tmp_path))
        return told.returncode, told.stdout, told.stderr

    return run


def test_a_copy_is_proven_and_every_damage_named(
    repo: Path, hub: FakeHub, tmp_path: Path, verify: Callable[..., tuple[int, str, str]]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(repo, copy)
    for name in UNWANTED:  # no checkpoint needs them
        (copy / name).unlink()
    (copy / "mine.txt").write_text("of my own")
    code, out, _ = verify(copy, "--hub", REPO)
    assert code == 0 and f"byte for byte {REPO} at {commit_of(repo)[:12]}" in out and "mine.txt" in out
    assert hub.fetched() == set(), "only lists are asked for"

    shard = sorted(copy.glob("model-*.safetensors"))[2]
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 16
    shard.write_bytes(raw)
    (copy / "tokenizer.json").unlink()
    (copy / "encoding" / "encoding_dsv4.py").write_text("print('that')")
    shutil.copy(shard, copy / "model-more.safetensors")
    code, out, _ = verify(copy, "--hub", REPO, "--revision", commit_of(repo), "--json")
    facts = json.loads(out)
    assert code == 1 and not facts["whole"] and facts["revision"] == commit_of(repo)
    assert set(facts["wrong"]) == {shard.name, "tokenizer.json", "encoding/encoding_dsv4.py", "model-more.safetensors"}
    assert set(facts["absent"]) == set(UNWANTED) and facts["others"] == ["mine.txt"]
    assert all(digest.partition(":")[0] in ("sha256", "blob") for digest in facts["proven"].values())


@pytest.mark.parametrize("what", ["offline", "no repository", "no revision", "hostile names", "no list"])
def test_what_the_server_says_instead(
    what: str, repo: Path, hub: FakeHub, verify: Callable[..., tuple[int, str, str]]
) -> None:
    def tamper(answer: Answer) -> None:
        if "/tree/" in answer.path:
            entry = {"type": "file", "path": f"../{os.getpid()}", "size": 1, "oid": "0" * 40}
            answer.body = json.dumps([entry] if what == "hostile names" else {"a": 1}).encode()
            answer.headers["Content-Length"] = str(len(answer.body))

    if what in ("hostile names", "no list"):
        hub.tamper = tamper
    if what == "offline":
        hub.server.server_close()
    name = "no-org/none" if what == "no repository" else REPO
    code, out, err = verify(repo, "--hub", name, *(("--revision", "gone") if what == "no revision" else ()))
    assert code == 2 and out == "" and err.startswith("dsv4: ") and "Traceback" not in err
    if what == "hostile names":
        assert "is no file inside a folder" in err


@pytest.mark.parametrize("asked", ["", "0"])
def test_files_come_where_limits_hold_unless_xet_is_asked_for(
    asked: str, repo: Path, hub: FakeHub, tmp_path: Path
) -> None:
    """A repository in Xet storage: its transfers go by connections of their own."""

    def in_xet(answer: Answer) -> None:
        if answer.status == 302:
            answer.headers |= {
                "X-Xet-Hash": hashlib.sha256(answer.path.encode()).hexdigest(),
                "X-Xet-Refresh-Route": f"{hub.url}/api/models/{REPO}/xet-read-token/main",
            }

    hub.tamper = in_xet
    env = _env(hub, tmp_path) | ({"HF_HUB_DISABLE_XET": asked} if asked else {})
    done = dsv4("import", REPO, tmp_path / "out", **env)
    tokens = [r for r in hub.log if "xet-read-token" in r.path]
    if asked:
        assert tokens and done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    else:
        assert not tokens and done.returncode == 0, done.stderr
        import_hf(repo, tmp_path / "expected")
        assert same_files(tmp_path / "out", tmp_path / "expected") == []
