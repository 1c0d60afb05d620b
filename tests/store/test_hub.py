"""Repositories on the Hugging Face Hub, from a server on this machine that answers as the Hub does."""

import gzip
import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from fake_hub import REPO, SMALL, UNWANTED, Answer, FakeHub, commit_of

from conftest import dsv4, same_files
from dsv4_bridge import BridgeError, export_hf, import_hf, inspect, make_toy, plan
from dsv4_bridge.store import hub
from dsv4_bridge.store.safetensors import read_header
from dsv4_bridge.store.small_files import small_files


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the repository holds."""
    folder = make_toy(tmp_path_factory.mktemp("hub") / "repo", "Flash", 41)
    for name, data in (SMALL | UNWANTED).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def imported(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's folder, imported from where it lies."""
    out = tmp_path_factory.mktemp("hub") / "imported"
    import_hf(repo, out)
    return out


@pytest.fixture
def server(repo: Path) -> Iterator[FakeHub]:
    fake = FakeHub({REPO: {"main": repo}})
    fake.start()
    yield fake
    fake.stop()


@dataclass
class Client:
    """The command, set up for the server and a cache of its own."""

    env: dict[str, str]
    cache: Path

    def __call__(self, *args: str | Path) -> subprocess.CompletedProcess[str]:
        return dsv4(*args, **self.env)

    def snapshots(self) -> list[Path]:
        return sorted(self.cache.glob("hub/models--*/snapshots/*"))


@pytest.fixture
def client(server: FakeHub, tmp_path: Path) -> Client:
    cache = tmp_path / "cache"
    env = {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(cache),
        "HF_HUB_CACHE": str(cache / "hub"),
        "HF_TOKEN": "",
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
    }
    return Client(env, cache)


def needed(repo: Path) -> set[str]:
    """Files that a conversion reads."""
    return set(SMALL) | {p.name for p in repo.glob("model*")} | {"config.json", "generation_config.json"}


def one_message(done: subprocess.CompletedProcess[str]) -> str:
    """What was said by a run that failed with exit code 2, one line and nothing else."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("dsv4: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


# ---------------------------------------------------------------- conversions


def test_import_gives_the_bytes_of_the_folder_and_fetches_only_what_it_reads(
    server: FakeHub, client: Client, repo: Path, imported: Path, tmp_path: Path
) -> None:
    done = client("import", REPO, tmp_path / "out", "--revision", "main")
    assert done.returncode == 0, done.stderr
    assert same_files(imported, tmp_path / "out") == []
    assert server.fetched() == needed(repo)
    assert not {r.path for r in server.log if any(name in r.path for name in UNWANTED)}
    # only the first request names the branch, which may move on; all others the commit it was then
    asked = [r.path for r in server.log if "/revision/" in r.path or "/resolve/" in r.path]
    assert [path for path in asked if commit_of(repo) not in path] == [f"/api/models/{REPO}/revision/main"]

    # once more: nothing is fetched again, with the Hub there or without it
    server.log.clear()
    assert client("import", REPO, tmp_path / "again").returncode == 0
    assert server.fetched() == set()
    server.stop()
    offline = client("import", REPO, tmp_path / "offline", "--revision", "main")
    server.start()
    assert offline.returncode == 0, offline.stderr
    assert same_files(imported, tmp_path / "again") == same_files(imported, tmp_path / "offline") == []


def test_export_takes_its_like_from_the_hub(
    server: FakeHub, client: Client, repo: Path, imported: Path, tmp_path: Path
) -> None:
    assert client("export", imported, tmp_path / "out", "--like", REPO).returncode == 0
    assert set(same_files(repo, tmp_path / "out")) == set(UNWANTED)


def test_a_tokenizer_comes_without_weights(server: FakeHub, client: Client, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    message = one_message(client("data", tmp_path / "a.txt", tmp_path / "out", "--tokenizer", REPO))
    assert "tokenizer.json: no tokenizer" in message  # it is the repository's, which is none
    assert {"config.json", "tokenizer.json"} <= server.fetched()
    assert not any(name.endswith(".safetensors") for name in server.fetched())


def test_the_revision_is_honoured(server: FakeHub, client: Client, repo: Path, tmp_path: Path) -> None:
    other = make_toy(tmp_path / "other", "Flash-BF16", 42)
    server.repos[REPO]["v2"] = other
    import_hf(other, tmp_path / "expected")
    for revision in ("v2", commit_of(other)):
        assert client("import", REPO, tmp_path / revision, "--revision", revision).returncode == 0
        assert same_files(tmp_path / "expected", tmp_path / revision) == []
    assert {s.name for s in client.snapshots()} == {commit_of(other)}


def test_a_snapshot_of_links_converts_like_a_folder(client: Client, repo: Path, imported: Path, tmp_path: Path) -> None:
    # The Hub's cache keeps the files under their hashes, and snapshots of links to them.
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / ("0" * 40)
    blobs.mkdir()
    for path in (p for p in repo.rglob("*") if p.is_file()):
        blob = blobs / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copyfile(path, blob)
        link = snapshot / path.relative_to(repo)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path("../" * (1 + len(path.relative_to(repo).parts))) / "blobs" / blob.name)
    assert set(small_files(snapshot)) == set(small_files(repo)) == set(SMALL) | {"generation_config.json"}
    import_hf(snapshot, tmp_path / "out")
    assert same_files(imported, tmp_path / "out") == []
    export_hf(tmp_path / "out", tmp_path / "back", snapshot)
    assert set(same_files(repo, tmp_path / "back")) == set(UNWANTED)
    assert not any(p.is_symlink() for p in (tmp_path / "back").rglob("*"))


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("some-org/other",), "no such repository, or a private one"),
        ((REPO, "--revision", "v9"), "the repository has no revision 'v9'"),
        (("some-org/gated",), "the repository is gated; accept its terms on its page"),
        (("some-org/v41",), "some-org--v41.*the field 'text_config' is missing"),
        (("some-org/empty",), "the repository has no config.json"),
        (("some-org/pickles",), "is a pickle and may run code|no model.safetensors"),
        (("some-org/holes",), "shards that the index names are missing"),
        (("no/such/folder",), "no such file or folder"),
    ],
    ids=["repository", "revision", "gated", "other-model", "no-config", "pickles", "shard-missing", "folder"],
)
def test_what_cannot_be_had_is_said_in_one_message(
    args: tuple[str, ...], said: str, server: FakeHub, client: Client, repo: Path, tmp_path: Path
) -> None:
    def described(name: str, *files: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for file in files:
            shutil.copy(repo / file, folder)
        return folder

    server.repos["some-org/gated"] = {"main": repo}
    server.gated.add("some-org/gated")
    v41 = described("v41", "model.safetensors.index.json")
    (v41 / "config.json").write_text(json.dumps({"model_type": "deepseek_v41"}))
    server.repos["some-org/v41"] = {"main": v41}
    server.repos["some-org/empty"] = {"main": described("empty", "README.md")}
    server.repos["some-org/pickles"] = {"main": described("pickles", "config.json", "pytorch_model.bin")}
    server.repos["some-org/holes"] = {"main": described("holes", "config.json", "model.safetensors.index.json")}
    message = one_message(client("import", args[0], tmp_path / "out", *args[1:]))
    assert re.search(said, message), message
    assert not (tmp_path / "out").exists()
    assert not any(f.endswith((".safetensors", ".bin")) for f in server.fetched())


def test_a_hub_out_of_reach_is_one_message(server: FakeHub, client: Client, tmp_path: Path) -> None:
    server.stop()
    for env in ({}, {"HF_HUB_OFFLINE": "1"}):
        client.env |= env
        message = one_message(client("import", REPO, tmp_path / "out"))
        assert "the Hub cannot be reached, and the cache does not hold all that is needed" in message
    server.start()


def test_a_cache_with_half_of_the_shards_is_not_taken_for_all(server: FakeHub, client: Client, tmp_path: Path) -> None:
    assert client("import", REPO, tmp_path / "out").returncode == 0
    (snapshot,) = client.snapshots()
    shard = next(snapshot.glob("model-*"))
    shard.resolve().unlink()
    shard.unlink()
    client.env["HF_HUB_OFFLINE"] = "1"  # a connection that is down is tried again for half a minute
    message = one_message(client("import", REPO, tmp_path / "offline"))
    assert re.search("cache does not hold all|1 of 9 shards that the index names are missing", message)
    client.env["HF_HUB_OFFLINE"] = "0"
    assert client("import", REPO, tmp_path / "online").returncode == 0
    assert same_files(tmp_path / "out", tmp_path / "online") == []


def test_a_revision_of_a_local_folder_is_refused(repo: Path) -> None:
    for get in (hub.resolve, hub.describe):
        with pytest.raises(BridgeError, match="--revision is for repositories on the Hub"):
            get(str(repo), "main")
    assert hub.resolve(str(repo)) == repo
    assert hub.describe(str(repo)) == (repo, None)


# ---------------------------------------------------------------- looking without fetching


def test_inspect_and_plan_read_only_what_describes(server: FakeHub, client: Client, repo: Path) -> None:
    for verb, report in (("inspect", inspect(repo)), ("plan", plan(repo))):
        server.log.clear()
        done = client(verb, REPO, "--json")
        assert done.returncode == 0, done.stderr
        told, local = json.loads(done.stdout), json.loads(json.dumps(report.to_json()))
        assert told.pop("schema") == 1 and told.pop("verb") and told.pop("version")
        for name in ("path", "what"):
            assert told.pop(name, None) != local.pop(name, None) or name not in local
        assert told == local
        whole = sum(p.stat().st_size for p in repo.glob("*.safetensors"))
        assert all(r.range for r in server.log if "/cdn/" in r.path and r.method == "GET")
        assert server.fetched() <= {"config.json"} | {p.name for p in repo.glob("model*")}
        assert sum(r.sent for r in server.log if "/cdn/" in r.path) < whole
        assert not [p for s in client.snapshots() for p in s.rglob("*") if p.name.endswith(".safetensors")]


@pytest.fixture
def in_this_process(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """The server, for calls of this process: where the Hub is, its client reads when it is imported."""
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1,localhost")

    def url(repo: str, file: str, revision: str | None = None) -> str:
        return f"{server.url}/{repo}/resolve/{revision or 'main'}/{file}"

    monkeypatch.setattr("huggingface_hub.hf_hub_url", url)
    return server


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no-ranges"])
@pytest.mark.parametrize("first_read", [8, 1000, 1 << 20])
def test_a_header_is_read_alone_whatever_its_length(
    first_read: int, ranges: bool, in_this_process: FakeHub, repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_this_process.ranges = ranges
    monkeypatch.setattr(hub, "_FIRST_READ", first_read)
    for path in repo.glob("model-*"):
        in_this_process.log.clear()
        there, here = hub._remote_header(REPO, None, path.name), read_header(path)
        assert there._replace(stamp=()) == here._replace(stamp=())
        reads = [r for r in in_this_process.log if "/cdn/" in r.path]
        assert len(reads) == (1 if first_read > len(here.header) else 2)
        if ranges:
            assert sum(r.sent for r in reads) == min(max(first_read, len(here.header)), here.size)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"PK\x03\x04" + bytes(100), "is a pickle"),
        (b"", "the file has 0 bytes"),
        (b"\xff" * 200, "corrupt, or no safetensors file"),
        (b"\x02\0\0\0\0\0\0\0{}..", "has trailing bytes"),
    ],
    ids=["pickle", "empty", "garbage", "longer"],
)
def test_a_remote_shard_that_is_none_is_refused(
    content: bytes, said: str, in_this_process: FakeHub, tmp_path: Path
) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    in_this_process.repos[REPO]["main"] = tmp_path
    with pytest.raises(BridgeError, match=rf"{REPO}/model.safetensors: .*{said}"):
        hub._remote_header(REPO, None, "model.safetensors")


# ---------------------------------------------------------------- a server that is slow, endless or another


def _slow_head(answer: Answer) -> None:
    answer.pause = 0.2


def _slow_body(answer: Answer) -> None:
    answer.slowly = 0.2


def _bomb(answer: Answer) -> None:
    answer.body = gzip.compress(bytes(1 << 20)) * 64
    answer.headers |= {"Content-Encoding": "gzip", "Content-Length": str(len(answer.body))}


def _endless_list(answer: Answer) -> None:
    if "/tree/" in answer.path:
        again = f"http://{answer.headers.get('Host', '')}{answer.path.partition('?')[0]}?page=2"
        answer.headers["Link"] = f'<{again}>; rel="next"'


def _circle(answer: Answer) -> None:
    answer.status, answer.body = 307, b""
    answer.headers |= {"Location": answer.path, "Content-Length": "0"}


def _large(answer: Answer) -> None:
    answer.body = b'{"id": "' + b"x" * (40 << 20) + b'"}'
    answer.headers["Content-Length"] = str(len(answer.body))


def _other_form(answer: Answer) -> None:
    answer.body = b'["a page of another kind"]'
    answer.headers["Content-Length"] = str(len(answer.body))


def _much_later(answer: Answer) -> None:
    answer.status, answer.body = 503, b""
    answer.headers |= {"Retry-After": "86400", "Content-Length": "0"}


@pytest.mark.parametrize(
    ("tamper", "said"),
    [
        (_slow_head, r"the server sent [\d,]+ bytes in \d s; try again later"),
        (_slow_body, r"the server sent [\d,]+ bytes in \d s; try again later|one answer takes more than"),
        (_bomb, "the server packs its answer"),
        (_endless_list, "the list of its files has no end after 100 pages"),
        (_circle, "the server redirects more than 8 times"),
        (_large, "an answer of more than 33,554,432 bytes"),
        (_other_form, r"the server's answers are not the Hub's .*HF_ENDPOINT"),
        (_much_later, "the server asks to wait for 86400 s"),
    ],
    ids=lambda value: value.__name__[1:] if callable(value) else "",
)
def test_a_server_cannot_hold_up_or_fill_the_client(
    tamper: Callable[[Answer], None], said: str, server: FakeHub, client: Client, tmp_path: Path
) -> None:
    def tampered(answer: Answer) -> None:
        answer.headers.setdefault("Host", server.url.partition("//")[2])
        tamper(answer)

    server.tamper = tampered
    if tamper in (_slow_head, _slow_body):
        client.env["DSV4_HUB_TIMEOUT"] = "2"
    done = client("inspect", REPO)
    if tamper is _endless_list and not any("/tree/" in request.path for request in server.log):
        pytest.skip("this huggingface_hub asks for no list of so small a repository")
    assert done.returncode == 2, done.stderr
    *notes, message = done.stderr.splitlines()
    assert re.search(said, message), done.stderr
    assert all("has sent next to nothing" in note for note in notes)
    assert len(server.log) < 110


def test_a_limit_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("", "0", "-1", "1.5", "soon", "9" * 9):
        monkeypatch.setenv("DSV4_HUB_TIMEOUT", wrong)
        with pytest.raises(BridgeError, match="expected a number of seconds"):
            hub.describe("some-org/none")
