"""Answers of a server that should be the Hub: other JSON, other headers, compressed, endless, slow, cut short."""

import gzip
import json
import os
import random
import sys
import time
from pathlib import Path

from dsv4_bridge import make_toy
from dsv4_bridge.store.hub_limits import Limits, limited
from fuzz_checkpoints import small
from mutations import mutate_bytes, mutate_json, mutate_value, to_json

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "tools"))

from fake_hub import REPO, Answer, FakeHub

_HEADERS = (
    "Content-Length",
    "Content-Range",
    "ETag",
    "Location",
    "X-Repo-Commit",
    "X-Linked-Size",
    "Link",
    "Retry-After",
)


class Answers:
    """One kind of answer is changed; the repository is then described, which lists, fetches, and reads ranges."""

    def __init__(self, folder: Path, seed: int):
        self._folder, self._seed = folder, seed
        repo = make_toy(folder / "repo", "Flash", 1, spec=small("Flash"))
        self._hub = FakeHub({REPO: {"main": repo}})
        self._hub.start()
        os.environ |= {"HF_ENDPOINT": self._hub.url, "HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "0"}
        os.environ |= {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost", "DSV4_HUB_TIMEOUT": "2"}
        os.environ["HF_HUB_DISABLE_XET"] = "1"
        from huggingface_hub import constants  # reads the environment when it is imported

        self._cache = constants
        # The client waits between its tries for seconds; here nothing recovers by waiting.
        real = time.sleep
        time.sleep = lambda seconds: real(min(seconds, 0.02))  # type: ignore[assignment]
        assert Limits.from_environment().end == 2 and limited

    def run(self, number: int) -> None:
        from dsv4_bridge.store import hub

        rng = random.Random(f"{self._seed} {number}")
        self._cache.HF_HUB_CACHE = str(self._folder / "cache" / str(number))
        self._hub.log.clear()
        where = rng.choice(("/revision/", "/tree/", "/resolve/", "/cdn/"))
        how = rng.randrange(11)
        self._hub.tamper = lambda answer: where in answer.path and _harm(answer, how, random.Random(number))  # type: ignore[assignment]
        try:
            hub.describe(REPO)
        finally:
            self._hub.tamper = lambda answer: None
        if len(self._hub.log) > 600:
            raise AssertionError(f"{len(self._hub.log)} requests")


def _harm(answer: Answer, how: int, rng: random.Random) -> None:
    sound = answer.body[:1] in (b"{", b"[")
    match how:
        case 0 | 1 | 2 if sound:
            if how == 0:
                answer.body = mutate_json(answer.body, rng)
            else:
                answer.body = to_json(mutate_value(json.loads(answer.body), rng), rng)
            answer.headers["Content-Length"] = str(len(answer.body))
        case 3:
            answer.body = gzip.compress(bytes(200 << 20) if rng.random() < 0.02 else answer.body * 50)
            answer.headers |= {"Content-Encoding": rng.choice(("gzip", "GZIP", "br", "deflate", "zstd", "gzip, gzip"))}
            answer.headers["Content-Length"] = str(len(answer.body))
        case 4:
            answer.headers["Link"] = f'<{answer.path.split("?")[0]}?page={rng.random()}>; rel="next"'
            answer.headers["Link"] = answer.headers["Link"].replace("<", f"<{os.environ['HF_ENDPOINT']}")
        case 5:
            answer.status, answer.body = rng.choice((301, 302, 307, 308)), b""
            target = f"{answer.path.split('?')[0]}?{rng.random()}"
            answer.headers |= {
                "Location": rng.choice((target, os.environ["HF_ENDPOINT"] + target, "//", "ftp://x", ""))
            }
            answer.headers["Content-Length"] = "0"
        case 6:
            answer.pause = 0.4
        case 7:
            answer.slowly = 0.4
        case 8:
            answer.body = answer.body[: len(answer.body) // 2]
        case 9:
            name = rng.choice(_HEADERS)
            value = rng.choice(("", "-1", "9" * 30, "x", "a" * 70_000, "\x1b[31m", "bytes 0-1/9", "../..", "1e9"))
            answer.headers[name] = value
        case _:
            answer.status = rng.choice((200, 204, 206, 301, 400, 401, 403, 404, 416, 429, 500, 503, 999))
            answer.body = mutate_bytes(answer.body, rng)
            answer.headers["Content-Length"] = str(len(answer.body))
