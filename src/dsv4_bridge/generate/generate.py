"""Continue texts with a checkpoint: open it, build the model, decode, answer with a report."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import BridgeError, files_named
from ..files import AnyPath
from ..spec.spec import ModelSpec
from ..store.checkpoint import open_checkpoint
from ..text.sampling import Sampling
from ..text.tokenizer import Tokenizer, end_tokens, open_tokenizer
from ..text.tokenizer_files import has_tokenizers
from ..text.tokens import TOKENIZER
from .load import Streamed, loaded
from .stream import Heard, TextStream

DTYPES = ("float32", "bf16")


@dataclass(frozen=True)
class Ask:
    """What to continue, and how.

    Attributes:
        texts: prompts for the checkpoint's tokenizer, each behind one BOS.
        ids: prompts as token ids, taken as they are; they come behind the texts.
        max_new_tokens: of each prompt at most.
        stops: texts that end a continuation and are no part of it.
        chat: whether texts are a user's turn that the model is to answer.
        answers: texts that the continuations should begin with: none, one for all, or one a prompt.
    """

    texts: Sequence[str] = ()
    ids: Sequence[Sequence[int]] = ()
    max_new_tokens: int = 128
    stops: Sequence[str] = ()
    chat: bool = False
    answers: Sequence[str] = ()


@dataclass
class Continuation:
    """One prompt and what followed.

    Attributes:
        prompt: its text, None where ids were given.
        prompt_ids: its tokens.
        ids: the new tokens, a stop token included.
        text: of the new tokens, up to a stop text; None without a tokenizer.
        ended: `stop` or `length`.
        answer: what the text should begin with, or None.
        right: whether it does, spaces around both left out; None where nothing was asked.
    """

    prompt: str | None
    prompt_ids: list[int]
    ids: list[int] = field(default_factory=list)
    text: str | None = None
    ended: str | None = None
    answer: str | None = None
    right: bool | None = None


@dataclass(frozen=True)
class GenerateReport:
    """What came of it.

    Attributes:
        checkpoint: the folder.
        dtype: type that the model computes in.
        continuations: one a prompt, texts first.
        new_tokens: of all prompts.
        seconds: from the first token's request to the last token; loading is not in it.
        streamed: what was kept in memory and what was read, where weights stayed in the checkpoint; else None.
    """

    checkpoint: str
    dtype: str
    continuations: tuple[Continuation, ...]
    new_tokens: int
    seconds: float
    streamed: Streamed | None = None

    @property
    def right(self) -> bool:
        """Whether every asked answer was given."""
        return all(c.right is not False for c in self.continuations)

    def to_json(self) -> dict[str, Any]:
        """The report as plain data."""
        speed = round(self.new_tokens / self.seconds, 2) if self.seconds else None
        return asdict(self) | {"tokens_per_second": speed, "right": self.right}


@files_named("generating")
def generate(
    checkpoint: AnyPath,
    ask: Ask,
    sampling: Sampling | None = None,
    *,
    dtype: str = "float32",
    stream: bool | None = None,
    memory: int | None = None,
    heard: Heard = lambda row, piece, last: None,
) -> GenerateReport:
    """Continue prompts with a checkpoint of either format, in this process.

    MTP blocks and drafters are not loaded. A model that does not fit into memory stays in its checkpoint: weights are
    multiplied as they are encoded, what every token needs is kept as far as memory goes, then the experts that were
    used last, and the rest is read when it is needed.

    Args:
        checkpoint: a released folder, or a Megatron checkpoint.
        ask: the prompts.
        sampling: see `Sampling`; greedy by default.
        dtype: `float32` or `bf16`; wider weights are rounded to it. Streamed, of activations.
        stream: leave the model in its checkpoint; None: where it does not fit, or `memory` is given.
        memory: bytes that the process takes at most, about; by default most of what is free.
        heard: called at every new token of a prompt with its number, the text that is now certain
            (an id where there is no tokenizer), and whether it was the last.

    Raises:
        BridgeError: an unusable checkpoint or prompt, text without a tokenizer, or too little memory.
    """
    if dtype not in DTYPES:
        raise BridgeError(f"generating: dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    path = Path(checkpoint)
    spec, beside = _look(path)
    tokenizer = _tokenizer(beside, spec, ask)
    rows = _rows(ask, tokenizer, beside)
    ends = end_tokens(beside, spec)
    streams = [TextStream(tokenizer, ask.stops) for _ in rows] if tokenizer else []
    pieces: dict[int, str] = {}

    def stops(row: int, ids: Sequence[int]) -> bool:
        pieces[row] = streams[row].push(ids[-1])
        return streams[row].stopped

    with loaded(path, spec, dtype, stream or (True if memory is not None else stream), memory) as (model, told):
        from ..mcore import generate as steps_of

        began = time.perf_counter()
        for step in steps_of(
            model,
            [row.prompt_ids for row in rows],
            ask.max_new_tokens,
            sampling=sampling,
            stop_ids=ends,
            stops=stops if streams else None,
        ):
            for token in step:
                rows[token.row].ids.append(token.id)
                rows[token.row].ended = token.ended
                piece = pieces.pop(token.row, "") if streams else f"{token.id} "
                if token.ended and streams:
                    piece += streams[token.row].finish()
                heard(token.row, piece, token.ended is not None)
        seconds = time.perf_counter() - began
        streamed = told and told()
    for row, text in zip(rows, streams, strict=False):
        row.text = text.text
        row.right = None if row.answer is None else text.text.strip().startswith(row.answer.strip())
    return GenerateReport(str(path), dtype, tuple(rows), sum(len(r.ids) for r in rows), seconds, streamed)


def _look(path: Path) -> tuple[ModelSpec, Path]:
    """The numbers of a checkpoint, without draft blocks, and the folder of its small files."""
    with open_checkpoint(path) as checkpoint:
        return checkpoint.spec.without_draft(), checkpoint.files


def _tokenizer(folder: Path, spec: ModelSpec, ask: Ask) -> Tokenizer | None:
    """What makes text of tokens; ids alone are continued without it where its library is not installed."""
    if not (ask.texts or ask.stops or any(ask.answers) or ask.chat or has_tokenizers()):
        return None
    return open_tokenizer(folder, spec, "megatron,hf", ", or give --prompt-ids alone")


def _rows(ask: Ask, tokenizer: Tokenizer | None, folder: Path) -> list[Continuation]:
    """The prompts as tokens.

    Raises:
        BridgeError: nothing to continue, or text where there is no tokenizer.
    """
    if not ask.texts and not ask.ids:
        raise BridgeError("generating: nothing to continue; give --prompt TEXT or --prompt-ids 1,2,3")
    if ask.chat and not ask.texts:
        raise BridgeError("generating: --chat is for texts (--prompt), and --prompt-ids are taken as they are")
    if "" in ask.stops:
        raise BridgeError("generating: a stop text is empty, and would end every continuation at once")
    count = len(ask.texts) + len(ask.ids)
    if len(ask.answers) not in (0, 1, count):
        raise BridgeError(
            f"generating: {len(ask.answers)} answers for {count} prompts, expected one for all or one for each"
        )
    if tokenizer is None:
        texts = {"--prompt": ask.texts, "--stop": ask.stops, "--answer": ask.answers}
        if used := [name for name, given in texts.items() if given]:
            raise BridgeError(
                f"generating: {used[0]} is text, and {folder} has no {TOKENIZER}; put the released one there, "
                "or give --prompt-ids alone"
            )
        rows = []
    else:
        encode = tokenizer.chat if ask.chat else tokenizer.encode
        rows = [Continuation(text, encode(text)) for text in ask.texts]
    rows += [Continuation(None, list(ids)) for ids in ask.ids]
    answers = ask.answers if len(ask.answers) == count else list(ask.answers) * count
    for row, answer in zip(rows, answers, strict=False):
        row.answer = answer
    return rows
