"""Threads that may not have begun: a signal comes at any moment, and a system has a last one to give."""

import threading


def ended(thread: threading.Thread | None, seconds: float | None = None) -> None:
    """Wait for a thread, at most so long; nothing where there is none, or it was never started."""
    if thread is not None and thread.ident is not None:
        thread.join(seconds)
