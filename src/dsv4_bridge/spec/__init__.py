"""What is true of the model, whoever runs it: its numbers, the table of its tensors, the released variants."""

from .spec import ModelSpec
from .variants import VARIANTS

__all__ = ["VARIANTS", "ModelSpec"]
