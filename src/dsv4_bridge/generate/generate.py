"""Continue texts with a checkpoint: open it, build the model, decode, answer with a report."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BridgeError, files_named
from ..files import AnyPath
from ..parallel.topology import make_topology
from ..ranks import Ranks
from ..spec.plan import expand
from ..spec.spec import ModelSpec
from ..store.checkpoint import open_checkpoint
from ..text.sampling import Sampling
from ..text.tokenizer import Tokenizer, end_tokens, open_tokenizer
from ..text.tokens import TOKENIZER
from .stream import Heard, TextStream

if TYPE_CHECKING:
    from ..mcore import DeepSeekV4Model

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
    """

    checkpoint: str
    dtype: str
    continuations: tuple[Continuation, ...]
    new_tokens: int
    seconds: float

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
    heard: Heard = lambda row, piece, last: None,
) -> GenerateReport:
    """Continue prompts with a checkpoint of either format, in this process.

    MTP blocks and drafters are not loaded.

    Args:
        checkpoint: a released folder, or a Megatron checkpoint.
        ask: the prompts.
        sampling: see `Sampling`; greedy by default.
        dtype: `float32` or `bf16`; wider weights are rounded to it.
        heard: called at every new token of a prompt with its number, the text that is now certain
            (an id where there is no tokenizer), and whether it was the last.

    Raises:
        BridgeError: an unusable checkpoint or prompt, text without a tokenizer, or too little memory.
    """
    if dtype not in DTYPES:
        raise BridgeError(f"generating: dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    path = Path(checkpoint)
    spec, beside = _look(path)
    tokenizer = open_tokenizer(beside, spec)
    rows = _rows(ask, tokenizer, beside)
    ends = end_tokens(beside, spec)
    model = _load(path, spec, dtype)
    from .. import mcore

    streams = [TextStream(tokenizer, ask.stops) for _ in rows] if tokenizer else []
    pieces: dict[int, str] = {}

    def stops(row: int, ids: Sequence[int]) -> bool:
        pieces[row] = streams[row].push(ids[-1])
        return streams[row].stopped

    began = time.perf_counter()
    for step in mcore.generate(
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
    for row, stream in zip(rows, streams, strict=False):
        row.text = stream.text
        row.right = None if row.answer is None else stream.text.strip().startswith(row.answer.strip())
    return GenerateReport(str(path), dtype, tuple(rows), sum(len(r.ids) for r in rows), seconds)


def _look(path: Path) -> tuple[ModelSpec, Path]:
    """The numbers of a checkpoint, without draft blocks, and the folder of its small files."""
    with open_checkpoint(path) as checkpoint:
        return checkpoint.spec.without_draft(), checkpoint.files


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


def _load(path: Path, spec: ModelSpec, dtype: str) -> "DeepSeekV4Model":
    try:
        from .. import mcore
    except ImportError as error:
        raise BridgeError(f"generating: {error.name} is missing; pip install 'dsv4-bridge[megatron]'") from None
    import torch

    from ..mcore.runtime import free_memory

    kind = torch.float32 if dtype == "float32" else torch.bfloat16
    ranks = Ranks.from_environment().world
    if ranks > 1:  # each holds a share of the experts, and all of the rest
        make_topology(spec, mcore.Parallel(ep=ranks))
        mcore.initialize(mcore.Parallel(ep=ranks))
    numbers = (item.numel / (1 if item.expert is None else ranks) for item in expand(spec).items)
    size = sum(numbers) * kind.itemsize
    free, where = free_memory()
    if size > free:
        hint = "" if dtype == "bf16" else "; --dtype bf16 takes half"
        whose = "a rank" if ranks > 1 else "the model"
        raise BridgeError(
            f"loading {path}: {whose} takes {size / 1e9:,.1f} GB in {dtype}, and {free / 1e9:,.1f} GB of {where} "
            f"are free{hint}"
        )
    model = mcore.build_model(spec, dtype=kind, initialize_weights=False)
    mcore.load_weights(model, path, allow_lossy=True)
    return model.eval()
