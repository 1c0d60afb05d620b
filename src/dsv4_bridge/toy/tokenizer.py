"""A toy's tokenizer.json: one token a byte, and DeepSeek-V4's special tokens."""

import json

from ..spec.spec import ModelSpec
from ..text.tokens import ASSISTANT, BOS, EOS, THOUGHT, USER

# As in the released tokenizer, those of thoughts and tool calls are visible in decoded text.
_VISIBLE = ("<think>", THOUGHT, "｜DSML｜")
_OTHERS = (USER, ASSISTANT, *_VISIBLE, "<｜latest_reminder｜>", "<｜action｜>")


def toy_tokenizer(spec: ModelSpec) -> dict[str, bytes]:
    """File name -> content of the tokenizer's files; none where the vocabulary cannot hold all bytes.

    BOS and EOS have the model's own ids, the 256 bytes and the other special tokens the ids that
    follow, as far as the vocabulary goes; ids beyond stand for nothing.
    """
    reserved = {BOS: spec.bos_token_id or 0, EOS: spec.eos_token_id}
    free = (i for i in range(spec.vocab_size) if i not in reserved.values())
    singles = dict(zip(byte_letters(), free, strict=False))
    if len(singles) < 256 or max(reserved.values()) >= spec.vocab_size or len(set(reserved.values())) < 2:
        return {}
    special = reserved | dict(zip(_OTHERS, free, strict=False))
    letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": name, **flags, "special": name not in _VISIBLE}
            for name, number in sorted(special.items(), key=lambda item: item[1])
        ],
        "normalizer": None,
        "pre_tokenizer": letters,
        "post_processor": None,
        "decoder": letters,
        "model": {"type": "BPE", "vocab": singles | special, "merges": []},
    }
    config = {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": BOS,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "model_max_length": spec.max_position_embeddings,
        "pad_token": EOS,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    files = {"tokenizer.json": tokenizer, "tokenizer_config.json": config}
    return {name: (json.dumps(body, ensure_ascii=False, indent=1) + "\n").encode() for name, body in files.items()}


def byte_letters() -> list[str]:
    """The letter that stands for each byte in a byte-level vocabulary: [256].

    Printable Latin-1 characters stand for themselves, the others for characters from U+0100 on, in
    order (the convention of GPT-2, which the `ByteLevel` parts of the tokenizers library follow).
    """
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = iter(range(0x100, 0x200))
    return [chr(byte) if byte in shown else chr(next(hidden)) for byte in range(256)]
