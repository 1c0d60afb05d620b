"""What Megatron stores of a run beside tensors, under the configuration names of the other naming.

It is a torch.save of a dict, in `common.pt` or as an object among the tensors. Under `args` it may hold the
arguments of the run that saved it, an `argparse.Namespace` of any classes; `--use-checkpoint-args` reads them. They
are changed as a tree of what the file says (:mod:`.pickle_tree`), and nothing of it is run.
"""

import io
import zipfile
from typing import Any, Final

from ...errors import BridgeError
from ...spec.megatron import Naming
from ...spec.megatron_config import renamed_settings
from .frames import item_of
from .pickle_tree import Node, read_tree, write_tree

LEGACY_FILE: Final = "common.pt"
MOST_BYTES: Final = 256 << 20
_PICKLE: Final = "data.pkl"
_VARIANT: Final = "experimental_attention_variant"


def renamed_common_state(item: bytes, naming: Naming, where: str) -> bytes | None:
    """A common state whose stored arguments have the configuration names of `naming`.

    Args:
        item: what torch.save wrote.
        naming: the one that is wanted.
        where: it is, for messages.

    Returns:
        None where it holds no arguments of such a model, and can stay as it is.

    Raises:
        BridgeError: it is damaged, or the arguments contradict themselves.
    """
    records = _records(item, where)
    tree, protocol = read_tree(records[_PICKLE], where)
    state = tree.items[0] if _is(tree, "list") and len(tree.items) == 1 else tree
    args = state.get("args") if _is(state, "dict") else None
    if not (isinstance(args, Node) and args.named("argparse", "Namespace") and args.states):
        return None
    settings = args.states[-1]
    if not _is(settings, "dict") or settings.get(_VARIANT) != "dsv4_hybrid":
        return None
    settings.pairs = _renamed(settings.pairs, naming, f"{where}, the stored arguments")
    return item_of(records | {_PICKLE: write_tree(tree, protocol)})


def _is(value: Any, kind: str) -> bool:
    return isinstance(value, Node) and value.kind == kind


def _renamed(pairs: list[tuple[Any, Any]], naming: Naming, where: str) -> list[tuple[Any, Any]]:
    plain = {key: _plain(value) for key, value in pairs}
    nodes = {id(plain[key]): value for key, value in pairs}
    return [(k, nodes.get(id(v), _node(v))) for k, v in renamed_settings(plain, naming, where).items()]


def _plain(value: Any) -> Any:
    """A list of numbers as such."""
    if _is(value, "list") and not any(isinstance(v, Node) for v in value.items):
        return list(value.items)
    return value


def _node(value: Any) -> Any:
    return Node("list", items=list(value)) if isinstance(value, list) else value


def _records(item: bytes, where: str) -> dict[str, bytes]:
    """Record name (less the archive's) -> content."""
    try:
        with zipfile.ZipFile(io.BytesIO(item)) as archive:
            infos = archive.infolist()
            if any(i.compress_type != zipfile.ZIP_STORED or i.file_size > len(item) for i in infos):
                raise ValueError("a compressed record")
            found = {i.filename.partition("/")[2]: _content(item, i) for i in infos}
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OverflowError) as error:
        raise BridgeError(f"{where}: no usable torch.save item: {error}. Copy or save the checkpoint again") from None
    if _PICKLE not in found:
        raise BridgeError(f"{where}: no {_PICKLE} in it; expected what torch.save writes")
    return found


def _content(item: bytes, info: zipfile.ZipInfo) -> bytes:
    """A stored record's bytes; torch may write no checksum, which zipfile would miss."""
    at = info.header_offset
    if item[at : at + 4] != b"PK\3\4" or at + 30 > len(item):
        raise ValueError(f"no record at byte {at}")
    start = (
        at + 30 + int.from_bytes(item[at + 26 : at + 28], "little") + int.from_bytes(item[at + 28 : at + 30], "little")
    )
    if start + info.file_size > len(item):
        raise ValueError("a record leaves the item")
    return item[start : start + info.file_size]
