"""Move DeepSeek-V4 between its released checkpoints and Megatron-Core, and prove it is the same model.

`open` looks into a checkpoint of either format; the verbs of the command are functions. All are loaded on first use.
Those that need torch live in rooms of their own: `mcore` (the model), `parity`, `generate.generate`, `train.loop`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import BridgeError

if TYPE_CHECKING:
    from .convert.checksums import verify_files
    from .convert.contents import examine
    from .convert.jobs import export_hf, import_hf, repack
    from .convert.merge import merge
    from .convert.releases import verify_hub, verify_release
    from .convert.rename import rename
    from .convert.run import Options
    from .convert.verify import verify
    from .planning.ranks import plan_ranks
    from .planning.tensors import plan
    from .spec import ModelSpec
    from .spec.flops import count_flops, flops_per_token
    from .store.checkpoint import Checkpoint
    from .store.checkpoint import open_checkpoint as open
    from .store.inspect import inspect
    from .toy.checkpoint import make_toy

    __version__: str

__all__ = [
    "BridgeError",
    "Checkpoint",
    "ModelSpec",
    "Options",
    "count_flops",
    "examine",
    "export_hf",
    "flops_per_token",
    "import_hf",
    "inspect",
    "make_toy",
    "merge",
    "open",
    "plan",
    "plan_ranks",
    "rename",
    "repack",
    "verify",
    "verify_files",
    "verify_hub",
    "verify_release",
]

_ROOMS = ("mcore", "parity")  # loaded when they are named

_PLACES = {
    "Checkpoint": "store.checkpoint:Checkpoint",
    "ModelSpec": "spec.spec:ModelSpec",
    "Options": "convert.run:Options",
    "count_flops": "spec.flops:count_flops",
    "examine": "convert.contents:examine",
    "export_hf": "convert.jobs:export_hf",
    "flops_per_token": "spec.flops:flops_per_token",
    "import_hf": "convert.jobs:import_hf",
    "inspect": "store.inspect:inspect",
    "make_toy": "toy.checkpoint:make_toy",
    "merge": "convert.merge:merge",
    "open": "store.checkpoint:open_checkpoint",
    "plan": "planning.tensors:plan",
    "plan_ranks": "planning.ranks:plan_ranks",
    "rename": "convert.rename:rename",
    "repack": "convert.jobs:repack",
    "verify": "convert.verify:verify",
    "verify_files": "convert.checksums:verify_files",
    "verify_hub": "convert.releases:verify_hub",
    "verify_release": "convert.releases:verify_release",
}


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        module, _, attribute = _PLACES[name].partition(":")
        return getattr(import_module(f".{module}", __name__), attribute)
    if name in _ROOMS:
        return import_module(f".{name}", __name__)
    if name == "__version__":
        return _version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _version() -> str:
    """Of this package, as it is installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("dsv4-bridge")
    except PackageNotFoundError:  # run from its source
        return "unknown"


def __dir__() -> list[str]:
    return sorted({*(name for name in globals() if name.startswith("__")), "__version__", *__all__, *_ROOMS})
