"""A walk on disk, to be gone on with: streams and findings behind the last layer that was finished."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BridgeError
from ..files import make_folder, move, sync
from ..strict_json import parse_json
from .metrics import Choice, Difference
from .result import SiteResult, Step
from .tables import Table
from .walk import State, Way

_FILE = "walk.pt"


def fingerprint(facts: dict[str, Any], files: list[Path], ids: Tensor) -> str:
    """What a walk is of: its settings, its tokens, and its files by name, size and time."""
    told = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(files)]
    text = json.dumps([facts, told, ids.tolist()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def save(folder: Path, state: State, of: str) -> None:
    """Keep a state in a folder; the one before is replaced when it is there whole.

    Raises:
        OSError: it cannot be written.
    """
    make_folder(folder)
    facts = {
        "of": of,
        "next": state.next,
        "tables": [asdict(table) for table in state.tables],
        "steps": [asdict(step) for step in state.steps],
        "ways": [{"topk": way.topk, "sites": _plain(way.sites), "replays": _plain(way.replays)} for way in state.ways],
    }
    tensors = [
        {name: value for name in ("ids", "theirs", "free", "replayed") if (value := getattr(way, name)) is not None}
        for way in state.ways
    ]
    part = folder / f"{_FILE}.part"
    torch.save({"facts": json.dumps(facts), "tensors": tensors}, part)
    sync(part)
    move([(part, folder / _FILE)])


def load(folder: Path, of: str, device: torch.device) -> State | None:
    """The state that a folder holds, or None.

    Raises:
        BridgeError: it is of another comparison, or damaged.
    """
    path = folder / _FILE
    if not path.is_file():
        return None
    advice = f"give another --work folder, or remove {path}"
    try:
        held = torch.load(path, map_location=device, weights_only=True)
        facts = parse_json(held["facts"].encode(), str(path))
        if facts["of"] != of:
            raise BridgeError(f"going on from {path}: it is of other files, tokens or settings; {advice}")
        ways = [
            Way(
                tensors["ids"].cpu(),
                way["topk"],
                tensors["theirs"],
                tensors["free"],
                tensors.get("replayed"),
                [_site(s) for s in way["sites"]],
                [_site(s) for s in way["replays"]],
            )
            for way, tensors in zip(facts["ways"], held["tensors"], strict=True)
        ]
        tables, steps = [Table(**t) for t in facts["tables"]], [Step(**s) for s in facts["steps"]]
        return State(facts["next"], ways, tables, steps)
    except BridgeError:
        raise
    except Exception as error:  # torch says in many ways that a file is not one of its own
        raise BridgeError(f"going on from {path}: it cannot be read ({type(error).__name__}); {advice}") from None


def _plain(sites: list[SiteResult]) -> list[dict[str, Any]]:
    return [{"layer": s.layer, "site": s.site, "table": s.table, "found": asdict(s.found)} for s in sites]


def _site(plain: dict[str, Any]) -> SiteResult:
    kind = Choice if "queries" in plain["found"] else Difference
    return SiteResult(plain["layer"], plain["site"], kind(**plain["found"]), plain["table"])
