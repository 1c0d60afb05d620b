"""A window into a forward pass: watch a value, or put another in its place.

Modules call `observe(site, block, value)` at a few named places. Nothing happens unless a watcher
is set: parity reports record values with one, and replay the reference's choices of experts and
blocks with another.

| site | value |
|---|---|
| attn.mix, ffn.mix | collapsed streams in front of a sub-layer, [s, b, h] |
| attn, ffn | output of a sub-layer, [s, b, h] |
| attn.compressor | compressed entries, [b, n, head_dim] |
| attn.index | chosen blocks a query, -1 for none, [b, s, k] int64 |
| ffn.router | chosen experts a token, [tokens, top-k] int64 |
| ffn.experts | routed experts without the shared one, [s, b, h] |
| streams | streams behind a block, [s, b, n*h] |
| head | hidden states behind the final norm, [s, b, h] |
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

Watcher = Callable[[str, str, Tensor], Tensor | None]
_watchers: list[Watcher] = []


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Call `watcher(site, block, value)` during the body; what it returns, if anything, replaces the value."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def observe(site: str, block: str, value: Tensor) -> Tensor:
    """Show a value to the watchers; returns it, or what one of them put in its place."""
    for watcher in _watchers:
        replacement = watcher(site, block, value)
        if replacement is not None:
            value = replacement
    return value
