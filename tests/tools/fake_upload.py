"""A server on this machine that takes uploads as the Hugging Face Hub does, without Xet."""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit


@dataclass
class UploadHub:
    """Repositories as files, and what was sent.

    Attributes:
        repos: repository -> name -> bytes.
        objects: large objects by their SHA-256, of any repository.
        private: repositories that were made private.
        sent: digests in the order in which their bytes came.
        before: called before an object is taken, with how many there are.
        refuse: whether every write is forbidden.
    """

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    sent: list[str] = field(default_factory=list)
    before: Callable[[int], None] = lambda count: None
    refuse: bool = False
    url: str = ""
    server: Any = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _working: int = 0
    _worked: float = 0.0

    def start(self) -> None:
        hub = self

        class Handler(_Handler):
            state = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """While an object is taken."""
        with self._lock:
            self._working += 1
        try:
            yield
        finally:
            with self._lock:
                self._working -= 1
                self._worked = time.monotonic()

    def rest(self) -> None:
        """Wait until nothing has been taken for a moment: what a dead client sent may still lie in a socket."""
        while self._working or time.monotonic() - self._worked < 0.5:
            time.sleep(0.05)

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    state: UploadHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", "0")))

    def answer(self, body: Any, status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", path):
            files = self.state.repos.get(match[1])
            if files is not None:
                self.answer({"id": match[1], "sha": "0" * 40, "siblings": [{"rfilename": n} for n in files]})
                return
        self.answer({"error": "not found"}, 404)

    def do_PUT(self) -> None:
        digest = self.path.rpartition("/")[2]
        with self.state.at_work():
            data = self.body()
            if hashlib.sha256(data).hexdigest() != digest:  # the client went away half-way
                return
            self.state.before(len(self.state.objects))
            self.state.objects[digest] = data
            self.state.sent.append(digest)
        self.answer({})

    def do_POST(self) -> None:
        path, raw = urlsplit(self.path).path, self.body()
        if self.state.refuse:
            self.answer({"error": "you may not write here"}, 403)
        elif path == "/api/repos/create":
            said = json.loads(raw)
            repo = f"{said['organization']}/{said['name']}" if said.get("organization") else said["name"]
            known = repo in self.state.repos
            self.state.repos.setdefault(repo, {})
            self.state.private |= {repo} if said.get("private") and not known else set()
            self.answer({"url": f"{self.state.url}/{repo}", "id": repo}, 409 if known else 200)
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = [
                {"path": f["path"], "uploadMode": "lfs" if f["size"] > 4096 else "regular", "shouldIgnore": False}
                for f in json.loads(raw)["files"]
            ]
            self.answer({"files": files, "commitOid": "0" * 40})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = []
            for one in json.loads(raw)["objects"]:
                entry = {"oid": one["oid"], "size": one["size"]}
                if one["oid"] not in self.state.objects:
                    entry["actions"] = {"upload": {"href": f"{self.state.url}/put/{one['oid']}", "header": {}}}
                objects.append(entry)
            self.answer({"transfer": "basic", "objects": objects})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/[^/]+", path):
            files = self.state.repos[match[1]]
            for line in raw.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                elif entry["key"] == "lfsFile":
                    files[entry["value"]["path"]] = self.state.objects[entry["value"]["oid"]]
            url = f"{self.state.url}/{match[1]}/commit/{'1' * 40}"
            self.answer({"commitUrl": url, "commitOid": "1" * 40, "pullRequestUrl": None})
        else:
            self.answer({"error": f"no {path}"}, 404)
