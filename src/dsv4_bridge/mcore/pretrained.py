"""The model with a checkpoint's weights, and back into a folder: each a few lines over what there is."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..convert.jobs import apart, model_job
from ..convert.run import Options, run
from ..errors import BridgeError, files_named
from ..files import AnyPath, local
from ..parallel.topology import Sizes
from ..store.hf import open_hf
from ..store.hub import resolve
from ..store.named import spec_of
from .model import DeepSeekV4Model, build_chunks
from .runtime import initialize
from .weights.gather import model_values
from .weights.load import load_weights


@files_named("opening")
def from_pretrained(
    name: AnyPath,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    parallel: Sizes | None = None,
    allow_lossy: bool = False,
    **settings: Any,
) -> DeepSeekV4Model:
    """Build this rank's part of the model of a checkpoint, and load its weights.

    Args:
        name: a Hugging Face folder, a Megatron checkpoint, or `owner/name` on the Hub.
        revision: branch, tag or commit on the Hub.
        dtype: type of the parameters; what releases keep in float32 stays so.
        parallel: sizes of the groups, under torchrun; by default those that exist, else one process.
        allow_lossy: permit float32 weights to be rounded to a bf16 model's parameters.
        **settings: further ones of `build_model`.

    Raises:
        BridgeError: no such checkpoint, a setting that is refused, or several chunks a rank (`build_chunks`).
    """
    folder = resolve(os.fspath(name), revision)
    initialize(parallel)
    chunks = build_chunks(spec_of(folder), dtype=dtype, initialize_weights=False, **settings)
    if len(chunks) > 1:
        raise BridgeError(f"opening {name}: the layout has {len(chunks)} chunks a rank; use build_chunks, load_weights")
    load_weights(chunks[0], folder, allow_lossy=allow_lossy)
    return chunks[0]


@files_named("saving")
def save_pretrained(
    model: DeepSeekV4Model | Sequence[DeepSeekV4Model],
    folder: AnyPath,
    like: AnyPath | None = None,
    *,
    encoding: str | None = None,
    overwrite: bool = False,
    allow_lossy: bool = False,
) -> Path:
    """Write the weights of a model of one process as a Hugging Face folder in released names.

    A model that is cut over ranks is saved with `save_checkpoint`, from which `dsv4 export` makes the same folder.

    Args:
        model: the model.
        folder: new; it looks complete when it is.
        like: released folder whose scales, files and config are kept wherever the values still fit.
        encoding: `source` (that of `like`, the default with it), `fp8` or `bf16` (the default without).
        overwrite: replace a checkpoint that is in the way.
        allow_lossy: permit an encoding other than the source's to round values.

    Returns:
        The folder.

    Raises:
        BridgeError: several ranks, an output in the way, or a tensor that cannot be represented.
    """
    out = local(folder, "saving")
    if dist.is_initialized() and dist.get_world_size() > 1:
        raise BridgeError(
            f"saving {out}: the model is cut over {dist.get_world_size()} ranks; save_checkpoint, then dsv4 export"
        )
    released = open_hf(resolve(os.fspath(like))) if like is not None else None
    try:
        if released:
            apart(released.folder.path, out)
        values = model_values([model] if isinstance(model, DeepSeekV4Model) else model)
        target = encoding or ("source" if released else "bf16")
        run(
            model_job(values, values.plan, released, target, allow_lossy=allow_lossy), out, Options(overwrite=overwrite)
        )
    finally:
        if released:
            released.close()
    return out
