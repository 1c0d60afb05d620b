"""Move DeepSeek-V4 between its released checkpoints and Megatron-Core, and prove it is the same model.

The verbs of the command are functions here: `inspect`, `plan`, `import_hf`, `export_hf`, `repack`,
`verify`, `verify_files`, `make_toy`. They are loaded on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import BridgeError

if TYPE_CHECKING:
    from .bridge import export_hf, import_hf, repack
    from .checksums import verify_files
    from .convert import Options
    from .inspecting import inspect
    from .planning import plan
    from .toy import make_toy
    from .verifying import verify

__all__ = [
    "BridgeError",
    "Options",
    "export_hf",
    "import_hf",
    "inspect",
    "make_toy",
    "plan",
    "repack",
    "verify",
    "verify_files",
]

_ROOMS = {
    "Options": "convert",
    "export_hf": "bridge",
    "import_hf": "bridge",
    "inspect": "inspecting",
    "make_toy": "toy",
    "plan": "planning",
    "repack": "bridge",
    "verify": "verifying",
    "verify_files": "checksums",
}


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return getattr(import_module(f".{_ROOMS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
