"""A server on this machine that answers as the Hugging Face Hub does."""

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

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


@dataclass
class Answer:
    """What is sent, before it is: `tamper` changes it.

    Attributes:
        path: that was asked for.
        status: of the answer.
        headers: its headers; a body of another length than they say stays so.
        body: its bytes.
        pause: seconds between two bytes of the head, where it is slow.
        slowly: seconds between two bytes of the body.
    """

    path: str
    status: int
    headers: dict[str, str]
    body: bytes
    pause: float = 0.0
    slowly: float = 0.0


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
        tamper: changes answers.
    """

    repos: dict[str, dict[str, Path]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    ranges: bool = True
    tamper: Callable[[Answer], None] = lambda answer: None
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
    told = hashlib.sha1(str(folder).encode())
    for path in sorted(folder.rglob("*")):
        told.update(digest("sha1", path).encode() if path.is_file() else b"")
    return told.hexdigest()


def digest(kind: str, path: Path) -> str:
    """Of a file's bytes, which are read again where it was replaced."""
    now = path.stat()
    return _digest(kind, path, now.st_size, now.st_mtime_ns, now.st_ino)


@cache
def _digest(kind: str, path: Path, *state: int) -> str:
    data = path.read_bytes()
    if kind == "blob":  # what Git, and so the Hub, calls a file of this content
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    return hashlib.new(kind, data).hexdigest()


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
        size = path.stat().st_size
        entry = {"type": "file", "path": name, "size": size, "oid": digest("blob", path)}
        if is_large(name):
            entry["lfs"] = {"oid": digest("sha256", path), "size": size, "pointerSize": 134}
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
                etag = f'"{digest("blob", folder / name)}"'
                self.content(data, {"ETag": etag, "X-Repo-Commit": commit})
                return
            # Weights lie on another host: a redirect that says what will come.
            headers = {
                "Location": f"{self.state.url.replace('127.0.0.1', 'localhost')}/cdn/{repo}/{commit}/{name}",
                "X-Repo-Commit": commit,
                "X-Linked-ETag": f'"{digest("sha256", folder / name)}"',
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
        said = Answer(self.path, status, headers | {"Content-Length": str(len(body))}, body)
        self.state.tamper(said)
        head = [f"{name}: {value}\r\n" for name, value in said.headers.items()]
        raw = f"HTTP/1.1 {said.status} Answer\r\n{''.join(head)}\r\n".encode("latin-1", "replace")
        try:
            self.send(raw, said.pause)
            if self.command != "HEAD":
                self.request_log.sent = len(said.body)
                self.send(said.body, said.slowly)
        except OSError:  # the client has read enough
            self.close_connection = True
        if said.headers.get("Content-Length") != str(len(said.body)):
            self.close_connection = True

    def send(self, data: bytes, pause: float) -> None:
        for piece in (data[i : i + 1] for i in range(len(data))) if pause else (data,):
            self.wfile.write(piece)
            if pause:
                time.sleep(pause)


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".pt", ".png", ".pdf"))
