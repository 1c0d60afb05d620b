"""LoRA on the model: layers, files, gathering."""

from .adapters import add_adapters, gather_adapters, load_adapters, trainable

__all__ = ["add_adapters", "gather_adapters", "load_adapters", "trainable"]
