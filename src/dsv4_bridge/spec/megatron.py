"""Megatron's names and shapes of the model's tensors: the one place that knows them."""

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Literal, NamedTuple

from ..errors import BridgeError, short
from .plan import Item, Plan, architecture_of
from .spec import ModelSpec
from .table import ROWS

# How Megatron-LM calls the model's parameters: `gpt`, its dev branch's GPTModel; `hybrid`, main's HybridModel, where
# attention and MoE are layers of their own.
Naming = Literal["gpt", "hybrid"]
NAMINGS: tuple[Naming, ...] = ("gpt", "hybrid")


def check_naming(naming: str | None, doing: str) -> None:
    """Refuse what is no naming; `doing` says what was being done. None leaves the choice to the model."""
    if naming is not None and naming not in NAMINGS:
        raise BridgeError(f"{doing}: naming {short(naming)} is not one of {', '.join(NAMINGS)}")


class Region(NamedTuple):
    """Where (part of) an item lies in a Megatron checkpoint: a box of a global tensor."""

    key: str
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def megatron_dtype(item: Item) -> str:
    """Safetensors dtype that the Megatron side holds: BF16, F32 or I32."""
    return {"f32": "F32", "int": "I32"}.get(item.row.encoding, "BF16")


# Top-level keys of a training checkpoint that are not the model's.
_NOT_MODEL = (
    "optimizer",
    "chained_",
    "rng_state",
    "rerun_state",
    "common_state",
    "opt_param_scheduler",
    "param_groups",
)
# Extra states of modules that have none in the other model; GPTModel takes its output layer's away.
STATES_OF: Mapping[Naming, tuple[str, ...]] = {"gpt": (), "hybrid": ("output_layer._extra_state",)}
_EXPERTS = "mlp.experts."  # on disk, all experts of a layer are one tensor of `experts` in it


def of_model(key: str) -> bool:
    """Whether a checkpoint's key is the model's: not a training state, nor an extra state, whatever its form."""
    return not key.startswith(_NOT_MODEL) and "_extra_state" not in key.split("/", maxsplit=1)[0].split(".")


def naming_for(spec: ModelSpec, naming: str | None, doing: str) -> Naming:
    """The naming that was asked for, or where nothing was said the first that such a model has.

    Raises:
        BridgeError: Megatron has no such model under that naming.
    """
    architecture = architecture_of(spec)
    known: list[Naming] = [n for n in NAMINGS if n in architecture.namings]
    chosen: Naming | None = known[0] if naming is None else next((n for n in known if n == naming), None)
    if chosen is None:
        raise BridgeError(
            f"{doing}: naming {short(naming)} is not one of {', '.join(known)}, by which Megatron-LM names the tensors "
            f"of {architecture.name}; leave --naming out, or take --naming {known[0]}"
        )
    return chosen


def naming_of(keys: Iterable[str]) -> Naming:
    """How a checkpoint with these keys is named."""
    layers = (key.split(".") for key in keys if key.startswith("decoder."))
    return "hybrid" if any(w[1] == "final_norm" or w[3:4] == ["inner_layer"] for w in layers) else "gpt"


def hash_layers(keys: Iterable[str]) -> int:
    """How many decoder layers have a table of experts by token id."""
    words = (key.split(".") for key in keys if key.startswith("decoder.layers."))
    return sum(w[-2:] == ["router", "tid2eid"] for w in words)


def strange(key: str) -> str:
    """Why a key of the model is none of ours."""
    if key.endswith(("_w", "_v")):
        return "split gate/up keys (singleton_local_shards=True); save with False"
    if key.startswith("decoder.layers.") and not key.split(".")[2].isdigit():
        return "pipeline-stacked layers (hetereogenous_dist_checkpoint=False)"
    words = key.split(".")
    if words[-2:-1] == ["linear_o_group_proj"] and words[-1].removeprefix("weight").isdigit():
        return "one weight a group (mcore-bridge with fp8_param); save without it"
    if words[0] == "module":
        return "behind `module.`, as NeMo 2 saves its models; it has no DeepSeek-V4"
    if words[0] == "mtp" and words[3:4] == ["mtp_model_layer"] and words[4:5] != ["layers"]:
        return "the live name of an MTP layer's body; on disk it is transformer_layer"
    return "no tensor of this model"


def megatron_names(item: Item, naming: Naming = "gpt") -> tuple[str, ...]:
    """Names of an item's parameters behind its prefix; empty for a passenger."""
    names = item.row.hybrid if naming == "hybrid" else item.row.megatron
    if item.passenger or names is None:
        return ()
    return (names,) if isinstance(names, str) else names


def megatron_prefix(item: Item, naming: Naming = "gpt", first_layer: int = 0, body: str = "transformer_layer") -> str:
    """Prefix of an item's Megatron names.

    Args:
        item: the item.
        naming: `hybrid` has two layers a block.
        first_layer: that has number 0.
        body: what an MTP layer's own decoder layer is called under `gpt`: this on disk, `mtp_model_layer` in a live
            model.
    """
    kind, index = item.block.kind, item.block.index
    if kind not in ("layer", "mtp"):
        return item.block.prefix
    hybrid = naming == "hybrid"
    if kind == "layer":
        layer = index - first_layer
        return f"decoder.layers.{2 * layer + item.row.half if hybrid else layer}."
    inner = f"mtp_model_layer.layers.{item.row.half}." if hybrid else f"{body}."
    return f"mtp.layers.{index}." + (inner if item.row.scope == "block" else "")


def live_names(item: Item, first_layer: int = 0, expert: int | None = None, grouped: bool = False) -> tuple[str, ...]:
    """Names of an item's parameters in a live model, in the order of its `regions`.

    Args:
        item: the item; not a passenger.
        first_layer: of the pipeline chunk, which has number 0 there.
        expert: number of a routed expert on its rank.
        grouped: whether a rank's experts are one module.
    """
    prefix, several = megatron_prefix(item, "gpt", first_layer, "mtp_model_layer"), megatron_names(item)
    assert several
    if item.expert is None:
        return tuple(prefix + name for name in several)
    inner = [name.removeprefix(f"{_EXPERTS}experts.") for name in several]
    if grouped:
        return tuple(f"{prefix}{_EXPERTS}{name}{expert}" for name in inner)
    return tuple(f"{prefix}{_EXPERTS}local_experts.{expert}.{name}" for name in inner)


def megatron_keys(item: Item, naming: Naming = "gpt") -> tuple[str, ...]:
    """Keys on disk of the tensors that hold an item; empty for a passenger."""
    names = megatron_names(item, naming)
    prefix = megatron_prefix(item, naming) if names else ""
    return tuple(prefix + name for name in names)


def regions(item: Item, spec: ModelSpec, naming: Naming = "gpt") -> tuple[Region, ...]:
    """The boxes of global Megatron tensors that hold an item, in order of its rows.

    Experts lie in one tensor `[experts, rows, columns]`; gate and up are stacked by rows, gate
    first; the three-element hyper-connection scale is three tensors of one element.
    """
    row, shape, names = item.row, item.shape, megatron_names(item, naming)
    if not names:
        return ()
    prefix = megatron_prefix(item, naming)
    if len(names) != 1:
        part = (shape[0] // len(names), *shape[1:])
        zeros = (0,) * len(part)
        return tuple(Region(prefix + name, part, zeros, part) for name in names)
    key = prefix + names[0]
    index, count = row.part
    offsets = (index * shape[0], *(0,) * (len(shape) - 1))
    whole = (count * shape[0], *shape[1:])
    if item.expert is not None:
        experts = spec.n_routed_experts
        return (Region(key, (experts, *whole), (item.expert, *offsets), (1, *shape)),)
    return (Region(key, whole, offsets, shape),)


def extra_state_keys(plan: Plan, naming: Naming = "gpt") -> tuple[str, ...]:
    """Keys of the `_extra_state` objects that a Megatron loader asks for, a superset over backends."""
    keys: dict[str, None] = dict.fromkeys(f"{module}/shard_0_1" for module in STATES_OF[naming])
    for item in plan.items:
        if item.passenger or not item.row.state or item.row.part[0]:
            continue
        module = (megatron_prefix(item, naming) + megatron_names(item, naming)[0]).removesuffix(".weight")
        shard = "0_1" if item.expert is None else f"{item.expert}_{plan.spec.n_routed_experts}"
        keys[f"{module}._extra_state/shard_{shard}"] = None
    return tuple(keys)


# ---------------------------------------------------------------- from one naming to the other

_MOMENTS = ("optimizer", "state")  # then the kind of state, then the parameter's own name


def renamed(key: str, naming: Naming) -> str:
    """A checkpoint's key, a tensor's or an object's, in another naming; of training's state too.

    Args:
        key: in the other naming; what belongs to no layer may be the same in both.
        naming: the one that is wanted.

    Raises:
        BridgeError: names alone do not say what it is in that naming.
    """
    words = key.split(".")
    chained = 1 if words[0].startswith("chained_") else 0
    if tuple(words[chained : chained + 2]) == _MOMENTS and len(words) > chained + 3:
        cut = chained + 3
        return ".".join((*words[:cut], renamed(".".join(words[cut:]), naming)))
    if words[0].split("/")[0] in ("optimizer", "param_groups") or chained:
        raise BridgeError(
            f"renaming {short(key)}: a training state that is not stored by its parameter's name; save it with "
            "--dist-ckpt-optim-fully-reshardable (distrib_optim_sharding_type fully_reshardable), or rename the model "
            "alone"
        )
    if words[0] == "mtp" and words[1:2] == ["layers"] and len(words) > 4:
        return _renamed_body(key, words, naming)
    if words[:2] == ["decoder", "layers"] and len(words) > 3:
        return _renamed_layer(key, words, naming)
    old, new = _ends()[naming]
    return next((b + key[len(a) :] for a, b in zip(old, new, strict=True) if key.startswith(f"{a}.")), key)


def _renamed_layer(key: str, words: list[str], naming: Naming) -> str:
    if naming == "hybrid":
        half, name, rest = _half(key, words[3:], naming)
        return ".".join(("decoder.layers", str(2 * _number(key, words[2]) + half), name, *rest))
    layer, half = divmod(_number(key, words[2]), 2)
    _, name, rest = _half(key, words[3:], naming, half)
    return ".".join(("decoder.layers", str(layer), name, *rest))


def _renamed_body(key: str, words: list[str], naming: Naming) -> str:
    """Of an MTP layer: only its own decoder layer is called otherwise."""
    head = words[:3]
    if naming == "hybrid" and words[3] == "transformer_layer":
        half, name, rest = _half(key, words[4:], naming)
        return ".".join((*head, "mtp_model_layer.layers", str(half), name, *rest))
    if naming == "gpt" and words[3:5] == ["mtp_model_layer", "layers"] and len(words) > 6:
        _, name, rest = _half(key, words[6:], naming, _number(key, words[5]))
        return ".".join((*head, "transformer_layer", name, *rest))
    return key


def _half(key: str, words: list[str], naming: Naming, half: int = 0) -> tuple[int, str, list[str]]:
    """(half of the block, name there, what follows) of the words behind a layer's number."""
    if naming == "hybrid":
        found = _halves().get(words[0])
        if found:
            return (*found, words[1:])
    for old, (which, new) in _halves().items() if naming == "gpt" else ():
        parts = new.split(".")
        if which == half and words[: len(parts)] == parts:
            return which, old, words[len(parts) :]
    raise BridgeError(f"renaming {short(key)}: no part of a layer of this model; only DeepSeek-V4 can be renamed")


def _number(key: str, word: str) -> int:
    if not (word.isdecimal() and len(word) < 10):
        raise BridgeError(f"renaming {short(key)}: {short(word)} is no layer's number")
    return int(word)


@cache
def _halves() -> dict[str, tuple[int, str]]:
    """First word of a name in a GPT layer -> half of the block, and its words in that layer of a HybridModel."""
    found: dict[str, tuple[int, str]] = {}
    for row in ROWS:
        if row.scope == "block" and isinstance(row.megatron, str) and isinstance(row.hybrid, str):
            word, _, rest = row.megatron.partition(".")
            found[word] = row.half, row.hybrid.removesuffix(f".{rest}")
    return found


@cache
def _ends() -> dict[Naming, tuple[list[str], list[str]]]:
    """Modules in front of and behind the layers whose name differs: what it was, what it becomes."""
    rows = [r for r in ROWS if r.scope in ("first", "last") and r.megatron != r.hybrid]
    gpt = [str(row.megatron).removesuffix(".weight") for row in rows]
    hybrid = [str(row.hybrid).removesuffix(".weight") for row in rows]
    return {"hybrid": (gpt, hybrid), "gpt": (hybrid, gpt)}
