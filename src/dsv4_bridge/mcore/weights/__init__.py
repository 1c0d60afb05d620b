"""Weights in and out of a live model, a piece at a time."""

from .load import load_weights
from .stream import stream_weights

__all__ = ["load_weights", "stream_weights"]
