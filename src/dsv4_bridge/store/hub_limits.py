"""Limits on what a server may do to the Hub's client, which by itself waits, follows and unpacks without end.

While a block of `limited` runs, every request of `huggingface_hub` is held to a pace (bytes a minute, headers
among them), API answers to a size and a time, listings to a number of pages, chains of redirects to a length,
and nothing compressed is taken: a few kilobytes may unpack to gigabytes.

Xet's transfers (`hf_xet`) go by no connection of the client and know no limit, so files come over HTTP; whoever sets
HF_HUB_DISABLE_XET=0 has chosen otherwise.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..errors import BridgeError, short

_TIMEOUT = "DSV4_HUB_TIMEOUT"
_XET = "HF_HUB_DISABLE_XET"  # set to 0, it asks for what the limits do not reach
_INSTALL = threading.Lock()


@dataclass(frozen=True)
class Limits:
    """What is borne.

    Attributes:
        tell: seconds without much, after which that is said.
        end: seconds without much, after which it is given up.
        least: bytes that count as much.
        answer: bytes of an API answer.
        pages: of a listing.
        listing: seconds for all of them.
        redirects: one behind another.
        wait: seconds that a server may ask to wait.
    """

    tell: float = 10.0
    end: float = 60.0
    least: int = 1 << 14
    answer: int = 32 << 20
    pages: int = 100
    listing: float = 300.0
    redirects: int = 8
    wait: int = 120

    @classmethod
    def from_environment(cls) -> "Limits":
        """With `end` from DSV4_HUB_TIMEOUT, where it is set.

        Raises:
            BridgeError: it is no number of seconds.
        """
        text = os.environ.get(_TIMEOUT)
        if text is None:
            return cls()
        if not (text.isascii() and text.isdecimal() and len(text) < 7 and int(text)):
            raise BridgeError(f"{_TIMEOUT} is {short(text)} in the environment, expected a number of seconds")
        end = float(text)
        return cls(tell=min(cls.tell, end / 2), end=end)


@contextlib.contextmanager
def limited(what: str, limits: Limits | None = None) -> Iterator[None]:
    """Hold `huggingface_hub` to limits in a block, on all threads.

    Args:
        what: what is fetched, for messages.
        limits: None: those of the environment.

    Raises:
        BridgeError: from within requests, where a limit is passed.
    """
    from huggingface_hub import constants, set_client_factory
    from huggingface_hub.utils import _http

    watch = _Watch(what, limits or Limits.from_environment())
    with _INSTALL:
        before = _http._GLOBAL_CLIENT_FACTORY  # there is no public way to read it
        set_client_factory(lambda: watch.client(before()))
        xet = constants.HF_HUB_DISABLE_XET
        constants.HF_HUB_DISABLE_XET = xet or _XET not in os.environ
    try:
        yield
    finally:
        with _INSTALL:
            set_client_factory(before)
            constants.HF_HUB_DISABLE_XET = xet


@dataclass
class _Watch:
    """The limits of one block, and what was used of them."""

    what: str
    limits: Limits
    pages: int = 0
    listing: float = 0.0
    told: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)
    mine: threading.local = field(default_factory=threading.local)  # of each of the client's threads

    def client(self, client: Any) -> Any:
        """A client that is watched."""
        client.headers["Accept-Encoding"] = "identity"
        hooks = client.event_hooks
        client.event_hooks = {
            "request": [*hooks.get("request", ()), self.asked],
            "response": [self.answered, *hooks.get("response", ())],
        }
        for transport in (client._transport, *client._mounts.values()):
            pool = getattr(transport, "_pool", None)
            if pool is not None:
                pool._network_backend = _Backend(pool._network_backend, self)
        return client

    def asked(self, request: Any) -> None:
        request.headers["Accept-Encoding"] = "identity"
        if "/tree/" not in request.url.path or not request.url.path.startswith("/api/"):
            return
        with self.lock:
            self.pages += 1
            self.listing = self.listing or time.monotonic()
            if self.pages > self.limits.pages or time.monotonic() - self.listing > self.limits.listing:
                raise BridgeError(
                    f"{self.what}: the list of its files has no end after {self.pages - 1} pages; is the address of "
                    "the Hub (HF_ENDPOINT) right?"
                )

    def answered(self, response: Any) -> None:
        packed = response.headers.get("Content-Encoding", "identity").strip().lower()
        if packed not in ("", "identity"):
            raise BridgeError(f"{self.what}: the server packs its answer ({short(packed)}), which was not asked for")
        self.mine.redirects = getattr(self.mine, "redirects", 0) + 1 if response.is_redirect else 0
        if self.mine.redirects > self.limits.redirects:
            raise BridgeError(f"{self.what}: the server redirects more than {self.limits.redirects} times")
        asked = response.headers.get("Retry-After", "").strip()
        if response.status_code >= 400 and asked.isdecimal() and (len(asked) > 9 or int(asked) > self.limits.wait):
            raise BridgeError(f"{self.what}: the server asks to wait for {asked[:20]} s; try again then")
        if response.request.url.path.startswith("/api/") or response.status_code >= 300:
            base = next(kind for kind in type(response.stream).__mro__ if kind.__name__ == "SyncByteStream")
            response.stream = type("Answer", (_Answer, base), {})(response.stream, self)

    def tell(self, seconds: float) -> None:
        """Say once that the server is slow."""
        with self.lock:
            told, self.told = self.told, True
        if not told:
            with contextlib.suppress(OSError, ValueError):
                print(
                    f"dsv4: {self.what}: the server has sent next to nothing for {seconds:.0f} s; waiting",
                    file=sys.stderr,
                    flush=True,
                )


class _Answer:
    """The body of an API answer: so many bytes and seconds."""

    def __init__(self, stream: Any, watch: _Watch):
        self._stream, self._watch = stream, watch

    def __iter__(self) -> Iterator[bytes]:
        left, until = self._watch.limits.answer, time.monotonic() + 2 * self._watch.limits.end
        for piece in self._stream:
            left -= len(piece)
            if left < 0:
                raise BridgeError(f"{self._watch.what}: an answer of more than {self._watch.limits.answer:,} bytes")
            if time.monotonic() > until:
                raise BridgeError(f"{self._watch.what}: one answer takes more than {2 * self._watch.limits.end:.0f} s")
            yield piece

    def close(self) -> None:
        self._stream.close()


class _Backend:
    """Makes connections whose pace is watched."""

    def __init__(self, backend: Any, watch: _Watch):
        self._backend, self._watch = backend, watch

    def connect_tcp(self, *args: Any, timeout: float | None = None, **kwargs: Any) -> Any:
        timeout = min(timeout or self._watch.limits.tell, self._watch.limits.tell)
        return _Stream(self._backend.connect_tcp(*args, timeout=timeout, **kwargs), self._watch)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


class _Stream:
    """A connection that must bring `least` bytes within `end` seconds of waiting for it, again and again.

    The count is the thread's, for after a silence the client goes on with another connection.
    """

    def __init__(self, stream: Any, watch: _Watch):
        self._stream, self._watch = stream, watch

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        limits, mine, silent = self._watch.limits, self._watch.mine, 0.0
        waited, got = getattr(mine, "waited", 0.0), getattr(mine, "got", 0)
        while True:
            began = time.monotonic()
            left = min(limits.tell, limits.end - waited, (timeout or limits.end) - silent)
            error: Exception | None = None
            piece = b""
            try:
                piece = self._stream.read(max_bytes, max(0.05, left))
            except Exception as raised:
                if type(raised).__name__ != "ReadTimeout":  # of httpcore or httpcore2, whichever the client uses
                    raise
                error = raised
            silent += time.monotonic() - began
            waited += time.monotonic() - began
            got += len(piece)
            if got >= limits.least:
                waited, got = 0.0, 0
            mine.waited, mine.got = waited, got
            if waited >= limits.end:
                raise BridgeError(
                    f"{self._watch.what}: the server sent {got:,} bytes in {waited:.0f} s; try again later "
                    f"({_TIMEOUT}=SECONDS waits longer)"
                )
            if waited >= limits.tell:
                self._watch.tell(waited)
            if error is None:
                return piece
            if timeout is not None and silent >= timeout:
                raise error

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, timeout or self._watch.limits.end)

    def start_tls(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["timeout"] = min(kwargs.get("timeout") or self._watch.limits.end, self._watch.limits.end)
        return _Stream(self._stream.start_tls(*args, **kwargs), self._watch)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
