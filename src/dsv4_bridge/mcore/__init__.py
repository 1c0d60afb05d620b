"""The model on released megatron-core, and weights in and out of it.

Importing this package prepares torch for megatron-core where there is no GPU (`cpu.install`).
"""

import logging
import warnings

from .cpu import install

# megatron-core says at import which optional packages are absent, and at every model that GPTModel
# is to be replaced one day: true, and nothing a user of these commands can act on.
for _name in (
    "megatron.core.distributed.distributed_data_parallel",
    "megatron.core.dist_checkpointing",
    "megatron.core.models.gpt.gpt_model",
    "torch.utils.cpp_extension",
):
    logging.getLogger(_name).setLevel(logging.ERROR)
# Its optimizers look at gradients of tensors that are no leaves, and find none, as they expect.
warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
warnings.filterwarnings("ignore", "MimoModelConfig is experimental")
# Experts are in one piece where only attention is cut, and their linear layers warn of it, each on every rank.
warnings.filterwarnings("ignore", "`sequence_parallel` is set to `True`, but tensor model parallel size")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    install()
    from ..parallel.topology import Sizes as Parallel
    from .checkpoints import load_checkpoint, save_checkpoint
    from .generate import generate
    from .model import DeepSeekV4Model, build_model
    from .pretrained import from_pretrained, save_pretrained
    from .runtime import initialize
    from .weights.load import load_weights
    from .weights.stream import stream_weights

__all__ = [
    "DeepSeekV4Model",
    "Parallel",
    "build_model",
    "from_pretrained",
    "generate",
    "initialize",
    "load_checkpoint",
    "load_weights",
    "save_checkpoint",
    "save_pretrained",
    "stream_weights",
]
