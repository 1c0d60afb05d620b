"""The command `dsv4`."""

from .app import main

__all__ = ["main"]
