"""Token ids of a whole file against the model's vocabulary, before the first step.

Ranks that share a vocabulary leave out what is not theirs, and would leave out an id that no rank has without a
word. Each row is checked again when it is taken (`feed.Feed`): this here says it before the hours are spent.
"""

from collections.abc import Callable, Iterator

import numpy as np

from ..errors import BridgeError

# Bytes that are read of one file at most, in stretches of equal distance; what is smaller is read whole. About a
# tenth of a second from memory, a second from a disk.
LIMIT, STRETCH = 256 << 20, 1 << 20


def check_token_ids(tokens: np.ndarray, vocab_size: int, doing: str, place: Callable[[int], str]) -> None:
    """Look for ids that the model does not have: in all of the data, or, beyond `LIMIT` bytes, in samples of it.

    Args:
        tokens: [n] of any integer type, mapped or not.
        vocab_size: of the model.
        doing: what to call the work in a message, as `opening the data a`.
        place: the number of a token -> where it is, for people.

    Raises:
        BridgeError: an id below 0, as megatron's padding of -1, or beyond the vocabulary.
    """
    if np.iinfo(tokens.dtype).min >= 0 and np.iinfo(tokens.dtype).max < vocab_size:
        return  # the type holds no other
    for start, stop in stretches(len(tokens), tokens.dtype.itemsize):
        part = tokens[start:stop]
        if int(part.min()) >= 0 and int(part.max()) < vocab_size:
            continue
        at = start + int(np.flatnonzero((part < 0) | (part >= vocab_size))[0])
        raise BridgeError(f"{doing}: {unknown(int(tokens[at]), vocab_size, place(at))}")


def stretches(count: int, itemsize: int) -> Iterator[tuple[int, int]]:
    """Which of `count` values are read, as (from, to): all, or stretches from the first to the last of them."""
    wide = STRETCH // itemsize
    whole = -(-count // wide)
    reads = LIMIT // STRETCH
    if whole <= reads:
        yield from ((k * wide, min(count, (k + 1) * wide)) for k in range(whole))
        return
    for k in range(reads):
        start = k * (count - wide) // (reads - 1)
        yield start, start + wide


def unknown(token: int, vocab_size: int, where: str) -> str:
    """What is wrong with an id, and what helps."""
    if token == -1:
        return (
            f"token -1 at {where}, which is megatron-core's padding and no token, the model has 0 to "
            f"{vocab_size - 1}; make the data without padding"
        )
    return (
        f"token {token} at {where}, the model has 0 to {vocab_size - 1}; the data was made with another tokenizer: "
        "make it with the model's"
    )
