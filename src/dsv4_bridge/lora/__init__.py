"""Adapters as files: in memory, in peft's folders, in Megatron checkpoints."""

from ..spec.lora import Lora

__all__ = ["Lora"]
