"""Conversations -> samples: tokens and loss mask, cut to a length."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from ...chat.encode import MASKS as SEGMENT_MASKS
from ...chat.encode import drops_thoughts, segments_of
from ...chat.messages import Message
from ...chat.strings import THINK_END
from ...errors import BridgeError, short
from .jsonl import Conversation, mode_of
from .masks import ChatTokenizer, Tokens, tokenize_all

MASKS = (*SEGMENT_MASKS, "each_turn")
TOO_LONG = ("cut", "split", "skip", "refuse")


@dataclass(frozen=True)
class Sample:
    """One document to train on.

    Attributes:
        tokens: int32 [n], 2 <= n <= seq_length.
        loss_mask: bool [n]; `loss_mask[i]` says that token i is learned (the target at position i-1). The
            first is never set, and at least one is.
        line: of the conversation in its file.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    line: int


@dataclass
class SampleCounts:
    """What became of the conversations.

    Attributes:
        conversations: read.
        samples: made of them; `each_turn` makes several of one.
        dropped: samples left out since no learned token is in them, cut or not.
        truncated: samples that were cut, the dropped ones among them.
        split: conversations, or answers of `each_turn`, that became several samples for their length.
        too_long: the same left out for it.
        tokens: in samples.
        learned: of these, the learned ones.
        cut_tokens: cut off samples, in dropped ones or parts without a learned token, or left out for their length.
        cut_learned: of these, the learned ones.
        straddling: tokens not learned since part of their text is not, see `masks.Tokens`.
        lost_thoughts: thoughts that chat mode leaves out of the text.
        empty_thoughts: answers in thinking mode that are learned without any: the end of thoughts comes at once.
    """

    conversations: int = 0
    samples: int = 0
    dropped: int = 0
    truncated: int = 0
    split: int = 0
    too_long: int = 0
    tokens: int = 0
    learned: int = 0
    cut_tokens: int = 0
    cut_learned: int = 0
    straddling: int = 0
    lost_thoughts: int = 0
    empty_thoughts: int = 0

    def add(self, other: "SampleCounts") -> None:
        """Add another's counts to these."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


def build_samples(
    conversations: Iterable[Conversation],
    tokenizer: ChatTokenizer,
    *,
    seq_length: int,
    mask: str = "assistant",
    too_long: str = "cut",
    thinking: bool | str | None = None,
    generation: str | None = None,
    counts: SampleCounts | None = None,
    where: str = "conversations",
    left_out: list[tuple[int, str]] | None = None,
) -> Iterator[Sample]:
    """Samples of conversations, in order.

    Args:
        conversations: see `jsonl.read_chat_jsonl`.
        tokenizer: see `masks.open_chat_tokenizer`.
        seq_length: most tokens of a sample.
        mask: `assistant`, `last_turn` or `full`, see `encode.encode_segments`; or `each_turn`: where
            thoughts of earlier turns are dropped, one sample for each answer, with all that the model sees
            and says there and nothing else learned, and otherwise `assistant`.
        too_long: what becomes of more than `seq_length` tokens: `cut`, the end is lost, ids and mask together; `split`,
            they become several samples, each begins with the last token of the one before, not learned again, and
            those without a learned token are left out; `skip`, all of them are; `refuse`, an error.
        thinking: mode of conversations that do not say it, or `auto`, see `jsonl.mode_of`; None refuses those.
        generation: which releases' reasoning efforts are meant, `april` or `0731`.
        counts: counted up as samples are taken.
        where: the file's name, for messages.
        left_out: takes line and reason of what is skipped for its length.

    Raises:
        BridgeError: unusable arguments, a conversation without a mode, or one that is too long and refused.
    """
    check_options(seq_length, mask, too_long)
    counts = SampleCounts() if counts is None else counts
    for conversation in conversations:
        counts.conversations += 1
        mode, effort = mode_of(conversation, thinking, generation, where)
        split = mask == "each_turn" and drops_thoughts(conversation.messages, mode)
        parts = answers_apart(conversation.messages) if split else [conversation.messages]
        segments = [
            segments_of(part, thinking=mode, effort=effort, mask="assistant" if mask == "each_turn" else mask)
            for part in parts
        ]
        counts.lost_thoughts += 0 if mode else sum(bool(m.reasoning_content) for m in conversation.messages)
        counts.empty_thoughts += sum(
            s.role == "assistant" and s.trained and s.text.startswith(THINK_END) for part in segments for s in part
        )
        for tokens in tokenize_all(tokenizer, segments):
            counts.straddling += tokens.straddling
            line, length = conversation.line, len(tokens.ids)
            if length <= seq_length or too_long == "cut":
                if (sample := _cut(tokens, seq_length, line, counts)) is not None:
                    yield sample
                continue
            if too_long == "split":
                yield from _split(tokens, seq_length, line, counts)
                continue
            reason = f"{length:,} tokens, more than a sample's {seq_length:,}"
            if too_long == "refuse":
                choices = ", ".join(TOO_LONG[:-1])
                raise BridgeError(
                    f"reading {where}, line {line}: {reason}; give a larger --seq-length, or --too-long ({choices})"
                )
            _add_too_long(tokens, counts)
            if left_out is not None:
                left_out.append((line, reason))


def check_options(seq_length: int, mask: str, too_long: str = "cut") -> None:
    """Refuse a length below 2, an unknown mask, and an unknown choice of what is done with too long ones.

    Raises:
        BridgeError: so.
    """
    if not isinstance(seq_length, int) or seq_length < 2:
        raise BridgeError(f"building samples: seq_length {short(seq_length)}, expected at least 2 tokens")
    if mask not in MASKS:
        raise BridgeError(f"building samples: mask {short(mask)}, expected one of {', '.join(MASKS)}")
    if too_long not in TOO_LONG:
        raise BridgeError(f"building samples: too_long {short(too_long)}, expected one of {', '.join(TOO_LONG)}")


def answers_apart(messages: Sequence[Message]) -> list[tuple[Message, ...]]:
    """The conversation up to each answer, with only that answer to be learned.

    An answer is a run of assistant's messages. What follows the last of them is left out: it has no
    learned token.
    """
    found = []
    begun = 0
    for end in range(1, len(messages) + 1):
        if messages[end - 1].role != "assistant":
            begun = end
        elif end == len(messages) or messages[end].role != "assistant":
            known = (replace(m, trained=False) for m in messages[:begun])
            found.append((*known, *messages[begun:end]))
    return found or [tuple(messages)]


def _cut(tokens: Tokens, seq_length: int, line: int, counts: SampleCounts) -> Sample | None:
    length, learned = len(tokens.ids), int(tokens.mask.sum())
    ids, mask = tokens.ids[:seq_length], tokens.mask[:seq_length]
    kept = int(mask.sum())
    counts.truncated += length > seq_length
    if not kept:
        counts.dropped += 1
        counts.cut_tokens += length
        counts.cut_learned += learned
        return None
    counts.samples += 1
    counts.tokens += len(ids)
    counts.learned += kept
    counts.cut_tokens += length - len(ids)
    counts.cut_learned += learned - kept
    return Sample(ids, mask, line)


def _add_too_long(tokens: Tokens, counts: SampleCounts) -> None:
    counts.too_long += 1
    counts.cut_tokens += len(tokens.ids)
    counts.cut_learned += int(tokens.mask.sum())


def _split(tokens: Tokens, seq_length: int, line: int, counts: SampleCounts) -> Iterator[Sample]:
    """Of more than `seq_length` tokens several samples, in which every learned token is learned once."""
    counts.split += 1
    found = 0
    for start in range(0, len(tokens.ids) - 1, seq_length - 1):
        ids, mask = tokens.ids[start : start + seq_length], tokens.mask[start : start + seq_length].copy()
        mask[0] = False
        kept = int(mask.sum())
        if not kept:
            counts.cut_tokens += len(ids) - (start > 0)
            continue
        found += 1
        counts.samples += 1
        counts.tokens += len(ids)
        counts.learned += kept
        yield Sample(ids, mask, line)
    counts.dropped += not found
