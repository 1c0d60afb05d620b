"""The model on released megatron-core, and weights in and out of it.

Importing this package prepares torch for megatron-core where there is no GPU (`cpu.install`).
"""

from .cpu import install

install()

from .model import DeepSeekV4Model, build_model  # noqa: E402
from .runtime import Parallel, initialize  # noqa: E402
from .weights import load_weights, stream_weights  # noqa: E402

__all__ = ["DeepSeekV4Model", "Parallel", "build_model", "initialize", "load_weights", "stream_weights"]
