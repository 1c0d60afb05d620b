"""tokenizer.json, checked before the `tokenizers` library sees it.

That library is written for files that it wrote itself: others end in panics, in an abort of the process, or
in a pattern that takes years for a line of text. Here every part that the library would build is compared with
the parts that byte-pair tokenizers of language models are made of, field by field; another part is refused by
its name. What the library still raises, panics among it, becomes a message.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import BridgeError, short
from ..strict_json import parse_json, read_small, too_deep
from .safe_patterns import why_unsafe

_MOST_BYTES = 256 << 20
_MOST_ID = 1 << 24
_MOST_TEXT = 4096  # characters of one token, pattern or replacement
_LEVELS = 24
_AGAIN = "fetch the file again"
# A text that goes through every kind of rule: letters, digits, spaces, line breaks, other scripts, half an emoji.
_PROBE = "Hello, world!  It's 12345.\n\n\té ß 中文 \U0001f600 x=[1];"

Check = Callable[[Any], bool]


def _text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _MOST_TEXT


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _number(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MOST_ID


def _maybe(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _of(*words: str) -> Check:
    return lambda value: isinstance(value, str) and value in words


def _letter(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 1


def _pattern(value: Any) -> bool:
    if not isinstance(value, dict) or len(value) != 1 or not set(value) <= {"String", "Regex"}:
        return False
    ((kind, text),) = value.items()
    if not _text(text) or not text:
        return False
    if kind == "Regex" and (why := why_unsafe(text)):
        raise _Bad(f"the pattern {short(text)} {why}, and could take years for a line of text")
    return True


def _pieces(value: Any) -> bool:
    """Of a template: `{"Sequence": {"id": "A", "type_id": 0}}` or `{"SpecialToken": {"id": "x", "type_id": 0}}`."""
    return isinstance(value, list) and len(value) <= 64 and all(_piece(piece) for piece in value)


def _piece(value: Any) -> bool:
    if not isinstance(value, dict) or len(value) != 1 or not set(value) <= {"Sequence", "SpecialToken"}:
        return False
    ((kind, said),) = value.items()
    if not isinstance(said, dict) or set(said) != {"id", "type_id"} or not _number(said["type_id"]):
        return False
    return said["id"] in ("A", "B") if kind == "Sequence" else _text(said["id"])


def _special(value: Any) -> bool:
    return isinstance(value, dict) and len(value) <= 64 and all(_of_template(k, v) for k, v in value.items())


def _of_template(key: str, value: Any) -> bool:
    if not isinstance(value, dict) or set(value) != {"id", "ids", "tokens"} or value["id"] != key:
        return False
    ids, tokens = value["ids"], value["tokens"]
    lists = isinstance(ids, list) and isinstance(tokens, list)
    return lists and 0 < len(ids) == len(tokens) <= 64 and all(map(_number, ids)) and all(map(_text, tokens))


_SPLITS = _of("Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous")
_SCHEMES = _of("always", "never", "first")
_BYTES: Mapping[str, Check] = {"add_prefix_space": _flag, "trim_offsets": _flag, "use_regex": _flag}
_SPACES: Mapping[str, Check] = {"replacement": _letter, "prepend_scheme": _SCHEMES, "split": _flag}
# part of the file -> type -> its fields; a field of parts names what they are parts of.
_KNOWN: Mapping[str, Mapping[str, Mapping[str, Check | str]]] = {
    "normalizer": {
        "Sequence": {"normalizers": "normalizer"},
        **{name: {} for name in ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "ByteLevel")},
        "Strip": {"strip_left": _flag, "strip_right": _flag},
        "Prepend": {"prepend": lambda value: _text(value) and bool(value)},
        "Replace": {"pattern": _pattern, "content": _text},
    },
    "pre_tokenizer": {
        "Sequence": {"pretokenizers": "pre_tokenizer"},
        "Split": {"pattern": _pattern, "behavior": _SPLITS, "invert": _flag},
        "ByteLevel": _BYTES,
        "Digits": {"individual_digits": _flag},
        "Punctuation": {"behavior": _SPLITS},
        "Whitespace": {},
        "WhitespaceSplit": {},
        "Metaspace": _SPACES,
    },
    "post_processor": {
        "Sequence": {"processors": "post_processor"},
        "ByteLevel": _BYTES,
        "TemplateProcessing": {"single": _pieces, "pair": _pieces, "special_tokens": _special},
    },
    "decoder": {
        "Sequence": {"decoders": "decoder"},
        "ByteLevel": _BYTES,
        "ByteFallback": {},
        "Fuse": {},
        "Strip": {
            "content": _letter,
            "start": lambda v: _number(v) and v <= _MOST_TEXT,
            "stop": lambda v: _number(v) and v <= _MOST_TEXT,
        },
        "Replace": {"pattern": _pattern, "content": _text},
        "Metaspace": _SPACES,
    },
}
# Left out by older versions of the library.
_OPTIONAL = {"use_regex", "trim_offsets", "add_prefix_space", "prepend_scheme", "split", "behavior"}
_TOP = {"version", "truncation", "padding", "added_tokens", *_KNOWN, "model"}
_TOKEN: Mapping[str, Check] = {
    "id": _number,
    "content": lambda value: _text(value) and bool(value),
    **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), _flag),
}
_WORDS: Mapping[str, Check] = {"type": _of("WordLevel"), "unk_token": _text}
_MODEL: Mapping[str, Check] = {
    "type": _of("BPE"),
    "dropout": _maybe(lambda value: type(value) in (int, float) and 0 <= value <= 1),
    "unk_token": _maybe(_text),
    "continuing_subword_prefix": _maybe(_text),
    "end_of_word_suffix": _maybe(_text),
    **dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), _flag),
}


class _Bad(Exception):
    """What is wrong, in words."""


def has_tokenizers() -> bool:
    """Whether the `tokenizers` library is there."""
    try:
        import tokenizers  # noqa: F401
    except ImportError:
        return False
    return True


def read_tokenizer(path: Path, extras: str = "hf", hint: str = "") -> tuple[Any, bytes]:
    """The `tokenizers.Tokenizer` of a tokenizer.json, without truncation and padding, and the file's bytes.

    Args:
        path: the file.
        extras: of the package, that bring all that is needed from here on.
        hint: what to do without the library, besides installing it.

    Raises:
        BridgeError: unreadable, not of a kind that is known to be safe, or the library is missing.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise BridgeError(
            f"reading {path}: the tokenizers library is missing; pip install 'dsv4-bridge[{extras}]'{hint}"
        ) from None
    raw = read_small(path, _MOST_BYTES, "give the folder of a checkpoint")
    checked = _checked(path, raw)
    library = guarded(f"reading {path}: no tokenizer", _AGAIN, lambda: _opened(Tokenizer, checked))
    return library, raw


def _opened(kind: Any, checked: bytes) -> Any:
    library = kind.from_buffer(checked)
    library.decode(library.encode(_PROBE, add_special_tokens=True).ids, skip_special_tokens=True)
    return library


def guarded[T](doing: str, hint: str, call: Callable[[], T]) -> T:
    """What `call` returns; whatever the library raises, as a BridgeError. Its panics are no `Exception`."""
    try:
        return call()
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError, BridgeError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise BridgeError(f"{doing} ({said})" + (f"; {hint}" if hint else "")) from None


def _checked(path: Path, raw: bytes) -> bytes:
    """The file as the library may have it.

    Whoever saved it may have had batches in mind: a text is taken whole, and alone.
    """
    at = f"reading {path}: "
    try:
        body = parse_json(raw, str(path))
    except BridgeError as error:
        raise BridgeError(f"{at}no tokenizer ({str(error).removeprefix(at)}); {_AGAIN}") from None
    try:
        shallow = {name: value for name, value in body.items() if name not in ("model", "added_tokens")}
        if too_deep(shallow, _LEVELS, 1 << 16):
            raise _Bad("it nests too deep, or is too long")
        if unknown := sorted(body.keys() - _TOP):
            raise _Bad(f"it has {short(unknown[0])}, expected {', '.join(sorted(_TOP))}")
        _model(body.get("model"))
        _added(body.get("added_tokens"))
        for name in _KNOWN:
            _part(name, body.get(name), name)
    except _Bad as bad:
        raise BridgeError(f"{at}no tokenizer of a kind that is read here: {bad}; {_AGAIN}") from None
    if body.get("truncation") is None and body.get("padding") is None:
        return raw
    return json.dumps(body | {"truncation": None, "padding": None}, ensure_ascii=False).encode()


def _part(kind: str, value: Any, where: str) -> None:
    """A part of the file, and the parts in it."""
    if value is None:
        return
    named = value.get("type") if isinstance(value, dict) else None
    if not isinstance(named, str) or named not in _KNOWN[kind]:
        what = short(named) if isinstance(value, dict) else short(value)
        raise _Bad(f"{where} is {what}, expected one of {', '.join(_KNOWN[kind])}")
    fields = _KNOWN[kind][named]
    for name in sorted(value.keys() - {"type", *fields}):
        if value[name] is not None and not (named == "Metaspace" and name == "add_prefix_space" and _flag(value[name])):
            raise _Bad(f"{where}: {named} has {short(name)}, expected {', '.join(fields) or 'no fields'}")
    for name, check in fields.items():
        at = f"{where}.{name}"
        if name not in value and name in _OPTIONAL:
            continue
        inner = value.get(name)
        if isinstance(check, str):
            if not isinstance(inner, list) or len(inner) > 64:
                raise _Bad(f"{at} is {short(inner)}, expected a short list")
            for number, part in enumerate(inner):
                if part is None:
                    raise _Bad(f"{at} holds nothing at {number}")
                _part(check, part, f"{at}[{number}]")
        elif not check(inner):
            raise _Bad(f"{at} is {short(inner)}")


def _model(model: Any) -> None:
    if not isinstance(model, dict):
        raise _Bad(f"model is {short(model)}, expected a byte-pair model")
    named = model.get("type", "BPE")
    if named not in ("BPE", "WordLevel"):
        raise _Bad(f"model.type is {short(named)}, expected 'BPE'")
    fields = _MODEL if named == "BPE" else _WORDS
    for name, value in model.items():
        if name not in ("vocab", "merges") and (name not in fields or not fields[name](value)):
            raise _Bad(f"model.{name if name in fields else short(name)} is {short(value)}")
    vocab, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocab, dict) or not vocab:
        raise _Bad(f"model.vocab is {short(vocab)}, expected tokens and their ids")
    for token, number in vocab.items():
        if type(number) is not int or not 0 <= number < _MOST_ID or len(token) > _MOST_TEXT:
            raise _Bad(f"model.vocab gives {short(token)} the id {short(number)}")
    if named == "WordLevel":
        merges = merges or []
    if not isinstance(merges, list):
        raise _Bad(f"model.merges is {short(merges)}, expected a list of pairs")
    prefix = len(model.get("continuing_subword_prefix") or "")
    for pair in merges:
        two = pair.split(" ") if isinstance(pair, str) else pair
        if not isinstance(two, list) or len(two) != 2 or not (isinstance(two[0], str) and isinstance(two[1], str)):
            raise _Bad(f"model.merges holds {short(pair)}, expected pairs of tokens")
        if two[0] not in vocab or two[1] not in vocab or two[0] + two[1][prefix:] not in vocab:
            raise _Bad(f"model.merges holds {short(pair)}, of which model.vocab has not all")


def _added(tokens: Any) -> None:
    if tokens is None:
        return
    if not isinstance(tokens, list):
        raise _Bad(f"added_tokens is {short(tokens)}, expected a list")
    for token in tokens:
        if not isinstance(token, dict) or set(token) != set(_TOKEN):
            raise _Bad(f"added_tokens holds {short(token)}, expected {', '.join(_TOKEN)}")
        for name, check in _TOKEN.items():
            if not check(token[name]):
                raise _Bad(f"added_tokens: {name} is {short(token[name])}")
