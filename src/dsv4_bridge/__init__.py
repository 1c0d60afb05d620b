"""Move DeepSeek-V4 between its released checkpoints and Megatron-Core, and prove it is the same model.

The verbs of the command are functions here: `inspect`, `plan`, `import_hf`, `export_hf`, `repack`,
`verify`, `verify_files`, `make_toy`. They are loaded on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import BridgeError

if TYPE_CHECKING:
    from .convert.checksums import verify_files
    from .convert.jobs import export_hf, import_hf, repack
    from .convert.run import Options
    from .convert.verify import verify
    from .planning.tensors import plan
    from .store.inspect import inspect
    from .toy.checkpoint import make_toy

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
    "Options": "convert.run",
    "export_hf": "convert.jobs",
    "import_hf": "convert.jobs",
    "inspect": "store.inspect",
    "make_toy": "toy.checkpoint",
    "plan": "planning.tensors",
    "repack": "convert.jobs",
    "verify": "convert.verify",
    "verify_files": "convert.checksums",
}


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return getattr(import_module(f".{_ROOMS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
