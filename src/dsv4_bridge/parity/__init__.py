"""Is it the same model: our forward pass beside transformers', layer by layer.

`parity` runs both on the same tokens and compares every sub-layer, every choice of experts and
blocks, and the logits of all positions.
"""

from .compare import parity
from .inputs import Inputs
from .result import ParityReport

__all__ = ["Inputs", "ParityReport", "parity"]
