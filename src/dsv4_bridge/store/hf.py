"""A Hugging Face checkpoint folder, bound to the plan: every tensor claimed, or an error.

Names come in five schemes, all expanded from the one table and looked up exactly:

| scheme | written by | example |
|---|---|---|
| released | DeepSeek | `layers.0.attn.wq_a.weight` |
| prefixed | some copies | `model.layers.0.attn.wq_a.weight` |
| saved | transformers `save_pretrained` | `model.layers.0.attn.norm.weight` (for kv_norm) |
| modules | the same with `save_original_format=False` | `model.layers.0.self_attn.kv_norm.weight` |
| resaved | `save_pretrained` of a model loaded from the `modules` scheme | `model.layers.0.self_attn.norm.weight` |
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import BridgeError, short, some
from ..files import AnyPath
from ..spec.encodings import ALLOWED, ENCODINGS, QUANTISED, of_shapes
from ..spec.plan import Item, Plan, architecture_of, blocks, draft_name, expand, items_of, scale_name, stored
from ..spec.spec import ModelSpec
from ..spec.v4 import V4
from ..spec.variants import recognise
from .hf_config import VISION_EXP, read_config, spec_from_config
from .safetensors import SafetensorsFolder, Shard, TensorInfo


class Bound(NamedTuple):
    """An item with its place on disk."""

    item: Item
    encoding: str
    weight: TensorInfo
    scale: TensorInfo | None
    weight_name: str
    scale_name: str | None


@dataclass(frozen=True)
class Finding:
    """One kind of disagreement between plan and folder, over all tensors of one row."""

    kind: str  # missing | unknown | shape | dtype | scale
    row: str
    names: tuple[str, ...]
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.kind:8} {some((self.row,))}: {len(self.names)} ({some(self.names)}) {self.detail}".rstrip()


@dataclass(frozen=True)
class HFCheckpoint:
    """An opened folder.

    Attributes:
        folder: its shards.
        config: parsed config.json.
        spec: its numbers (without draft blocks where the folder has none).
        scheme: how its tensors are named.
        plan: every item it should hold.
        bound: item name -> the item's place on disk; holds only what was found sound.
        encodings: encoding class -> encoding most of its tensors have.
        findings: disagreements; empty for a sound checkpoint.
    """

    folder: SafetensorsFolder
    config: Mapping[str, Any]
    spec: ModelSpec
    scheme: str
    plan: Plan
    bound: Mapping[str, Bound]
    encodings: Mapping[str, str]
    findings: tuple[Finding, ...]

    @property
    def variant(self) -> str:
        """Name of the variant, `custom (…)` for other sizes."""
        return recognise(self.spec, self.encodings, self.plan.own_mtp_head)

    def names(self) -> dict[str, tuple[Bound, bool]]:
        """Tensor name on disk -> (item, whether it is the scale)."""
        found: dict[str, tuple[Bound, bool]] = {}
        for bound in self.bound.values():
            found[bound.weight_name] = (bound, False)
            if bound.scale_name:
                found[bound.scale_name] = (bound, True)
        return found

    def close(self) -> None:
        """Close the shards."""
        self.folder.close()


_IMAGES = ("vision.", "aligner.", "image_")  # of models that see; V4 has none of them


def open_hf(
    path: AnyPath, strict: bool = True, partial: bool = False, headers: Mapping[str, Shard] | None = None
) -> HFCheckpoint:
    """Open a folder, recognise it, and bind every tensor to the plan.

    Args:
        path: folder with config.json and safetensors shards.
        strict: raise on any disagreement; otherwise return them as `findings`.
        partial: the folder holds only some tensors, in released names (passengers).
        headers: headers of its shards, where they lie elsewhere (on the Hub); their data cannot be read.

    Raises:
        BridgeError: unreadable, another model, a contradiction, or (strict) any finding.
    """
    path = Path(path)
    if not path.is_dir():
        gguf = "; GGUF files are not read" if path.suffix == ".gguf" else ""
        raise BridgeError(f"opening {path}: not a folder{gguf}; name the folder of the released safetensors")
    config = read_config(path / "config.json")
    spec = spec_from_config(config, str(path / "config.json"))
    folder = SafetensorsFolder(path, headers)
    try:
        checkpoint = _bind(folder, config, spec, partial)
        if strict and not partial and checkpoint.findings:
            raise BridgeError(findings_message(checkpoint))
    except BaseException:
        folder.close()
        raise
    return checkpoint


def finding_lines(findings: Sequence[Finding]) -> str:
    """Findings one a line; a hostile folder may have as many kinds as tensors."""
    lines = [f"  {f}" for f in findings[:200]]
    return "\n".join(lines + ([f"  … and {len(findings) - 200} more kinds"] if len(findings) > 200 else []))


def findings_message(checkpoint: HFCheckpoint) -> str:
    """All disagreements of a folder as one message."""
    lines = finding_lines(checkpoint.findings)
    hint = ""
    if any(f.kind == "missing" and f.row.startswith("mtp") for f in checkpoint.findings):
        hint = "\n(a checkpoint meant to have no MTP block says so: num_nextn_predict_layers 0 in config.json)"
    return f"opening {checkpoint.folder.path}: its tensors are not those that its config.json implies:\n{lines}{hint}"


def _bind(folder: SafetensorsFolder, config: Mapping[str, Any], spec: ModelSpec, partial: bool) -> HFCheckpoint:
    tensors = folder.tensors
    vision = [n for n in tensors if n.removeprefix("model.").startswith(_IMAGES) or n.endswith("gate.bias_vl")]
    if vision and architecture_of(spec) is V4:
        raise BridgeError(
            f"opening {folder.path}: tensor {short(vision[0])} belongs to DeepSeek-V4-Flash-Vision-Exp. {VISION_EXP}"
        )
    scheme = "released" if partial else _scheme(tensors, spec, folder.path)
    if not any(n.startswith(("mtp.", "model.mtp.")) for n in tensors) and scheme in (
        "saved",
        "modules",
        "resaved",
    ):
        spec = spec.without_draft()  # transformers drops the block on load
    _check_draft_kind(tensors, spec, folder.path)
    own_head = any(n.removeprefix("model.") == draft_name("mtp.head") for n in tensors)
    plan = expand(spec, own_head and spec.mtp_layers > 0)
    bound, findings = _claim(tensors, plan, scheme)
    encodings = _class_encodings(bound)
    if not partial and not findings:  # what is not bound has no encoding: a contradiction would not be certain
        _check_config(config, encodings, folder.path)
    return HFCheckpoint(folder, config, spec, scheme, plan, bound, encodings, findings)


def _scheme(tensors: Mapping[str, TensorInfo], spec: ModelSpec, path: Path) -> str:
    places = [b for b in blocks(spec) if b.index == 0 and b.kind in ("model", "layer")]
    probe = [i for b in places for i in items_of(spec, b) if i.expert in (None, 0)]
    schemes, name = architecture_of(spec).schemes, architecture_of(spec).name
    hits = {s: sum(disk_name(i, s, spec)[0] in tensors for i in probe) for s in schemes}
    best = max(schemes, key=lambda s: hits[s])
    if hits[best] == 0:
        raise BridgeError(
            f"opening {path}: no tensor has a {name} name (found {some(tensors) or 'none'}){_whose(tensors)}"
        )
    return best


def disk_name(item: Item, scheme: str, spec: ModelSpec) -> tuple[str, tuple[int, int] | None]:
    """Name of an item's weight under a naming scheme.

    Returns:
        The name, and `(part, parts)` where the tensor on disk stacks that many items along its
        leading axes (experts in the `modules` scheme), else None.
    """
    row, block = item.row, item.block
    if scheme == "released":
        return item.name, None
    if scheme == "prefixed" or block.kind in ("mtp", "dspark"):
        return "model." + item.name, None
    if scheme == "saved":
        if row.saved is None:
            return "model." + item.name, None
        return (row.saved if block.kind == "model" else f"model.{block.prefix}{row.saved}"), None
    name = row.transformers or item.name
    if scheme == "resaved":
        name = row.resaved or name
    if block.kind != "model":
        name = f"model.{block.prefix}{name}"
    if item.expert is None:
        return name, None
    index, count = row.part
    return name, (item.expert * count + index, spec.n_routed_experts * count)


def _claim(tensors: Mapping[str, TensorInfo], plan: Plan, scheme: str) -> tuple[dict[str, Bound], tuple[Finding, ...]]:
    bound: dict[str, Bound] = {}
    wrong: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    unclaimed = dict.fromkeys(tensors)
    for item in plan.items:
        name, stack = disk_name(item, scheme, plan.spec)
        info = tensors.get(name)
        if info is None:
            wrong["missing", item.row.key, ""].append(name)
            continue
        unclaimed.pop(name, None)
        scale = next((s for s in _scale_names(name) if s in tensors), None)
        if scale:
            unclaimed.pop(scale, None)
        fault, entry = _fit(item, name, info, stack, scale, tensors)
        if entry:
            bound[item.name] = entry
        elif fault:
            wrong[(*fault[:1], item.row.key, fault[1])].append(name)
    for name in unclaimed:
        kind = "scale" if name.endswith((".scale", "_scale_inv")) else "unknown"
        whose = _whose((name,)).removeprefix("; ")
        wrong[kind, "a scale without its weight" if kind == "scale" else _pattern(name), whose].append(name)
    return bound, tuple(Finding(k, row, tuple(names), detail) for (k, row, detail), names in wrong.items())


# Endings of names in encodings of others -> whose.
_OTHERS = {
    (".weight_scale_2", ".input_scale"): "as ModelOpt saves NVFP4 and its FP8",
    (".qweight", ".qzeros", ".g_idx"): "as AWQ and GPTQ save",
    (".weight_packed", ".weight_shape", ".weight_zero_point"): "as compressed-tensors saves",
    (".absmax", ".quant_map", ".quant_state.bitsandbytes__nf4"): "as bitsandbytes saves",
}


def _whose(names: Iterable[str]) -> str:
    """Whose encoding names are of, `""` where it is not seen."""
    found = (whose for name in names for endings, whose in _OTHERS.items() if name.endswith(endings))
    whose = next(found, None)
    return f"; {whose}, which is not read: take the release that this was made from" if whose else ""


def _scale_names(name: str) -> tuple[str, str]:
    return scale_name(name), name + "_scale_inv"


def _fit(
    item: Item,
    name: str,
    info: TensorInfo,
    stack: tuple[int, int] | None,
    scale: str | None,
    tensors: Mapping[str, TensorInfo],
) -> tuple[tuple[str, str] | None, Bound | None]:
    allowed = ALLOWED[item.row.encoding]
    beside = tensors[scale] if scale else None
    encoding = of_shapes(allowed, item.shape, info.dtype, beside and (beside.dtype, beside.shape))
    if encoding is None:
        if info.dtype in ("I8", "F8_E4M3") and item.row.encoding not in ("plain", "f32", "int"):
            if scale is None:
                return ("scale", f"is {info.dtype} and has no scale beside it"), None
            return (
                "dtype",
                f"is {info.dtype} with a {tensors[scale].dtype} scale, known are {', '.join(allowed)}",
            ), None
        return (
            "dtype",
            f"is {info.dtype}, expected {' or '.join(dict.fromkeys(ENCODINGS[a].dtype for a in allowed))}",
        ), None
    facts = stored(item, encoding)
    want = facts[0].shape
    scale_info = tensors[scale] if scale else None
    if stack:
        whole = _stacked(want, stack, item)
        if info.shape != whole:
            return ("shape", f"is {list(info.shape)}, expected {list(whole)}"), None
        info = _part(info, want, stack)
        if scale_info and ENCODINGS[encoding].scale_dtype:
            # Blocks of 128 rows that reach across two parts cannot be told apart: then this differs.
            whole = _stacked(facts[1].shape, stack, item)
            if scale_info.shape != whole:
                return ("shape", f"scale is {list(scale_info.shape)}, expected {list(whole)}"), None
            scale_info = _part(scale_info, facts[1].shape, stack)
    if info.shape != want:
        symbols = ", ".join(item.row.shape)
        return ("shape", f"is {list(info.shape)}, expected {list(want)} = [{symbols}] as {encoding}"), None
    if len(facts) == 1:
        if scale:
            return ("scale", f"is {info.dtype} and has a scale ({scale}) it should not have"), None
        return None, Bound(item, encoding, info, None, name, None)
    assert scale_info is not None
    if scale_info.shape != facts[1].shape:
        return ("shape", f"scale is {list(scale_info.shape)}, expected {list(facts[1].shape)}"), None
    return None, Bound(item, encoding, info, scale_info, name, scale)


def _stacked(shape: tuple[int, ...], stack: tuple[int, int], item: Item) -> tuple[int, ...]:
    count = item.row.part[1]
    return (stack[1] // count, shape[0] * count, *shape[1:])


def _part(info: TensorInfo, shape: tuple[int, ...], stack: tuple[int, int]) -> TensorInfo:
    part, parts = stack
    size = info.nbytes // parts
    return TensorInfo(info.dtype, shape, info.file, info.start + part * size, size)


def _pattern(name: str) -> str:
    return ".".join("N" if part.isdigit() else part for part in name.split("."))


def _class_encodings(bound: Mapping[str, Bound]) -> dict[str, str]:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for entry in bound.values():
        counts[entry.item.row.encoding][entry.encoding] += entry.item.numel
    return {cls: counter.most_common(1)[0][0] for cls, counter in counts.items()}


def mixed_encodings(checkpoint: HFCheckpoint) -> Iterator[tuple[str, str, int]]:
    """`(row key, encoding, tensors)` where a row is stored otherwise than most of its class."""
    odd = Counter(
        (b.item.row.key, b.encoding)
        for b in checkpoint.bound.values()
        if b.encoding != checkpoint.encodings[b.item.row.encoding]
    )
    for (key, encoding), count in sorted(odd.items()):
        yield key, encoding, count


def _check_draft_kind(tensors: Mapping[str, TensorInfo], spec: ModelSpec, path: Path) -> None:
    # `num_nextn_predict_layers` stays 1 in DSpark releases: the tensors decide.
    names = {n.removeprefix("model.") for n in tensors if n.removeprefix("model.").startswith("mtp.0.")}
    dspark, mtp = draft_name("dspark.main_proj") in names, draft_name("mtp.e_proj") in names
    if dspark and spec.dspark is None:
        raise BridgeError(
            f"opening {path}: its mtp.* tensors are a DSpark drafter (mtp.0.main_proj.weight), but config.json has no "
            "dspark_* keys; take the config.json of the same release"
        )
    if mtp and spec.dspark is not None:
        raise BridgeError(
            f"opening {path}: its mtp.* tensors are an MTP block (mtp.0.e_proj.weight), but config.json describes a "
            "DSpark drafter (dspark_* keys); take the config.json of the same release"
        )


def _check_config(config: Mapping[str, Any], encodings: Mapping[str, str], path: Path) -> None:
    quantization = config.get("quantization_config")
    quantization = quantization if isinstance(quantization, Mapping) else None
    stated = config.get("expert_dtype") or (quantization or {}).get("expert_dtype")
    experts, linears = encodings.get("expert"), encodings.get("linear") or encodings.get("linear32") or ""
    tile = list(ENCODINGS[linears].block) if linears in QUANTISED else [128, 128]
    known = {e.expert_dtype for e in ENCODINGS.values() if e.expert_dtype}
    problems = []
    if experts in QUANTISED and str(stated) in known and ENCODINGS[experts].expert_dtype != stated:
        problems.append(f"expert_dtype is {short(stated)}, but the experts are stored as {experts}")
    if quantization and not set(encodings.values()) & QUANTISED and quantization.get("quant_method") == "fp8":
        problems.append("it has a quantization_config, but every tensor is plain; remove that key")
    if quantization and quantization.get("weight_block_size", tile) != tile:
        problems.append(f"weight_block_size is {short(quantization['weight_block_size'])}, expected {tile}")
    if problems:
        raise BridgeError(f"opening {path}: config.json contradicts the tensors: {'; '.join(problems)}")
