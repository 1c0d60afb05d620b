"""Ways to harm the bytes, the values and the formats of a checkpoint, at random."""

import json
import pickletools
import random
import struct
from collections.abc import Iterator
from typing import Any

import yaml

# ---------------------------------------------------------------- mutations of bytes

_TOKENS = (
    b"\x00",
    b"\xff",
    b"{",
    b"}",
    b"[",
    b'"',
    b"\\u",
    b"\\ud800",
    b"-",
    b"1e400",
    b"NaN",
    b"\n",
    b"\xef\xbb\xbf",
    b"../",
)


def mutate_bytes(data: bytes, rng: random.Random, span: int | None = None) -> bytes:
    """A few flips, cuts, insertions, copies; within the first `span` bytes."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        span_now = min(span or len(out), len(out))
        at = rng.randrange(span_now) if span_now else 0
        match rng.randrange(8):
            case 0 if out:
                out[at] ^= 1 << rng.randrange(8)
            case 1 if out:
                out[at] = rng.randrange(256)
            case 2:
                out = out[:at]
            case 3:
                out[at:at] = rng.randbytes(rng.choice((1, 2, 8, 64)))
            case 4:
                out[at:at] = rng.choice(_TOKENS) * rng.choice((1, 1, 3, 2000))
            case 5:
                del out[at : at + rng.choice((1, 2, 8, 100))]
            case 6:
                length = rng.choice((1, 4, 16, 200))
                here = rng.randrange(span_now) if span_now else 0
                out[at : at + length] = out[here : here + length]
            case _:
                width = rng.choice((2, 4, 8))
                out[at : at + width] = rng.choice((0, 1, (1 << (8 * width - 1)) - 1, (1 << (8 * width)) - 1)).to_bytes(
                    width, "little"
                )
    return bytes(out)


# ---------------------------------------------------------------- mutations of JSON and YAML values

DEEP = 3000


class Raw(str):
    """JSON text that goes out as it is."""


def odd_value(rng: random.Random) -> Any:
    """A value that belongs nowhere."""
    text = (
        "",
        "a" * 5000,
        "\ud800",
        "é\n\x1b[31m",
        "../../x",
        "/etc/passwd",
        "nan",
        "BF16",
        "[/red]",
        "\0",
        "layers.0",
    )
    numbers = (0, -1, 1, 2, 3, 127, 1 << 31, 1 << 62, 1 << 63, (1 << 64) + 1, 10**60, -(10**30), 0.5, 1e308, -0.0)
    raws = (
        "NaN", "Infinity", "-Infinity", "1e400", "-1e400", "1" * 4000, "1" * 5000, "1e-400", "[" * DEEP + "]" * DEEP,
        '{"a":' * DEEP + "1" + "}" * DEEP, "[" * 90 + "]" * 90, '{"a":1,"a":2}', "[1,,2]", "nul", "'x'", '"\\ud800"',
    )  # fmt: skip
    kind = rng.randrange(6)
    if kind == 0:
        return rng.choice(text)
    if kind == 1:
        return rng.choice(numbers)
    if kind == 2:
        return Raw(rng.choice(raws))
    if kind == 3:
        return rng.choice((None, True, False, [], {}, [[]], {"": None}))
    if kind == 4:
        return [rng.choice(numbers) for _ in range(rng.choice((1, 2, 3, 20, 5000)))]
    return {rng.choice(text): rng.choice(numbers) for _ in range(rng.choice((1, 2, 50)))}


def places(value: Any, limit: int = 20_000) -> list[tuple[Any, Any]]:
    """(container, key) of every place in a value."""
    found: list[tuple[Any, Any]] = []
    stack = [value]
    while stack and len(found) < limit:
        node = stack.pop()
        pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, inner in pairs:
            found.append((node, key))
            stack.append(inner)
    return found


def mutate_value(value: Any, rng: random.Random) -> Any:
    """`value` (plain, mutable) with a few places changed, added, removed or exchanged."""
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        found = places(value)
        if not found:
            return odd_value(rng)
        node, key = rng.choice(found)
        match rng.randrange(9):
            case 0 | 1 | 2:
                node[key] = odd_value(rng)
            case 3:
                del node[key]
            case 4:
                other, there = rng.choice(found)
                if there in other if isinstance(other, dict) else there < len(other):
                    node[key] = json.loads(json.dumps(other[there], default=str))
            case 5 if isinstance(node, dict):
                node[rng.choice(("", "x" * 300, "\ud800", "vision_config", "text_config", "layer_types", "a\nb"))] = (
                    odd_value(rng)
                )
            case 6 if isinstance(node, dict):
                node[str(key) + rng.choice(("x", ".scale", "_scale_inv", "\0", "é"))] = node.pop(key)
            case 7 if isinstance(node, list):
                node.extend([node[-1]] * rng.choice((1, 2, 100)))
            case _ if isinstance(node[key], int) and not isinstance(node[key], bool):
                node[key] += rng.choice((-1, 1, 2, 128, -(1 << 20), 1 << 40, -node[key] * 2))
            case _:
                node[key] = odd_value(rng)
    return value


def to_json(value: Any, rng: random.Random) -> bytes:
    """JSON text; `Raw` strings go out bare, and now and then a name is given twice."""

    def text(node: Any) -> str:
        if isinstance(node, Raw):
            return str(node)
        if isinstance(node, dict):
            pairs = [f"{json.dumps(k)}:{text(v)}" for k, v in node.items()]
            if pairs and rng.random() < 0.003:
                pairs.append(rng.choice(pairs))
            return "{" + ",".join(pairs) + "}"
        if isinstance(node, list):
            return "[" + ",".join(text(v) for v in node) + "]"
        return json.dumps(node)

    return text(value).encode("utf-8", "surrogatepass")


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """A JSON file, changed as a value or, less often, as bytes."""
    if rng.random() < 0.3:
        return mutate_bytes(data, rng)
    return to_json(mutate_value(json.loads(data), rng), rng)


_YAML = (
    "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b]\n"
    "d: &d [*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d]\nf: &f [*e,*e,*e,*e,*e,*e,*e,*e]\n"
    "g: &g [*f,*f,*f,*f,*f,*f,*f,*f]\nh: &h [*g,*g,*g,*g,*g,*g,*g,*g]\n",
    "x: !!python/object/apply:os.system ['true']\n",
    "x: !!python/name:os.system\n",
    "x: !!int ''\n",
    "x: !!float ''\n",
    "x: !!bool maybe\n",
    "x: !!timestamp x\n",
    "x: 2024-99-99\n",
    "x: !!binary '*'\n",
    "x: &x [*x]\n",
    "? [a, b]\n: c\n",
    "? {a: b}\n: c\n",
    "<<: 3\n",
    "x: " + "[" * 400 + "]" * 400 + "\n",
    "x: 0x" + "f" * 20_000 + "\n",
    "x: " + "9" * 6000 + "\n",
    "x: 1:1:1:1:1:1:1:1:1:1\n",
    'x: "\\ud800"\n',
    'x: "\\U00110000"\n',
    "--- \n---\n",
    "%YAML 9.9\n---\n",
    "\tx: y\n",
)
_BOMB_TARGETS = ("num_hidden_layers", "compress_ratios", "rope_scaling", "model_type", "variant", "format", "source")


def mutate_yaml(data: bytes, rng: random.Random) -> bytes:
    """run_config.yaml, changed as a value, as bytes, by a hostile line, or by an alias to a bomb."""
    choice = rng.random()
    if choice < 0.3:
        return mutate_bytes(data, rng)
    lines = data.decode().splitlines(keepends=True)
    if choice < 0.5:
        lines.insert(rng.randrange(len(lines) + 1), rng.choice(_YAML))
        return "".join(lines).encode()
    if choice < 0.65:
        name = rng.choice(_BOMB_TARGETS)
        text = "".join(line.split(":")[0] + ": *h\n" if line.strip().startswith(name) else line for line in lines)
        return (_YAML[0] + text).encode()
    value = mutate_value(yaml.safe_load(data), rng)
    return to_json(value, rng) if rng.random() < 0.5 else yaml.safe_dump(_bare(value)).encode("utf-8", "replace")


def _bare(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _bare(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_bare(v) for v in value]
    return str(value) if isinstance(value, str) else value


# ---------------------------------------------------------------- mutations of the formats


def mutate_shard(data: bytes, rng: random.Random) -> bytes:
    """A safetensors shard: its length, its header as JSON or bytes, its data."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = data[8 : 8 + length], data[8 + length :]
    choice = rng.random()
    if choice < 0.1:
        claim = rng.choice((0, 1, length - 1, length + 1, len(data), 1 << 27, 1 << 40, (1 << 64) - 1))
        return struct.pack("<Q", claim) + data[8:]
    if choice < 0.2:
        return mutate_bytes(data, rng)
    if choice < 0.35:
        header = mutate_bytes(header, rng)
    else:
        header = to_json(mutate_value(json.loads(header), rng), rng)
    if rng.random() < 0.05:
        body = body[: rng.randrange(len(body) + 1)]
    return struct.pack("<Q", len(header)) + header + body


_HOSTILE = (
    b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.",
    b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85R.",
    b"\x80\x02]" + b"2" * 64 + b".",
    b"\x80\x02" + b"(" * 50_000 + b".",
    b"\x80\x02)" + b"\x85" * 50_000 + b".",
    b"\x80\x02]" + b"q\x00h\x00\x86" * 200 + b".",
    b"\x80\x02X\xff\xff\xff\x7f.",
    b"\x80\x02\x8d" + b"\xff" * 8 + b".",
    b"\x80\x02}" + b"(" + b"K\x01K\x02" * 1000 + b"u.",
    b"",
    b".",
)


def mutate_pickle(data: bytes, rng: random.Random) -> bytes:
    """A pickle: bytes, or opcodes deleted, doubled, exchanged, replaced, with another argument."""
    choice = rng.random()
    if choice < 0.05:
        return rng.choice(_HOSTILE)
    if choice < 0.35:
        return mutate_bytes(data, rng)
    starts = [at for _, _, at in pickletools.genops(data)]
    ops = [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)])]
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(ops))
        match rng.randrange(8):
            case 0:
                del ops[at]
            case 1:
                ops.insert(at, ops[at])
            case 2:
                other = rng.randrange(len(ops))
                ops[at], ops[other] = ops[other], ops[at]
            case 3:
                ops[at] = ops[rng.randrange(len(ops))]
            case 4:
                ops[at] = bytes([rng.randrange(256)]) + ops[at][1:]
            case 5:
                ops.insert(
                    at,
                    rng.choice(
                        (
                            b"\x8a\x10" + b"\x7f" * 16,
                            b"J\xff\xff\xff\xff",
                            b"N",
                            b"]",
                            b"}",
                            b")",
                            b"G" + b"\x7f\xf0" + b"\0" * 6,
                        )
                    ),
                )
            case 6:
                ops[at] = mutate_bytes(ops[at], rng)
            case _:
                # An integer becomes another: sizes, offsets, lengths.
                ints = [i for i, op in enumerate(ops) if op[:1] in (b"K", b"M", b"J", b"\x8a")]
                if ints:
                    ops[rng.choice(ints)] = rng.choice(
                        (
                            b"K\x00",
                            b"K\x01",
                            b"M\xff\xff",
                            b"J\xff\xff\xff\x7f",
                            b"J\xff\xff\xff\xff",
                            b"\x8a\x08" + b"\xff" * 7 + b"\x7f",
                            b"\x8a\xff" + b"\x01" * 255,
                        )
                    )
        if not ops:
            return b""
    return b"".join(ops)


def mutate_items(data: bytes, rng: random.Random) -> bytes:
    """A .distcp file: bytes near the zip records of its items, or their pickles; its length stays mostly."""
    marks = [i for m in (b"PK\3\4", b"PK\1\2", b"PK\5\6", b"PK\6\6", b"PK\6\7", b"\x80\x02c") for i in _find(data, m)]
    out = bytearray(data)
    for _ in range(rng.choice((1, 2, 4, 40))):
        at = max(0, rng.choice(marks) + rng.randrange(-8, 120))
        piece = mutate_bytes(bytes(out[at : at + 64]), rng)
        piece = piece[:64].ljust(min(64, len(out) - at), b"\0") if rng.random() < 0.9 else piece
        out[at : at + 64] = piece
    return bytes(out)


def _find(data: bytes, mark: bytes) -> Iterator[int]:
    at = data.find(mark)
    while at >= 0:
        yield at
        at = data.find(mark, at + 1)


def mutate_tracker(data: bytes, rng: random.Random) -> bytes:
    """latest_checkpointed_iteration.txt."""
    words = (b"", b"release", b"-1", b"1e9", b"9" * 30, b"../../x", b"\xff\xfe", b"0\n0", b"\xd9\xa3", b"0" * 17)
    return rng.choice(words) if rng.random() < 0.7 else mutate_bytes(data, rng)
