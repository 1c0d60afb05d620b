"""Repositories on the Hugging Face Hub, from a server on this machine that answers as the Hub does."""

import hashlib
import json
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from conftest import dsv4, same_files
from dsv4_bridge import BridgeError, export_hf, hub, import_hf, inspect, make_toy, plan
from dsv4_bridge.small_files import small_files
from dsv4_bridge.store.safetensors import read_header

REPO = "some-org/V4-toy"
SMALL = {
    "tokenizer.json": b'{"model": {}}',
    "tokenizer_config.json": b'{"bos_token": "b"}',
    "chat_template.jinja": b"{{ messages }}",
    "LICENSE": b"MIT",
    "README.md": b"# toy",
    "encoding/encoding_dsv4.py": b"print('chat')",
    "encoding/tests/test_input_1.json": b"[]",
    "inference/model.py": b"print('model')",
    "inference/config.json": b"{}",
}
# Real repositories have these too; nothing reads them.
UNWANTED = {
    ".gitattributes": b"*.safetensors filter=lfs",
    "assets/figure.png": b"\x89PNG",
    "readme_pictures/figure.png": b"\x89PNG",
    "DeepSeek_V4.pdf": b"%PDF",
    "pytorch_model.bin": b"PK\x03\x04",
    "tokenizer/model.bin": b"PK\x03\x04",
    "inference/weights.pt": b"PK\x03\x04",
    "optimizer.safetensors": b"\x02\0\0\0\0\0\0\0{}",
    "original/consolidated.safetensors": b"\x02\0\0\0\0\0\0\0{}",
}


FILE = re.compile(r"/[^/]+/[^/]+/resolve/[^/]+/(.+)|/cdn/[^/]+/[^/]+/[^/]+/(.+)")


@dataclass
class Request:
    """One request and what it cost."""

    method: str
    path: str
    range: str
    sent: int = 0


@dataclass
class FakeHub:
    """Repositories as folders, and the log of what was asked.

    Attributes:
        repos: repository -> revision -> folder.
        gated: repositories whose files nobody may read.
        ranges: whether the content server honours Range.
    """

    repos: dict[str, dict[str, Path]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    ranges: bool = True
    log: list[Request] = field(default_factory=list)
    url: str = ""
    server: Any = None

    def start(self) -> None:
        hub = self

        class Handler(_Handler):
            state = hub

        port = int(self.url.rpartition(":")[2]) if self.url else 0
        for attempt in range(50):  # another process may hold the port for a moment as its own end of a connection
            try:
                self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
                break
            except OSError:
                if attempt == 49:
                    raise
                time.sleep(0.2)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fetched(self) -> set[str]:
        """Files of repositories that were read, whole or in part."""
        places = (FILE.fullmatch(r.path) for r in self.log if r.method == "GET")
        return {unquote(place[1] or place[2]) for place in places if place}


def commit_of(folder: Path) -> str:
    digest = hashlib.sha1(str(folder).encode())
    for path in sorted(folder.rglob("*")):
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()


class _Handler(BaseHTTPRequestHandler):
    state: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.respond()

    def do_GET(self) -> None:
        self.respond()

    def respond(self) -> None:
        path = urlsplit(self.path).path
        self.request_log = Request(self.command, path, self.headers.get("Range", ""))
        self.state.log.append(self.request_log)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            self.api(match[1], match[2] or "revision", unquote(match[3] or "main"))
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.file(match[1], unquote(match[2]), unquote(match[3]))
        elif match := re.fullmatch(r"/cdn/([^/]+/[^/]+)/([0-9a-f]{40})/(.+)", path):
            folder = self.folder(match[1], match[2])
            assert folder
            self.content((folder / unquote(match[3])).read_bytes(), {}, ranges=self.state.ranges)
        else:
            self.fail(404, "")

    def folder(self, repo: str, revision: str) -> Path | None:
        revisions = self.state.repos.get(repo)
        if revisions is None:
            self.fail(401, "RepoNotFound")
            return None
        by_commit = {commit_of(f): f for f in revisions.values()}
        found = revisions.get(revision) or by_commit.get(revision)
        if found is None:
            self.fail(404, "RevisionNotFound")
        return found

    def api(self, repo: str, what: str, revision: str) -> None:
        folder = self.folder(repo, revision)
        if folder is None:
            return
        commit, files = commit_of(folder), sorted(p for p in folder.rglob("*") if p.is_file())
        names = {str(p.relative_to(folder)): p for p in files}
        if what == "revision":
            answer: Any = {"id": repo, "modelId": repo, "sha": commit, "siblings": [{"rfilename": n} for n in names]}
        else:
            answer = [self.entry(name, path) for name, path in names.items()]
        self.content(json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def entry(self, name: str, path: Path) -> dict[str, Any]:
        data = path.read_bytes()
        entry = {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        if is_large(name):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return entry

    def file(self, repo: str, revision: str, name: str) -> None:
        folder = self.folder(repo, revision)
        if folder is None:
            return
        if repo in self.state.gated:
            self.fail(403, "GatedRepo")
        elif not (folder / name).is_file():
            self.fail(404, "EntryNotFound", {"X-Repo-Commit": commit_of(folder)})
        else:
            data, commit = (folder / name).read_bytes(), commit_of(folder)
            if not is_large(name):
                etag = f'"{hashlib.sha1(data).hexdigest()}"'
                self.content(data, {"ETag": etag, "X-Repo-Commit": commit})
                return
            # Weights lie on another host: a redirect that says what will come.
            headers = {
                "Location": f"{self.state.url.replace('127.0.0.1', 'localhost')}/cdn/{repo}/{commit}/{name}",
                "X-Repo-Commit": commit,
                "X-Linked-ETag": f'"{hashlib.sha256(data).hexdigest()}"',
                "X-Linked-Size": str(len(data)),
            }
            self.answer(302, headers, b"")

    def content(self, data: bytes, headers: dict[str, str], ranges: bool = True) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked or not ranges:
            self.answer(200, headers, data)
            return
        start, stop = int(asked[1]), min(int(asked[2] or len(data)) + 1, len(data))
        self.answer(206, headers | {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}, data[start:stop])

    def fail(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self.answer(status, (headers or {}) | ({"X-Error-Code": code} if code else {}), b"")

    def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.request_log.sent = len(body)
            try:
                self.wfile.write(body)
            except OSError:  # the client has read enough
                self.close_connection = True


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".pt", ".png", ".pdf"))


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
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    for path in (p for p in repo.rglob("*") if p.is_file()):
        blob = blobs / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copyfile(path, blob)
        link = snapshot / path.relative_to(repo)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path("../" * len(path.relative_to(repo).parts)) / "blobs" / blob.name)
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
        (("some-org/v41",), "some-org/v41: config.json: this is DeepSeek-V4.1"),
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
    assert "cache does not hold all" in message
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
