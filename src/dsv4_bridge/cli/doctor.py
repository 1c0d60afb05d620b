"""Can this machine do the work: versions, cores, memory, disk, direct writes, GPU."""

import importlib.metadata
import os
import platform
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ..errors import BridgeError, files_named

_NEEDED = ("torch", "numpy", "numba", "safetensors", "huggingface_hub", "typer", "rich", "pyyaml")
_OPTIONAL = {
    "megatron-core": "the model and training: pip install 'dsv4-bridge[megatron]'",
    "triton": "imported by megatron-core: pip install 'dsv4-bridge[megatron]'",
    "psutil": "used by megatron-core: pip install 'dsv4-bridge[megatron]'",
    "transformers": "comparison with transformers: pip install 'dsv4-bridge[hf]'",
    "transformer-engine": "on GPUs: AdamW's moments in bf16, and its own grouped experts",
    "peft": "LoRA adapters: pip install 'dsv4-bridge[hf]'",
    "tokenizers": "text and chats: pip install 'dsv4-bridge[hf]'",
    "accelerate": "used by transformers: pip install 'dsv4-bridge[hf]'",
    "tensorboard": "events of training: pip install 'dsv4-bridge[train]'",
    "wandb": "runs at Weights & Biases: pip install 'dsv4-bridge[wandb]'",
    "mlflow": "runs at MLflow: pip install 'dsv4-bridge[mlflow]'",
    "matplotlib": "pictures of parity reports: pip install 'dsv4-bridge[report]'",
    "pyarrow": "Parquet tables: pip install 'dsv4-bridge[data]'",
    "zstandard": "data compressed with zstd: pip install 'dsv4-bridge[data]'",
}


@dataclass(frozen=True)
class Check:
    """One line of the doctor: what, what was found, `ok`, `missing` (optional) or `bad`."""

    what: str
    found: str
    state: str
    hint: str = ""


@files_named("examining")
def doctor(folder: Path | None = None) -> list[Check]:
    """Check this machine; `folder` is where outputs would go (default: the current one)."""
    checks = [Check("python", platform.python_version(), "ok")]
    for name in _NEEDED:
        version = _version(name)
        checks.append(
            Check(name, version or "not installed", "ok" if version else "bad", "" if version else "reinstall")
        )
    for name, hint in _OPTIONAL.items():
        version = _version(name)
        checks.append(Check(name, version or "not installed", "ok" if version else "missing", "" if version else hint))
    try:
        folder = folder or Path.cwd()
    except OSError:
        raise BridgeError("examining the current folder: it was removed; name one that is there") from None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = shutil.disk_usage(folder).free
    checks += [
        Check("cores", str(len(os.sched_getaffinity(0))), "ok"),
        Check("memory", f"{memory / 1e9:.1f} GB", "ok" if memory > 2e9 else "bad", "conversion needs about 1 GB"),
        Check(
            "free disk",
            f"{free / 1e9:.1f} GB in {folder}",
            "ok",
            "Flash needs 582 GB as Megatron, 160 GB as released",
        ),
        _direct(folder),
        _codec(),
        _cache(),
        _cuda(),
    ]
    return checks


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _direct(folder: Path) -> Check:
    from ..store.stream import direct_io

    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".dsv4-doctor-") as file:
            works = direct_io(Path(file.name))
    except OSError as error:
        return Check("writing", f"{folder}: {error.strerror}", "bad", "choose a folder that can be written")
    if works:
        return Check("direct writes", "yes", "ok")
    return Check("direct writes", "no", "missing", "writes go through the page cache and may be slower")


def _codec() -> Check:
    import numpy as np

    from ..codec import mxfp4

    packed = np.arange(256, dtype=np.uint8).reshape(1, 256).repeat(2, 0)
    scale = np.full((2, 16), 127, np.uint8)
    out = np.empty((2, 512), np.uint16)
    again, fresh = np.empty_like(packed), np.empty_like(scale)
    mxfp4.decode(packed, scale, out)
    mxfp4.encode(out, scale, again, fresh)
    good = np.array_equal(packed, again) and np.array_equal(scale, fresh)
    return Check("codec self-test", "all 256 MXFP4 bytes return" if good else "FAILED", "ok" if good else "bad")


def _cache() -> Check:
    from ..codec._kernels import cache_folder

    where = cache_folder()
    state = "missing" if where.startswith("nowhere") else "ok"
    return Check("compiled code", where, state, "set NUMBA_CACHE_DIR to a folder that you can write: starts are faster")


def _cuda() -> Check:
    import torch

    if torch.cuda.is_available():
        return Check("GPU", torch.cuda.get_device_name(), "ok")
    return Check("GPU", "none", "missing", "conversion needs none")
